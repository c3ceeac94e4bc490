# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: 9bfbdfc28ca6c3ff (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task HalfCheetahVelocity --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

LIMIT = 3.2096  # m/s


def cost(obs, action, next_obs, margin=0.0):
    """Unsafe when the mean forward speed over the step, taken from its two ends, exceeds the limit."""
    speed = (obs[..., 8] + next_obs[..., 8]) / 2
    return (speed > LIMIT - margin).float()
