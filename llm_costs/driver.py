"""The scripted driver of Goal, Button and Circle: makes data on the spot where no recordings can be had.

It is no part of PROCO, and stands here so that proco.py holds nothing but the method. What it knows of the tasks is
what an observation shows: lidars, velocimeter, gyroscope and compass.
"""
import functools
import math

import numpy as np

BINS = 16                                       # of every lidar

# A point mass stands for the agent: time step s, top speed m/s, lag of its speed s, turn rate rad/s, half
# width m. Thrust and wheels saturate at a few hundredths of their range, so driving is all or nothing.
AGENTS = dict(Point=(0.02, 1.5, 0.52, 3.0, 0.12), Car=(0.04, 0.78, 0.14, 1.3, 0.19))
TICKS, NEAR = 14, 5     # points along a plan; nearest objects of each kind that the driver looks at


@functools.lru_cache
def plans(agent, every, rates):
    """The fan of plans "turn by delta at a given rate, then drive straight", ahead being +x, a point every
    so many steps. All start from rest: the model is linear, so the present velocity adds a drift of its own.

    -> gas (P,) 1 ahead or -1 back, turn (P,) rad/s now, path (P, T, 2) m, drift (T,) m per m/s."""
    dt, top, lag, fastest, _ = AGENTS[agent]
    fan = [1.0, -1.0], np.linspace(-math.pi / 2, math.pi / 2, 17), fastest * np.array(rates)
    gas, delta, rate = (axis.ravel() for axis in np.meshgrid(*fan, indexing="ij"))
    heading, velocity, places = 0 * delta, np.zeros((len(delta), 2)), [np.zeros((len(delta), 2))]
    for _ in range(TICKS * every):
        left = delta - heading
        heading = heading + np.clip(left, -rate * dt, rate * dt)
        push = gas if agent == "Point" else gas * (np.abs(left) <= rate * dt / 2)   # a car turns on the spot
        ahead = np.stack([np.cos(heading), np.sin(heading)], -1)
        velocity = velocity + (top * push[:, None] * ahead - velocity) * dt / lag
        places.append(places[-1] + velocity * dt)
    drift = lag * (1 - (1 - dt / lag) ** (every * np.arange(1, TICKS + 1)))
    return gas, np.clip(delta / dt, -rate, rate), np.stack(places[every::every], 1), drift


def detours(starts, goal, centres, radii, price):
    """Length of the shortest way from each start (A, 2) to goal (2,) around N discs, m -> (A,). A way goes
    over points beside the discs; each metre that a leg cuts into a disc counts as `price` metres more."""
    def leg(a, b):                                                  # (A, 2), (B, 2) -> (A, B)
        way, rel = b - a[:, None], centres - a[:, None]             # (A, B, 2), (A, N, 2)
        dot, length = way @ np.swapaxes(rel, 1, 2), (way ** 2).sum(-1)
        along = np.clip(dot / (length[..., None] + 1e-9), 0, 1)     # (A, B, N): where it is nearest
        off = (rel ** 2).sum(-1)[:, None] - 2 * along * dot + along ** 2 * length[..., None]
        return np.sqrt(length) + price * np.maximum(radii - np.sqrt(np.maximum(off, 0)), 0).sum(-1)
    aside = np.array([-goal[1], goal[0]]) / (np.hypot(*goal) + 1e-9) * (1.05 * radii[:, None])
    points = np.concatenate([centres + aside, centres - aside, goal[None]])
    between, rest = leg(points, points), np.append(np.full(len(points) - 1, np.inf), 0)
    for _ in range(4):                                              # at most four legs
        rest = np.minimum(rest, (between + rest).min(1))
    return (leg(starts, points) + rest).min(1)


