"""The simulator's own costs, as far as a state tells them: the ablation --cost oracle. No part of PROCO."""
import torch
import torch.nn.functional as F

import proco                                    # circular: what is used of it is looked up when it is used
from llm_costs.language import ProcoError

SPEEDS = dict(AntVelocity=(2.6222, [13, 14]), HalfCheetahVelocity=(3.2096, [8]), HopperVelocity=(0.7402, [5]),
              SwimmerVelocity=(0.2282, [3]), Walker2dVelocity=(2.3415, [8]))    # limit in m/s and where velocity is seen


def oracle_cost(task):
    """The simulator's own rule, read off states, in place of the language model's: --cost oracle, an ablation.

    The same interface as load_cost's. Raises ProcoError where the rule needs what no observation shows (buttons and
    gremlins have corners, vases slide, pillars collide) or where states are raw bins."""
    kind = task.name.removeprefix("Point").removeprefix("Car")
    if kind not in ("Goal1", "Push1", "Circle1", "Circle2", *SPEEDS) or (kind not in SPEEDS and not task.lidars):
        raise ProcoError(f"--cost oracle is not defined for {task.name}: only for Goal1, Push1, Circle and velocity tasks, "
                         "without --raw-obs")
    start = {lidar.name: lidar.start for lidar in task.lidars}

    def cost(obs, action, next_obs, margin=0.0):
        if kind in SPEEDS:                      # of the body over the step, taken from its two ends
            limit, columns = SPEEDS[kind]
            return (((obs + next_obs)[..., columns] / 2).norm(dim=-1) > limit - margin).float() if len(columns) > 1 else \
                ((obs + next_obs)[..., columns[0]] / 2 > limit - margin).float()
        if "hazards" in start:
            radius, bins = 0.3 if kind == "Push1" else 0.2, next_obs[..., start["hazards"]:start["hazards"] + proco.BINS]
            return (3 * (1 - bins.amax(-1)) <= radius + margin).float()
        bins = next_obs[..., start["circle"]:start["circle"] + proco.BINS]
        centre = torch.as_tensor(proco.locate(bins.cpu().numpy(), 6.0, 1), device=bins.device)[..., 0, :]
        sin, cos = F.normalize(next_obs[..., 9:11], dim=-1).neg().unbind(-1)                      # of the yaw
        place = torch.stack([cos * centre[..., 0] - sin * centre[..., 1], sin * centre[..., 0] + cos * centre[..., 1]], -1)
        return (place[..., :int(kind[-1])].abs().amax(-1) > 1.125 - margin).float()
    return cost
