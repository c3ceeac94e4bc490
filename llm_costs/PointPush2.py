# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: 0eb99b363d26d3ca (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task PointPush2 --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

REACH = 3.0     # m, MAX of the lidars
HAZARD = 0.3    # m, radius
PILLAR = 0.202  # m, radius, and 2 mm because what leans on a pillar keeps the gap at zero only roughly


def sight(bins, wanted):
    """Body-frame positions (x, y), each (..., 2), of the nearest object with a bin in `wanted`: its distance
    is exact; its share f of the next bin lies between what the left and the right neighbour say, as another
    object can only have raised them, so both ends are returned."""
    value, i = wanted.max(-1, keepdim=True)
    left, right = bins.gather(-1, (i - 1) % 16), bins.gather(-1, (i + 1) % 16)
    share = torch.cat([1 - left / value.clamp(min=1e-9), right / value.clamp(min=1e-9)], -1).clamp(0, 1)
    bearing = (i + share) * (math.pi / 8)
    distance = REACH * (1 - value)
    return distance * torch.cos(bearing), distance * torch.sin(bearing)


def to_box(x, y, x0, x1, y0, y1):
    """Distance from the point (x, y) to a rectangle, 0 inside it."""
    dx = torch.maximum(x0 - x, x - x1).clamp(min=0)
    dy = torch.maximum(y0 - y, y - y1).clamp(min=0)
    return torch.sqrt(dx * dx + dy * dy)


def gap(x, y):
    """Distance from the nearer of the points (x, y) to the robot: a disc and its square nose."""
    disc = torch.sqrt(x * x + y * y) - 0.1
    return torch.minimum(disc, to_box(x, y, 0.05, 0.15, -0.05, 0.05)).amin(-1)


def cost(obs, action, next_obs, margin=0.0):
    """Unsafe within a hazard or touching a pillar."""
    hazard = REACH * (1 - next_obs[..., 28:44].amax(-1)) <= HAZARD + margin
    bins = next_obs[..., 44:60]
    x, y = sight(bins, bins)
    return (hazard | (gap(x, y) <= PILLAR + margin)).float()
