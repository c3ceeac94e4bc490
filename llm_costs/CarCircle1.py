# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: ceaa58309b594a9a (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task CarCircle1 --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

REACH = 6.0     # m, MAX of the circle lidar
LIMIT = 1.125   # m


def nearest(bins):
    """Body-frame position (x, y) of the one object in a lidar: distance from the largest bin, bearing from
    how its two neighbours share its value."""
    value, i = bins.max(-1)
    left = bins.gather(-1, ((i - 1) % 16).unsqueeze(-1)).squeeze(-1)
    right = bins.gather(-1, ((i + 1) % 16).unsqueeze(-1)).squeeze(-1)
    bearing = (i + right / (left + right).clamp(min=1e-9)) * (math.pi / 8)
    distance = REACH * (1 - value)
    return distance * torch.cos(bearing), distance * torch.sin(bearing)


def cost(obs, action, next_obs, margin=0.0):
    """Unsafe beyond the walls at x = +-1.125 m, or out of sight of the
    origin: where it is seen from the robot, turned into where the robot is."""
    centre_x, centre_y = nearest(next_obs[..., 24:40])
    sin, cos = -2 * next_obs[..., 9], -2 * next_obs[..., 10]
    norm = torch.sqrt(sin * sin + cos * cos).clamp(min=1e-6)
    sin, cos = sin / norm, cos / norm
    x = -(cos * centre_x - sin * centre_y)
    lost = next_obs[..., 24:40].amax(-1) <= 0
    return (lost | (x.abs() > LIMIT - margin)).float()
