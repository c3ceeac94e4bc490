# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: 8083f9c697e098a0 (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task DoubleIntegrator --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

def cost(obs, action, next_obs, margin=0.0):
    """Unsafe at the wall, x >= 1, or nearer to it than the margin."""
    return (next_obs[..., 0] + margin >= 1).float()
