# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: 019df640d7946763 (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task SwimmerVelocity --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

LIMIT = 0.2282  # m/s


def cost(obs, action, next_obs, margin=0.0):
    """Unsafe when the mean forward speed over the step, taken from its two ends, exceeds the limit."""
    speed = (obs[..., 3] + next_obs[..., 3]) / 2
    return (speed > LIMIT - margin).float()
