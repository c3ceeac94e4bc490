# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: 25891468752f162b (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task PointGoal2 --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

REACH = 3.0     # m, MAX of the lidars
HAZARD = 0.2    # m, radius
VASE = 0.1414   # m, a box's farthest reach, its angle being unknown


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
    """Unsafe within a hazard, touching a vase, or having touched one a step ago, which then still moves."""
    hazard = REACH * (1 - next_obs[..., 28:44].amax(-1)) <= HAZARD + margin
    bins, before = next_obs[..., 44:60], obs[..., 44:60]
    x, y = sight(bins, bins)
    x_before, y_before = sight(before, before)
    vase = torch.minimum(gap(x, y), gap(x_before, y_before)) <= VASE + margin
    return (hazard | vase).float()