def make_driver(task, rng, lidars, locate):
    """A driver for one episode: act(obs (O,)) -> action (2,) in [-1, 1], float32, from the observation alone; `lidars` is
    proco.LIDARS, the lidars of each kind of task, `locate` proco.locate, which reads positions from them.

    At each step it imagines a fan of plans and begins the one with the best progress minus penalties for
    entering any danger's radius, or that radius and a margin. Margin, noise and eagerness are drawn for each
    driver, so that the data vary. It remembers the time (gremlins circle with it) and the last buttons seen."""
    agent = "Point" if task.startswith("Point") else "Car"
    kind, level = task.removeprefix(agent)[:-1], int(task[-1])
    dt, top, _, fastest, size = AGENTS[agent]
    every, rates = 4 if agent == "Point" else 3, (1,)
    if kind == "Circle":
        every, rates = 2, (1, 0.5, 0.2) if agent == "Point" else (1,)
    gas, turns, table, drift = plans(agent, every, rates)
    times = dt * every * np.arange(1, TICKS + 1)
    margin, noise, eager, coast = rng.uniform([0.03, 0, 1, 0], [0.15, 0.3, 3, 0.2])
    names, start = lidars[kind], 12 if agent == "Point" else 24
    reach = np.array([6.0 if name == "circle" else 3.0 for name in names])
    radii = dict(hazards=0.2, vases=size + 0.13, buttons=size + 0.1, gremlins=size + 0.15)      # m
    dangers = [name for name in names if name in radii and (name, level) != ("vases", 1)]
    step, scan = -1, None

    def act(obs):
        nonlocal step
        step += 1
        bins = obs[start:start + BINS * len(names)].reshape(-1, BINS)
        # seen from ahead: for a car that is -y, and where it will point when its spin has died
        ahead = 0 if agent == "Point" else 0.06 * obs[8] - math.pi / 2
        frame = np.array([[math.cos(ahead), -math.sin(ahead)], [math.sin(ahead), math.cos(ahead)]])
        cos, sin = frame @ (-2 * obs[10:8:-1])                      # of the compass
        world = np.array([[cos, sin], [-sin, cos]])                 # (., 2) @ world: from seen to north-up
        seen = dict(zip(names, locate(bins, reach, NEAR) @ frame))
        paths = table + drift[:, None] * (obs[3:5] @ frame)         # (P, T, 2)
        judge = circle_value if kind == "Circle" else goal_value
        value, depth = judge(paths, seen, world, bins)
        if agent == "Car":                                          # do not dither between left and right
            value = value - 0.8 * (np.sign(turns) * obs[8] < -0.3)
        hard = np.maximum(depth - margin + 0.02, 0)                 # the danger itself, whatever the margin
        value = value - 20 / eager * (depth.max(1) + depth.mean(1)) - 100 * hard.max(1) - 400 * hard.mean(1)
        push, turn = gas[value.argmax()], turns[value.argmax()]
        if agent == "Point":
            action = np.array([push * (rng.random() > coast), turn / fastest])
            action = action + noise * rng.standard_normal(2)
        else:                                       # noise on wheels only slows them: sometimes another plan
            if rng.random() < noise / 5:
                push, turn = rng.choice([-1, 1]), rng.choice([-1, 0, 1])
            action = np.array([push, push] if turn == 0 else [np.sign(turn), -np.sign(turn)])
        return np.clip(action, -1, 1).astype(np.float32)

    def goal_value(paths, seen, world, bins):
        """Metres of progress (P,), and how deep each plan enters dangers and their margins, m (P, T)."""
        nonlocal scan
        far = not bins[names.index("goal")].any()                   # then make for the middle of what is seen
        goal = seen["hazards"].mean(0) if far else seen["goal"][0]
        if kind == "Button":
            if scan is None or bins[0].any():                       # else dark: a button was pressed just now
                scan = seen["buttons"]
            mine = np.hypot(*(scan - goal).T) < 0.2
            seen["buttons"] = np.where(mine[:, None], 9.0, scan)                    # the goal is no danger
        places = np.stack([np.repeat(seen[name][:, None], TICKS, 1) for name in dangers])   # (kinds, N, T, 2)
        if kind == "Button":                        # gremlins circle in phase, clockwise: r 0.35 m, 1 rad/s
            now = dt * step - 0.08                  # they are drawn along with a lag
            move = np.stack([np.sin(now + times) - np.sin(now), np.cos(now + times) - np.cos(now)], -1)
            places[dangers.index("gremlins")] += 0.35 * move @ world.T
        radius = np.repeat([radii[name] + margin for name in dangers], NEAR)
        gap = paths[:, None] - places.reshape(-1, TICKS, 2)                         # (P, kinds * N, T, 2)
        depth = np.maximum(radius[:, None] - np.sqrt((gap ** 2).sum(-1)), 0).max(1)
        hit = np.hypot(*np.moveaxis(paths - goal, -1, 0)) < (0.28 if kind == "Goal" else size + 0.08)
        still = [n for n, name in enumerate(dangers) if name != "gremlins"]
        discs, wide = places[still, :4, -1].reshape(-1, 2), radius.reshape(-1, NEAR)[still, :4].ravel()
        way = detours(paths[:, -1], goal, discs, wide, 20 / eager)
        return np.where(hit.any(1), top * (times[-1] - times[hit.argmax(1)]), -way), depth

    def circle_value(paths, seen, world, bins):
        """The task's own reward along each plan (P,), and how far it passes the walls less a margin, m."""
        paths = np.concatenate([0 * paths[:, :1], paths], 1)
        x, y = np.moveaxis((paths - seen["circle"][0]) @ world, -1, 0)
        r, dx, dy = np.hypot(x, y)[:, 1:], np.diff(x), np.diff(y)
        reward = (x[:, 1:] * dy - y[:, 1:] * dx) / times[0] / r / (1 + np.abs(r - 1.5))
        wall = np.abs(x) if level == 1 else np.maximum(np.abs(x), np.abs(y))
        return 6 * reward.mean(1), np.maximum(wall[:, 1:] - 1.125 + margin, 0)
    return act


def demonstrator(rng):
    """The double integrator's driver: speeds up to a speed of its own, brakes in time for a stop before the wall. It
    starts from farther away than the policy will, since from 3 m nobody who stops in time gets to know 2 m/s."""
    speed, stop, brake, noise = rng.uniform(0.3, 2), rng.uniform(0.3, 0.95), rng.uniform(0.3, 0.9), rng.uniform(0, 0.5)

    def act(obs):
        x, v = obs
        room = max(stop - x, 0)
        wanted = min(speed, math.sqrt(2 * brake * room)) if x < stop else -0.2
        return np.array([np.clip((wanted - v) / 0.3 + noise * rng.normal() * (room > v), -1, 1)], np.float32)
    return act
