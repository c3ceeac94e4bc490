# Written by a language model from the prompt with the hash below.
# model:  Claude
# day:    2026-11-22
# prompt: 2921bb186d5095c1 (first 16 digits of the SHA-256 of what this prints:
#         python -m llm_costs.write --task PointButton1 --show-prompt)
# Prompt and predicate were revised together with score.py in view: this is not one blind reply.

REACH = 3.0     # m, MAX of the lidars
HAZARD = 0.2    # m, radius
BUTTON = 0.102  # m, radius, and 2 mm because what leans on a ball keeps the gap at zero only roughly
GREMLIN = 0.1414  # m, a box's farthest reach, its angle being unknown
SAME = 0.01     # a bin at most this far (3 cm) above the goal lidar's counts as the goal button's own


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
    """Unsafe within a hazard, touching a gremlin, or touching a wrong button while they are on."""
    buttons, goal = next_obs[..., 12:28], next_obs[..., 28:44]
    hazard = REACH * (1 - next_obs[..., 44:60].amax(-1)) <= HAZARD + margin
    bins = next_obs[..., 60:76]
    x, y = sight(bins, bins)
    gremlin = gap(x, y) <= GREMLIN + margin
    # the goal lidar shows the right button alone: what exceeds it in the buttons lidar is a wrong one
    x, y = sight(buttons, torch.where(buttons > goal + SAME, buttons, torch.zeros_like(buttons)))
    on = obs[..., 12:28].amax(-1) > 0
    button = on & (gap(x, y) <= BUTTON + margin)
    return (hazard | gremlin | button).float()
