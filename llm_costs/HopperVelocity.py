# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: 052c3a28cc24d262 (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task HopperVelocity --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

LIMIT = 0.7402  # m/s


def cost(obs, action, next_obs, margin=0.0):
    """Unsafe when the mean forward speed over the step, taken from its two ends, exceeds the limit."""
    speed = (obs[..., 5] + next_obs[..., 5]) / 2
    return (speed > LIMIT - margin).float()
