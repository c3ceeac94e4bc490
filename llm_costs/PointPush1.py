# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: d56062d6555bbdf8 (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task PointPush1 --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

def cost(obs, action, next_obs, margin=0.0):
    """Unsafe when the nearest hazard's centre, whose distance the largest bin tells, is within its radius."""
    distance = 3.0 * (1 - next_obs[..., 28:44].amax(-1))
    return (distance <= 0.3 + margin).float()
