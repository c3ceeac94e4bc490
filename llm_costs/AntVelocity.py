# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: 787c1b3c273f2af3 (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task AntVelocity --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

LIMIT = 2.6222  # m/s


def cost(obs, action, next_obs, margin=0.0):
    """Unsafe when the mean velocity over the step, taken from its two ends, is longer than the limit."""
    velocity = (obs[..., 13:15] + next_obs[..., 13:15]) / 2
    return (torch.linalg.norm(velocity, dim=-1) > LIMIT - margin).float()
