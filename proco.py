# /// script
# requires-python = ">=3.10,<3.12"  # where mujoco 2.3 can be had, the simulator of DSRL's data
# dependencies = [
#     "torch==2.13.0", "numpy<2.3", "safety-gymnasium==0.4.0", "dsrl==0.1.0", "requests>=2.28",
#     "gymnasium==0.28.1", "mujoco==2.3.3", "xmltodict>=0.13", "pyyaml>=6.0", "imageio>=2.27",
#     "h5py>=3.8", "tqdm>=4.60", "matplotlib>=3.6", "filelock>=3.12",
# ]
# [tool.uv]
# override-dependencies = [  # the last two lines: pins that can't be installed, nothing imports
#     "gymnasium==0.28.1", "mujoco==2.3.3",
#     "pygame; python_version < '0'", "gym; python_version < '0'", "pybullet; python_version < '0'",
#     "bullet-safety-gym; python_version < '0'", "gymnasium-robotics; python_version < '0'",
# ]
# ///
"""PROCO: a safe policy from recorded data that hold no violations, in one file.

After Yang, Cheng, Yuan, Xue and Yu 2026, "Model-Based Proactive Cost Generation for Learning Safe
Policies Offline with Limited Violation Data" (arXiv 2605.01356). Data in which nobody ever crashed
look safe everywhere, so a learner copies the drivers and crashes a little off their tracks. PROCO
makes up the crashes that did not happen, and learns from them where safety can still be kept:

    1 data          D: whole episodes without a violation, recorded or demonstrated on the spot
    2 dynamics      a probabilistic ensemble p_i(s' | s, a) of the agent's motion: train_dynamics
    3 cost          words -> language model (llm_costs/write.py) -> predicate: conservative_cost
    4 roll-outs     the model makes D_cf: unsafe, infeasible and safe samples: roll_out
    5 feasibility   Q_f, V_f = gamma_f^n if at best n more steps are safe: feasibility_loss
    6 policy        Lagrangian TD3+BC: reward where feasible, else back to safety: lagrangian_loss
    7 acting        clone, actor, filter (Q_f chooses) or plan (ours: the model looks ahead): plan
    9 evaluation    return and cost in the real simulator (8 is the training loop, 10 a whole run)

    python proco.py --task CarButton1               # from nothing to scores; results in runs/
    python proco.py --task DoubleIntegrator         # half a minute, no simulator, closed form known
    python proco.py --task PointGoal1 --method bc   # plain cloning of the same data
    python proco.py --evaluate runs/CarButton1/proco/seed0 --acting filter

Shapes: E members, B batch, H horizon, S state, A action, O observation, N things around the agent,
K kinds of them, W own fields, M candidates, F features; k steps of a decision.
ASSUMED: the abstract is silent. DEVIATION: we differ. FORK: a seam to cut at. Figures in comments
are of the version that brought the line; assets/RESULTS.md has those of today.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import requests
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
adam = functools.partial(torch.optim.Adam, fused=True)
METHODS = ("bc", "td3bc", "td3bc-lag", "fisor", "cpq", "proco", "proco-fisor", "proco-cpq")


class ProcoError(Exception):
    """Something a user can put right; the message is one sentence that says how."""


class CostError(ProcoError):
    """A cost predicate that cannot be used; the message says why."""


# ==== Settings ====================================================================================


def setting(default, group, text, low=None, high=None):
    """A field of Config: a default, which a task may replace; for --help; and the allowed range."""
    about = {"default": default, "group": group, "help": text, "low": low, "high": high}
    return dataclasses.field(default=None, metadata=about)


@dataclasses.dataclass
class Config:
    """Every setting of a run. The command line is made from it; None is the task's default."""

    task: str = setting("CarButton1", "run", "such as PointGoal1, CarCircle2 or DoubleIntegrator")
    method: str = setting("proco", "run", "one of " + ", ".join(METHODS))
    seed: int = setting(0, "run", "of everything that is drawn in training", 0, 2**31)
    data: str = setting("auto", "run", "auto, dsrl, demonstrator, or an HDF5 file as DSRL's are")
    out: str = setting("runs", "run", "folder that gets <task>/<method>/seed<k>/")
    device: str = setting("auto", "run", "cpu, cuda, or auto: cuda where there is one")
    scale: float = setting(1.0, "run", "of training and roll-outs; 0.02: smoke test", 1e-6, 1e6)
    max_episode_cost: float = setting(0.0, "1 data", "most violations of a kept episode", 0, 1e9)
    driver_episodes: int = setting(50, "1 data", "episodes of the demonstrator", 2, 1e6)
    ensemble: int = setting(7, "2 dynamics", "members; two thirds become elites", 1, 100)
    model_epochs: int = setting(20, "2 dynamics", "epochs of the model", 1, 1e6)
    cost: str = setting("", "3 cost", "file of a predicate (default: llm_costs/<task>.py)")
    margin: float = setting(-1.0, "3 cost", "widens danger, m or m/s; -1: by model error", 0, 0.99)
    horizon: int = setting(36, "4 roll-outs", "steps of a roll-out; 0: no roll-outs", 0, 1e4)
    rollouts: int = setting(30_000, "4 roll-outs", "in the whole run", 1, 1e9)
    gamma_f: float = setting(0.97, "5 feasibility", "discount of violations, a step", 0.01, 0.9999)
    eps: float = setting(0.5, "5 feasibility", "feasible is where V_f <= eps", 0.001, 0.999)
    clone_updates: int = setting(5_000, "6 policy", "of the clone, where all begin", 1, 1e9)
    feasibility_updates: int = setting(6_000, "6 policy", "of critics, before the actor", 1, 1e9)
    updates: int = setting(4_000, "6 policy", "then, half as many of the actor", 1, 1e9)
    batch: int = setting(256, "6 policy", "decisions of D, and of D_cf, in an update", 2, 1e6)
    hidden: int = setting(128, "6 policy", "width of both hidden layers; the model's half", 2, 1e5)
    gamma: float = setting(0.99, "6 policy", "discount of the reward, a step", 0.01, 1)
    bc_weight: float = setting(1.0, "6 policy", "of cloning; 0.2 is TD3+BC's own", 0, 1e6)
    plan_clone: float = setting(0.01, "7 acting", "price of leaving the clone in a plan", 0, 1e6)
    acting: str = setting("auto", "7 acting", "the way that counts; auto: the last there is")
    eval_episodes: int = setting(20, "9 evaluation", "episodes driven in the end", 1, 1e6)
    eval_seed: int = setting(40_000, "9 evaluation", "of the first; others count up", 0, 2**31)

    def __post_init__(self):
        """Fills in what was not given. Raises ProcoError, which names a bad option."""
        own = get_task(self.task or "CarButton1").settings
        for field in dataclasses.fields(self):
            about = field.metadata
            value = getattr(self, field.name)
            value = own.get(field.name, about["default"]) if value is None else value
            value = str(value) if isinstance(about["default"], str) else value  # it may be a Path
            setattr(self, field.name, value)
            inside = about["low"] is None or about["low"] <= value <= about["high"]
            if not inside and value != about["default"]:
                words = "--{} {} is out of its range, {low:g} to {high:g}"
                raise ProcoError(words.format(field.name.replace("_", "-"), value, **about))
        if self.method not in METHODS:
            raise ProcoError(f"there is no method {self.method!r}; there are {', '.join(METHODS)}")
        # The algorithm, and whether PROCO is under it: a model, the conservative cost and D_cf.
        self.algorithm = {"proco": "td3bc-lag"}.get(self.method, self.method.removeprefix("proco-"))
        self.counterfactual = self.method.startswith("proco")
        self.folder = Path(os.path.expanduser(self.out), self.task, self.method, f"seed{self.seed}")


# ==== 0. Tasks, and the state through which they are seen =========================================
# A task is one entry of TASKS. A state has two parts: the agent's own fields, which the model
# learns, and the places of things around it, which move by the agent's own motion.


class DoubleIntegrator:
    """A mass before a wall: v <- v + a dt, x <- x + v dt, |a| <= 1, |v| <= 2, unsafe at x >= 1;
    the reward is the progress in x. The interface is that of Safety-Gymnasium."""

    dt = 0.1

    def __init__(self, far=3.0):
        self.far = far  # m; episodes start at x in [-far, 0]

    def reset(self, seed=None):
        rng = np.random.default_rng(seed)
        self.x, self.v = rng.uniform((-self.far, -0.5), (0, 0.5)).tolist()
        self.t = 0
        return np.array([self.x, self.v], np.float32), {}

    def step(self, action):
        self.v = float(np.clip(self.v + np.clip(action[0], -1, 1) * self.dt, -2, 2))
        self.x += self.v * self.dt
        self.t += 1
        obs = np.array([self.x, self.v], np.float32)
        return obs, self.v * self.dt, float(self.x >= 1), False, self.t >= 100, {}


def double_integrator_infeasible(x, v):
    """Where full braking still enters the wall, or x is in it: x (m), v (m/s) -> bool array."""
    # |v| <= 2 stops within 20 steps of 0.1 s, so the sum of 20 speeds is the way to the stop.
    speeds = np.clip(v, 0, 2)[..., None] - DoubleIntegrator.dt * np.arange(1, 21)
    return x + DoubleIntegrator.dt * np.maximum(speeds, 0).sum(-1) >= 1


# 16 bins of the observation from start on, 1 - distance / reach (m); count nearest things are kept.
Lidar = namedtuple("Lidar", "name start reach count")


@dataclasses.dataclass(eq=False)
class Task:
    """All that the program knows about a task. # FORK: a task of your own is one more of these."""

    name: str
    make: object  # a function that makes its environment, or a name of Safety-Gymnasium's
    obs_dim: int
    act_dim: int
    steps: int  # of an episode
    dt: float  # s, of a step
    # Indices of the observation that the state keeps as they are. With lidars they begin with
    # velocity x and y, yaw rate and the compass.
    sensors: tuple
    lidars: tuple = ()
    repeat: int = 1  # steps that a decision lasts
    saturation: tuple = ()  # of each action, beyond which more changes nothing; () is 1
    healthy: tuple = ()  # (field of the state, low, high): an episode ends beyond
    limited: tuple = ()  # without lidars: fields that the predicate reads, which starts redraw
    settings: dict = dataclasses.field(default_factory=dict)  # its own defaults of Config

    def __post_init__(self):
        unknown = set(self.settings).difference(field.name for field in dataclasses.fields(Config))
        if unknown or self.repeat < 1 or not 0 <= max(self.sensors) < self.obs_dim:
            why = f"unknown settings {sorted(unknown)}, no repeat or a sensor beyond obs_dim"
            raise ProcoError(f"the task {self.name} has {why}")
        # The kind of each of the N things that the state holds, as the index of its lidar.
        self.kinds = [k for k, lidar in enumerate(self.lidars) for _ in range(lidar.count)]
        self.nearest = [self.kinds.index(k) for k in range(len(self.lidars))]  # the first of each
        self.reach = torch.tensor([self.lidars[kind].reach for kind in self.kinds])  # (N,), m
        self.full = np.array(self.saturation or [1.0] * self.act_dim, np.float32)  # (A,)
        # Whether things move by themselves, all alike; then the first lidar has to be the buttons'.
        self.moving = bool(self.things("gremlins"))
        self.own_dim = len(self.sensors) + 3 * self.moving  # their velocity, "buttons are off"
        self.state_dim = self.own_dim + 2 * len(self.kinds)
        self.aims = self.things("goal", "push_box")  # one of each: out of sight it is remembered

    def things(self, *names):
        """Which of the state's N things are seen by lidars of these names: a list of indices."""
        return [n for n, kind in enumerate(self.kinds) if self.lidars[kind].name in names]


BINS = 16  # of every lidar of Safety-Gymnasium
KINDS = {  # reach, m; steps of an episode; lidars in their order: how many things the state keeps
    "Circle": (6.0, 500, {"circle": 1}),
    "Goal": (3.0, 1000, {"goal": 1, "hazards": 5, "vases": 3}),
    "Button": (3.0, 1000, {"buttons": 4, "goal": 1, "hazards": 5, "gremlins": 4}),
    "Push": (3.0, 1000, {"goal": 1, "hazards": 5, "pillars": 4, "push_box": 1}),
}
AGENTS = {  # where lidars start, s of a step, and where the simulator's XML clamps the forces
    "Point": (12, 0.02, (0.05, 1.0)),
    "Car": (24, 0.04, (0.02, 0.02)),
}
ROBOTS = {  # sizes, s of a step, what is limited, documented healthy heights and pitches
    "Ant": (27, 8, 0.05, (13, 14), ((0, 0.2, 1.0),)),
    "HalfCheetah": (17, 6, 0.05, (8,), ()),
    "Hopper": (11, 3, 0.008, (5,), ((0, 0.7, math.inf), (1, -0.2, 0.2))),
    "Swimmer": (8, 2, 0.04, (3,), ()),
    "Walker2d": (17, 6, 0.008, (8,), ((0, 0.8, 2.0), (1, -1.0, 1.0))),
}

# The double integrator needs smaller networks and fewer updates, but more episodes: they are short.
SMALL = {"driver_episodes": 100, "hidden": 64, "margin": 0.005, "horizon": 21, "gamma_f": 0.98}
SMALL |= {"rollouts": 20_000, "eps": 0.4, "clone_updates": 500, "feasibility_updates": 3_000}
SMALL |= {"updates": 1_000, "eval_episodes": 50}
LINE = {"repeat": 3, "limited": (0,), "settings": SMALL}
INTEGRATOR = Task("DoubleIntegrator", DoubleIntegrator, 2, 1, 100, 0.1, (0, 1), **LINE)
# A violation is seldom announced, so gamma_f is short. After so few updates |Q_r| is a fifth of its
# level, so Q_r / |Q_r| pulls hard and cloning weighs more: with 1 Swimmer's actors left the gait.
GAIT = {"gamma_f": 0.9, "bc_weight": 20.0, "clone_updates": 1_500, "feasibility_updates": 2_500}
GAIT |= {"updates": 2_000, "rollouts": 12_000}


def navigation_task(agent, kind, level):
    """The entry of CarButton1, say."""
    start, dt, clamps = AGENTS[agent]
    reach, steps, counts = KINDS[kind]
    seen = enumerate(counts.items())
    lidars = [Lidar(name, start + BINS * n, reach, count) for n, (name, count) in seen]
    name = f"{agent}{kind}{level}"
    size = start + BINS * len(lidars)
    # DEVIATION: a decision lasts 0.12 s, for every method alike. A step of 0.02 s changes so little
    # that the values of its actions differ by less than a network's error.
    more = {"lidars": tuple(lidars), "repeat": round(0.12 / dt), "saturation": clamps}
    # ASSUMED: velocity x, y, yaw rate and the two compass fields are the sensors that matter. The
    # accelerometer follows from them; the rest is constant or the Car's idle rear ball.
    return Task(name, f"Safety{name}-v0", size, 2, steps, dt, (3, 4, 8, 9, 10), **more)


def velocity_task(robot):
    """The entry of HopperVelocity, say: nothing stands around it."""
    size, actions, dt, limited, healthy = ROBOTS[robot]
    name = f"{robot}Velocity"
    more = {"limited": limited, "healthy": healthy, "settings": GAIT}
    return Task(name, f"Safety{name}-v1", size, actions, 1000, dt, range(size), **more)


NAVIGATION = itertools.starmap(navigation_task, itertools.product(AGENTS, KINDS, (1, 2)))
TASKS = {task.name: task for task in (INTEGRATOR, *NAVIGATION, *map(velocity_task, ROBOTS))}


def get_task(name):
    """The entry of a task. Raises ProcoError, which names those that there are."""
    if name not in TASKS:
        raise ProcoError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def split(state, task):
    """State (..., S) -> own fields (..., W) and places of things as x + iy in m (..., N)."""
    xy = state[..., task.own_dim :]
    return state[..., : task.own_dim], torch.complex(xy[..., 0::2], xy[..., 1::2])


def join(own, z, task):
    """The reverse of split, with things sorted by kind and distance: -> state (..., S)."""
    kind = torch.tensor(task.kinds, device=z.device)
    order = (100 * kind + z.abs()).argsort(-1)  # none is 100 m away, so kinds stay together
    return torch.cat([own, torch.view_as_real(z.gather(-1, order)).flatten(-2)], -1)


def locate(bins, reach, count):
    """Places of a lidar's nearest things: bins (..., 16) -> x + iy in m (..., count). The largest
    bin tells a thing's distance, the bin after it the bearing; its bins are removed, and so on."""
    rest = bins
    found = []
    for _ in range(count):
        value, i = rest.max(-1, keepdim=True)
        near = (i + torch.tensor([0, 1, -1], device=i.device)) % BINS  # it, the next, the previous
        share = (bins.gather(-1, near[..., 1:2]) / value.clamp(min=1e-9)).clamp(max=1)
        z = torch.polar(reach * (1 - value), (i + share) * (2 * math.pi / BINS))
        found.append(torch.where(value > 0, z, reach))
        alias = value * torch.cat([torch.ones_like(share), share, 1 - share], -1)
        there = rest.gather(-1, near)
        rest = rest.scatter(-1, near, torch.where(there <= alias + 1e-3, 0, there))
    return torch.cat(found, -1)


def own_motion(before, after, task):
    """How the agent turned and went in a step, by compass and velocimeter: (..., W) twice -> spin,
    way (...), complex. A thing at rest, seen at z, is then seen at (z - way) spin."""
    north, turned = (torch.complex(own[..., 4], own[..., 3]) for own in (before, after))
    spin = north / turned
    spin = spin / spin.abs().clamp(min=1e-6)
    velocity, following = (torch.complex(own[..., 0], own[..., 1]) for own in (before, after))
    return spin, task.dt / 2 * (velocity + following / spin)


def encode(obs, task, last=None):
    """The state that all networks see: obs (..., O), the state a step ago, if any -> (..., S).
    # ASSUMED: every model of lidar bins that we tried was worse than "nothing changes": a bin is no
    smooth function of a distance and a heading."""
    obs = torch.as_tensor(obs, dtype=torch.float32)
    own = obs[..., list(task.sensors)]
    if not task.lidars:
        return own
    bins = [obs[..., lidar.start : lidar.start + BINS] for lidar in task.lidars]
    z = [locate(part, lidar.reach, lidar.count) for part, lidar in zip(bins, task.lidars)]
    z = torch.cat(z, -1)
    if task.moving:  # velocity 0 until there is a last state; buttons that are off are dark
        dark = bins[0].amax(-1, keepdim=True) == 0
        own = torch.cat([own, torch.zeros_like(own[..., :2]), dark.float()], -1)
    # An aim out of sight is guessed where the other things are, in the arena's middle. Straight
    # ahead, where (reach, 0) lies, it would run away from an agent that follows it.
    seen = z.abs() < 0.999 * task.reach
    middle = (z * seen).sum(-1, keepdim=True)
    edge = task.reach * middle / middle.abs().clamp(min=1e-6)
    z[..., task.aims] = torch.where(seen | (middle == 0), z, edge)[..., task.aims]
    state = join(own, z, task)
    return state if last is None else remember(state, last, task)


def remember(state, last, task):
    """A state (..., S) with what needs the state one step ago (last, (..., S)): the velocity that
    all gremlins share, the places of buttons while they are off, and of an aim out of sight."""
    own, z = split(state, task)
    own_last, z_last = split(last, task)
    spin, way = own_motion(own_last, own, task)
    still = (z_last - way[..., None]) * spin[..., None]  # where what stands still is seen now
    if task.moving:
        gremlins = task.things("gremlins")
        moved = z[..., None, gremlins] - still[..., gremlins, None]  # (..., G, G): last, now
        moved = moved.gather(-1, moved.abs().argmin(-1, keepdim=True))[..., 0]
        same = (moved.abs() < 0.02) & (z_last[..., gremlins].abs() < 2.97)
        mean = (same * moved).sum(-1) / same.sum(-1).clamp(min=1) / task.dt
        velocity = torch.complex(own_last[..., -3], own_last[..., -2]) * spin
        # 0.25 lies between the Car's best rate, 0.5, and the Point's, 0.2: more follows the lidar.
        velocity = torch.where(same.any(-1), velocity + 0.25 * (mean - velocity), velocity)
        buttons = task.things("buttons")
        # A dark lidar means "off" where buttons were seen just now, else that none is near.
        off = own[..., -1:] * (still[..., buttons].abs().amin(-1, keepdim=True) < 2.9)
        z[..., buttons] = torch.where(off > 0.5, still[..., buttons], z[..., buttons])
        own = torch.cat([own[..., :-3], torch.view_as_real(velocity), off], -1)
    # What vanished from near by was reached and drawn anew. What left at the lidar's edge is there.
    gone = (z.abs() > 0.999 * task.reach) & (z_last.abs() > task.reach - 0.2)
    carried = still * (task.reach / still.abs().clamp(min=1e-6)).clamp(min=1)
    z[..., task.aims] = torch.where(gone, carried, z)[..., task.aims]
    return join(own, z, task)


def sector(z):
    """Of 16 sectors around the agent, where places lie: complex -> index, share of the way on."""
    turn = z.angle() * (BINS / (2 * math.pi)) % BINS
    i = turn.long().clamp(max=BINS - 1)
    return i, turn - i


def decode(state, task):
    """The observation (..., O) that a predicate reads of a state (..., S); other sensors are 0."""
    own, z = split(state, task)
    obs = state.new_zeros(*state.shape[:-1], task.obs_dim)
    obs[..., list(task.sensors)] = own[..., : len(task.sensors)]
    value = (1 - z.abs() / task.reach.to(z.device)).clamp(min=0)
    if task.moving:  # buttons that are off are dark
        value[..., task.things("buttons")] *= own[..., -1:] < 0.5
    i, share = sector(z)
    start = torch.tensor([task.lidars[kind].start for kind in task.kinds], device=z.device).long()
    bins = torch.cat([start + i, start + (i + 1) % BINS, start + (i - 1) % BINS], -1)  # (..., 3N)
    values = torch.cat([value, share * value, value - share * value], -1)
    return obs.scatter_reduce(-1, bins, values, "amax")


def ended(state, task):
    """Whether an episode is over in a state, as where a robot fell: (..., S) -> (...) bool."""
    over = torch.zeros_like(state[..., 0], dtype=torch.bool)
    for field, low, high in task.healthy:
        over |= (state[..., field] < low) | (state[..., field] > high)
    return over


# ==== 1. Data: exclusively safe episodes ==========================================================
# D has whole episodes without a recorded violation (or few: --max-episode-cost). Without PROCO its
# costs are (nearly) zero therefore. With PROCO its steps are judged by step 3's predicate.

CACHE = Path(os.path.expanduser(os.environ.get("PROCO_CACHE", "~/.cache/proco")))
DEMONSTRATED = ("Goal", "Circle", "Button", "DoubleIntegrator")  # what the demonstrator can drive
MIRROR = "https://huggingface.co/datasets/YYY-45/DSRL/resolve/main"  # DSRL's own host is often down
KEYS = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")


def dsrl_infos():
    """What dsrl/infos.py defines, {} without dsrl. Read, not imported: dsrl imports simulators."""
    package = importlib.util.find_spec("dsrl")
    return runpy.run_path(f"{package.submodule_search_locations[0]}/infos.py") if package else {}


def download(url, file):
    """Fetches url into an open file, from where an earlier try broke off."""
    for _ in range(5):
        have = file.seek(0, os.SEEK_END)
        headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
        with requests.get(url, headers=headers, stream=True, timeout=(3, 30)) as reply:
            if reply.status_code == 416:  # nothing is left
                return
            reply.raise_for_status()
            if reply.status_code != 206:  # the server sends it from its start
                have = file.truncate(0)
            size = have + int(reply.headers.get("Content-Length") or 0)
            words = f"1 data: {Path(url).name}"
            bar = tqdm(None, words, size, initial=have, unit="B", unit_scale=True)
            with bar, contextlib.suppress(requests.RequestException):  # it breaks off
                for chunk in reply.iter_content(1 << 16):
                    bar.update(file.write(chunk))
        if file.tell() >= size:
            return
    raise requests.ConnectionError("it breaks off")


def fetch_dsrl(task, cache_dir=None, base_url=None):
    """The path of DSRL's recordings of a task, downloaded if need be. Raises ProcoError."""
    urls = dsrl_infos().get("DATASET_URLS", {})
    if task not in urls:
        why = f"DSRL has none of {task}" if urls else "the package dsrl is not installed"
        raise ProcoError(f"no recordings: {why}; give your own with --data FILE.hdf5")
    host, name = urls[task].rsplit("/", 1)
    folder = cache_dir or os.environ.get("DSRL_DATASET_DIR") or "~/.dsrl/datasets"
    path = Path(os.path.expanduser(folder), name)
    if os.path.exists(path):
        return path
    writable(path.parent, "DSRL_DATASET_DIR")
    reasons = []
    print(f"1 data: downloading {path}, or waiting for another process that does")
    with FileLock(path.with_name(f"{name}.lock")):
        if path.exists():
            return path
        with open(path.with_name(f"{name}.part"), "ab", buffering=0) as part:
            for base in [base_url] if base_url else [MIRROR, host]:
                try:
                    download(f"{base.rstrip('/')}/{name}", part)
                    h5py.File(part.name, "r", locking=False).close()
                    os.replace(part.name, path)
                    return path
                except requests.RequestException as error:
                    status = getattr(error.response, "status_code", type(error).__name__)
                    reasons.append(f"{base}: {status}")
                except OSError as error:  # a web page, say, or a full disk
                    part.truncate(0)
                    reasons.append(f"{base}: {error.strerror or f'no HDF5, or cut off ({error})'}")
    advice = f"get {name} from {MIRROR} into {path.parent}, or give a file with --data"
    none = "the tasks Goal, Circle and Button need none: they are demonstrated"
    raise ProcoError(f"no recordings of {task} ({'; '.join(reasons)}): {advice}; {none}")


def collect_episode(job):
    """An episode of a new demonstrator: (task's name, seed) -> {key: (T, .)} as DSRL's, float32."""
    name, seed = job
    # Data start up to 7 m before the wall: from 4 m nobody who brakes in time reaches 2 m/s.
    env = DoubleIntegrator(far=6.0) if name == "DoubleIntegrator" else make_env(name)
    following, _ = env.reset(seed=seed)
    # the style is drawn apart from the start, which has the seed alone
    act = make_demonstrator(get_task(name), env, np.random.default_rng((seed, 1)))
    rows = []
    while not rows or not max(rows[-1][-2:]):  # neither terminal nor timeout
        obs = following
        action = act(obs)
        following, *rest, _ = env.step(action)
        rows.append((obs, following, action, *rest))
    return {key: np.array(column, np.float32) for key, column in zip(KEYS, zip(*rows))}


def demonstrate(name, episodes):
    """The path of a file with so many episodes of the demonstrator, driven if it is not there."""
    mujoco = versions()["mujoco"]  # another one drives other paths; v3: of the demonstrator
    path = CACHE / "demonstrator" / f"{name}-v3-{episodes}-mujoco{mujoco}.hdf5"
    if not os.path.exists(path):
        writable(path.parent, "PROCO_CACHE")
        driven = in_parallel(collect_episode, [(name, seed) for seed in range(episodes)])
        parts = list(tqdm(driven, f"1 data: demonstrating {name}", episodes))
        with whole(path) as buffer, h5py.File(buffer, "w") as file:
            for key in KEYS:
                file[key] = np.concatenate([episode[key] for episode in parts])
    return path


def find_data(cfg):
    """Where the data of a run are: (source, path). # FORK: another source of data goes here."""
    if cfg.data not in ("auto", "dsrl", "demonstrator"):
        return "file", Path(os.path.expanduser(cfg.data))
    make = get_task(cfg.task).make
    stock = isinstance(make, str) or make is DoubleIntegrator
    demonstrated = stock and any(kind in cfg.task for kind in DEMONSTRATED)
    if cfg.data == "dsrl" or (cfg.data == "auto" and cfg.task != "DoubleIntegrator"):
        try:
            return "dsrl", fetch_dsrl(cfg.task)
        except ProcoError as error:
            if cfg.data == "dsrl" or not demonstrated:
                raise
            warn(f"{error}. So the scripted demonstrator makes the data")
    if not demonstrated:
        raise ProcoError(f"{cfg.task} has no demonstrator; give --data dsrl, or a file")
    if cfg.eval_seed < cfg.driver_episodes:
        warn(f"evaluation from episode {cfg.eval_seed} on drives layouts that the data show")
    return "demonstrator", demonstrate(cfg.task, cfg.driver_episodes)


def read_fields(path, task):
    """The fields of a file like DSRL's, {key: (B, .)}. Raises ProcoError, which names a bad one."""
    fields = {}
    try:
        Path(path).open("rb").close()  # what the system refuses, it refuses here
        with h5py.File(path, "r", locking=False) as file:
            for key in KEYS:
                data = file.get(key)
                if not getattr(data, "shape", None) or data.dtype.kind not in "biuf":
                    raise ProcoError(f"{path} has no array of numbers {key!r}; needed are {KEYS}")
                fields[key] = data[()].astype(np.float32)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is cut off, damaged or no HDF5; delete it"
        raise ProcoError(f"can't read {path}: {reason}, or give another file") from None
    widths = [(task.obs_dim,), (task.obs_dim,), (task.act_dim,), (), (), (), ()]
    limits = {"actions": (-1.001, 1.001), "costs": (0, 1e30), "terminals": (0, 1)}
    for (key, field), width in zip(fields.items(), widths):
        shape = (*fields["observations"].shape[:1], *width)
        if field.shape != shape:
            raise ProcoError(f"{key} in {path} is {field.shape}, not {shape}")
        low, high = limits.get(key, (-1e30, 1e30))
        if not ((low <= field) & (field <= high)).all():
            raise ProcoError(f"{key} in {path} holds NaN or what is not in [{low:g}, {high:g}]")
    return fields


def load_data(path, task, max_episode_cost=0.0):
    """The safe whole episodes of a file like DSRL's -> arrays {key: (B, .)}, with their episode,
    and facts. Raises ProcoError, which says what is wrong."""
    fields = read_fields(path, task)
    ends = np.flatnonzero(fields["terminals"] + fields["timeouts"])
    episode = np.searchsorted(ends, np.arange(len(fields["costs"])))
    safe = np.bincount(episode, fields["costs"], len(ends) + 1) <= max_episode_cost
    safe[len(ends) :] = False  # what follows the last end is no whole episode
    rows = np.flatnonzero(safe[episode])
    episode = np.unique(episode[rows], return_inverse=True)[1]
    length = max(16, task.repeat)
    if safe.sum() < 2 or len(rows) < 100 or np.bincount(episode).max() < length:
        found = f"{safe.sum()} of {len(ends)} episodes in {path}, {len(rows)} steps"
        need = f"2 episodes, one of {length} steps, 100 in all are needed; see --max-episode-cost"
        raise ProcoError(f"{found}, have at most {max_episode_cost:g} violations: too few, {need}")
    arrays = {key: field[rows] for key, field in fields.items()}
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values()))
    returns = np.bincount(episode, arrays["rewards"])
    facts = {"rows": len(rows), "hash": digest.hexdigest()[:16], "episodes": len(returns)}
    facts |= {"of_episodes": len(ends), "return_mean": returns.mean()}
    facts["unsafe_share"] = (arrays["costs"] > 0).mean()
    return arrays | {"episode": episode}, facts


def to_device(arrays, task, cost, device):
    """D as tensors: state, action, ..., episode; held_out, the last tenth of the episodes; and how
    far each s' is from danger, distance (B,), m or m/s."""
    episode = arrays["episode"]
    states = encode(arrays["observations"], task)
    following = encode(arrays["next_observations"], task)
    if task.lidars:
        _, first, count = np.unique(episode, return_index=True, return_counts=True)
        for t in range(1, count.max()):  # all episodes side by side
            rows = torch.as_tensor(first[count > t] + t)
            states[rows] = remember(states[rows], states[rows - 1], task)
        following = remember(following, states, task)
    # ASSUMED: all works with actions that the plant distinguishes. A network that sees thrusts
    # which all act alike takes 0.3 for gentle driving: CarButton1 cost 35 instead of 7.
    action = (arrays["actions"] / task.full).clip(-1, 1)
    data = {"state": states, "action": action, "next_state": following, "episode": episode}
    data |= {"reward": arrays["rewards"], "cost": arrays["costs"], "done": arrays["terminals"]}
    data["held_out"] = episode > episode[-1] - max(1, (episode[-1] + 1) // 10)
    data = {key: torch.as_tensor(value, device=device) for key, value in data.items()}
    parts = zip(*(data[key].split(65_536) for key in ("state", "action", "next_state")))
    data["distance"] = torch.cat([danger_distance(cost, task, *part) for part in parts])
    alarms = ((data["distance"] == 0) & (data["cost"] == 0)).float().mean()
    if alarms > 0.05:
        warn(f"the predicate calls {alarms:.0%} of the steps unsafe that are recorded as safe")
    return data


def decisions(data, task, gamma, margin=None):
    """D in decisions, all stretches of k = task.repeat steps within an episode -> {key: (B, .)};
    the cost (B, k) of their steps: with a margin the predicate's at the recorded s' (by `distance`,
    so up to 1/256 short of it), else as recorded. # ASSUMED: the action is their mean."""
    k = task.repeat
    episode = data["episode"]
    first = (episode[k - 1 :] == episode[: len(episode) - k + 1]).nonzero()[:, 0]
    steps = torch.arange(k, device=first.device)
    rows = first[:, None] + steps  # (B, k)
    unsafe = data["cost"][rows] > 0 if margin is None else data["distance"][rows] <= margin
    table = {"state": data["state"][first], "next_state": data["next_state"][rows[:, -1]]}
    table |= {"action": data["action"][rows].mean(1), "done": data["done"][rows].amax(1)}
    table |= {"reward": (gamma**steps * data["reward"][rows]).sum(1), "cost": unsafe.float()}
    return table


# ==== 2. Dynamics: a probabilistic ensemble =======================================================
# Members differ in first weights and order of the data; where they disagree a roll-out ends.


class Mlp(nn.Module):
    """E networks of one shape as one batched product: x (B, I) or (E, B, I) -> (E, B, outputs)."""

    def __init__(self, inputs, hidden, outputs, members=1):
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for n, m in zip([inputs, hidden, hidden], [hidden, hidden, outputs]):
            bound = 1 / math.sqrt(n)  # the usual uniform initialisation
            self.weights.append(torch.empty(members, m, n).uniform_(-bound, bound))
            self.biases.append(torch.empty(members, m, 1).uniform_(-bound, bound))

    def forward(self, x, members=None):
        x = x.mT  # the batch last: products of few rows are fast, of few columns slow
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            if members is not None:  # a slice of all would be copied back in each backward pass
                weight = weight[members]
                bias = bias[members]
            x = x.relu_() if n else x.expand(len(weight), *x.shape[-2:])
            x = torch.baddbmm(bias, weight, x)  # (E, out, B)
        return x.mT


class Dynamics(nn.Module):
    """p_i(own' | own, a) = N(own + mu_i, sigma_i^2), E members (PETS, Chua et al. 2018), for own
    fields (B, W). Things at rest are moved by own_motion. # ASSUMED: no contact forces.
    # DEVIATION: PETS samples; we step by the mean, sigma_i serves the loss alone."""

    def __init__(self, task, cfg):
        super().__init__()
        self.task = task
        width = task.own_dim
        self.net = Mlp(width + task.act_dim, cfg.hidden // 2, 2 * width, cfg.ensemble)
        for name in ("mean", "std", "change", "low", "high"):
            self.register_buffer(name, torch.ones(width))
        self.register_buffer("elites", torch.arange(max(1, round(cfg.ensemble * 2 / 3))))
        self.register_buffer("limit", torch.tensor(math.inf))
        self.register_buffer("closest", torch.zeros(len(task.lidars), BINS))

    def forward(self, own, action, members=None):
        """own (B, W), action (B, A) -> mean, log-variance (E, B, W) of its standardised change."""
        x = torch.cat([(own - self.mean) / self.std, action.expand(*own.shape[:-1], -1)], -1)
        mean, spread = self.net(x, members).chunk(2, -1)
        return mean, -12 + F.softplus(14 - F.softplus(2 - spread))  # smoothly into about [-12, 2]

    @torch.no_grad()
    def step(self, state, action, steps=1, members=None):
        """Mean states after so many steps of one held action: (B, S), (B, A) -> (elites, B, S)."""
        task = self.task
        members = self.elites if members is None else members
        own, z = split(state, task)  # (B, W), (B, N); with members they become (E, B, .)
        # Places with nothing in them stay at (reach, 0); but an aim is remembered.
        hidden = z.abs() > 0.999 * task.reach.to(z.device)
        hidden[..., task.aims] = False
        unseen = z
        for _ in range(steps):
            before = own
            own = own + self.change * self(own, action, members)[0]
            own = own.clamp(self.low, self.high)  # a roll-out must not invent speeds
            if task.lidars:
                spin, way = own_motion(before, own, task)
                z = (z - way[..., None]) * spin[..., None]
            if task.moving:
                velocity = torch.complex(own[..., -3], own[..., -2])
                z[..., task.things("gremlins")] += task.dt * velocity[..., None]
        return join(own, torch.where(hidden, unseen, z), task) if task.lidars else own

    def best(self, state, action, steps=1):
        """step of the best elite alone: (B, S), (B, A) -> (B, S)."""
        return self.step(state, action, steps, self.elites[:1])[0]

    def foreseen(self, state):
        """Whether the model can say what comes next: (..., S) -> (...) bool. It can't where a goal
        has just been reached and jumps elsewhere: then it is nearer than any in D on that side."""
        z = split(state, self.task)[1][..., self.task.nearest]
        return (z.abs() >= self.closest[torch.arange(z.shape[-1]), sector(z)[0]]).all(-1)

    def disagreement(self, states):
        """How far apart the elites' own fields lie, in usual changes: (elites, B, S) -> (B,)."""
        return (states[..., : self.task.own_dim].std(0, correction=0) / self.change).amax(-1)


def jumped(state, following, task, steps=1):
    """Whether the nearest thing of a kind moved faster than any can: (B, S), (B, S) -> (B, K)."""
    here = split(state, task)[1][..., task.nearest].abs()
    there = split(following, task)[1][..., task.nearest].abs()
    seen = here < 0.99 * max([lidar.reach for lidar in task.lidars], default=0)
    return seen & ((here - there).abs() > 0.05 * steps)


def redrawn_within(state, following, task):
    """How near D's things come before they jump to a new place, as reached ones do, less 1 cm:
    (K, 16), m, for each kind and side (a side with few jumps: for all sides; a Car presses a button
    at 0.21 to 0.31 m); 0 for kinds that don't jump."""
    z = split(state, task)[1][..., task.nearest]  # (B, K)
    jump = jumped(state, following, task)
    closest = torch.zeros(z.shape[-1], BINS, device=z.device)
    for kind, (gap, side) in enumerate(zip(z.abs().mT, sector(z)[0].mT)):
        if (jump[:, kind] & (gap < gap.min() + 0.05)).float().mean() < 1e-4:
            continue
        closest[kind] = gap.min()
        for n in range(BINS):
            if (jump[:, kind] & (side == n) & (gap < gap.min() + 0.15)).sum() >= 5:
                closest[kind, n] = gap[side == n].min()
    return (closest - 0.01).clamp(min=0)  # what stands at that very distance was not redrawn yet


def dynamics_loss(model, own, action, following):
    """Loss and mean absolute error of each member: (B, .) or (E, B, .) -> (E,), (E,). beta-NLL
    (Seitzer et al. 2022, beta = 1/2): noisy fields neither drown the rest nor are ignored."""
    mean, spread = model(own, action)
    error = (following - own) / model.change - mean
    nll = error.square() * (-spread).exp() + spread
    return (nll * (spread / 2).exp().detach()).mean((1, 2)), error.abs().mean((1, 2))


def train_dynamics(data, task, cfg, generator):
    """Fits the ensemble; the held-out episodes choose the elites -> Dynamics. # DEVIATION: no early
    stopping; a rate that falls, in the end to a twentieth, does as well."""
    device = data["state"].device
    shuffle = functools.partial(torch.randperm, generator=generator, device=device)
    model = Dynamics(task, cfg).to(device)
    own, following = (data[key][:, : task.own_dim] for key in ("state", "next_state"))
    model.mean = own.mean(0)
    model.std = own.std(0).clamp(min=1e-5)  # of constant fields, too
    model.change = (following - own).std(0).clamp(min=1e-6)
    # ASSUMED: a roll-out may leave the record by half its range. With a twentieth, the double
    # integrator's model braked at speeds above the recorded as if they were recorded.
    low, high = own.aminmax(dim=0)
    model.low = low - 0.5 * (high - low)
    model.high = high + 0.5 * (high - low)
    model.closest = redrawn_within(data["state"], data["next_state"], task)
    train, test = (rows.nonzero()[:, 0] for rows in (~data["held_out"], data["held_out"]))
    test = test[shuffle(len(test))[:8192]]
    fields = (own, data["action"], following)
    optimiser = adam(model.net.parameters(), 2e-2)  # so high that 20 epochs do what 40 do at 3e-3
    epochs = max(1, round(cfg.model_epochs * cfg.scale))
    for epoch in tqdm(range(epochs), "2 dynamics"):
        order = torch.stack([shuffle(len(train)) for _ in range(cfg.ensemble)])  # (E, B)
        for rows in train[order].split(512, 1):
            loss, _ = dynamics_loss(model, *(field[rows] for field in fields))
            descend(optimiser, loss.sum(), 1 - epoch / epochs)
    model.requires_grad_(False)
    _, error = dynamics_loss(model, *(field[test] for field in fields))
    model.elites = error.argsort()[: len(model.elites)]
    # ASSUMED: believed up to three times the 99% quantile on held-out steps, at least 0.5.
    usual = model.disagreement(model.step(data["state"][test], data["action"][test]))
    model.limit = (3 * usual.quantile(0.99)).clamp(min=0.5)
    return model


@torch.no_grad()
def dynamics_report(model, data):
    """Prints and returns how wrong the best elite is on held-out episodes (they chose it), {block:
    {"r2" of a step's change, "error" after 1, 5, 10, 15 steps, root mean square, "nothing_changes":
    the start's}}: of the nearest thing's distance, m; of sensors, in usual changes of a step."""
    task = model.task

    def blocks(state):
        own, z = split(state, task)
        parts = {"sensors": own[..., : len(task.sensors)] / model.change[: len(task.sensors)]}
        return parts | {lidar.name: z[:, [n]].abs() for lidar, n in zip(task.lidars, task.nearest)}

    within = data["held_out"][:-15] & (data["episode"][:-15] == data["episode"][15:])
    rows = within.nonzero()[::7, 0]
    if not len(rows):
        warn("no held-out episode has 16 steps: nothing says how wrong the model is")
    state = data["state"][rows]
    start = blocks(state)
    report = {name: {"r2": None, "error": [], "nothing_changes": []} for name in start}
    for k in range(1, 16):
        state = model.best(state, data["action"][rows + k - 1])
        if k not in (1, 5, 10, 15):
            continue
        true = blocks(data["next_state"][rows + k - 1])
        for name, guess in blocks(state).items():
            still = start[name] - true[name]
            # A nearest thing that is suddenly farther or nearer is another one.
            same = (still.abs() < 0.06 * k).all(-1) | (name == "sensors")
            wrong = (guess - true[name])[same].square().mean()
            still = still[same].square().mean()
            report[name]["r2"] = float(1 - wrong / still) if k == 1 else report[name]["r2"]
            report[name]["error"].append(float(wrong.sqrt()))
            report[name]["nothing_changes"].append(float(still.sqrt()))
    print("   block              R^2 of a step | error after 1, 5, 10, 15 steps | nothing changes")
    for name, row in report.items():
        error, still = (" ".join(map("{:.4f}".format, row[key])) for key in list(row)[1:])
        print(f"   {name:<18} {row['r2']:13.4f} | {error:>31} | {still}")
    return report


# ==== 3. Cost: a predicate written by a language model ============================================
# A language model has turned words (llm_costs/PROMPT.md with what is known of the task) into Python
# code, llm_costs/<task>.py; llm_costs/write.py has another one written, score.py judges it. The
# code reads observations, so it can judge states that the model invents.


def load_cost(task, path=None, text=None):
    """A task's predicate, from path, llm_costs/ or its text: cost(obs (..., O), action (..., A),
    next_obs (..., O), margin=0.0) -> (...) of 0. and 1.; margin widens danger, m or m/s.
    # FORK: a cost of your own."""
    sizes = get_task(task)
    places = [HERE / "llm_costs" / f"{task}.py", HERE / f"{task}.py"]
    places = [Path(os.path.expanduser(path))] if path else places
    found = next((place for place in places if os.path.isfile(place)), None)
    if not found and text is None:
        hint = f"write one with `python -m llm_costs.write --task {task}`, or give --cost FILE"
        raise CostError(f"there is no predicate {places[0]}: {hint}")
    scope = {"torch": torch, "math": math}
    try:
        text = found.read_text("utf-8-sig") if text is None else text
        exec(compile(text, str(found), "exec"), scope)  # noqa: S102 (reviewed code)
        cost = scope["cost"]
        obs = torch.rand(8, sizes.obs_dim)
        answer = cost(obs, torch.zeros(8, sizes.act_dim), obs, torch.full((8,), 0.1))
        numbers = answer.is_floating_point() and set(answer.tolist()) <= {0, 1}
        if answer.shape != (8,) or not numbers:
            raise ValueError("it does not answer 0. or 1. for each row of a batch")
    except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever a predicate raises)
        raise CostError(f"the predicate {found} fails: {type(error).__name__}: {error}") from None
    cost.text = text
    cost.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cost


@torch.no_grad()
def judge(cost, task, state, action, following, margin):
    """A predicate on states: (..., S), decided actions (..., A), (..., S) -> (...) of 0. and 1."""
    action = action * torch.as_tensor(task.full, device=action.device)  # as the simulator gets it
    return cost(decode(state, task), action, decode(following, task), margin)


def conservative_cost(agent, state, action, following):
    """c^(s, a) = max over elites of cost(s, a, s'_i, margin): (B, S), (B, A), (E, B, S) -> (B,)."""
    state, action = (x.expand(*following.shape[:-1], -1) for x in (state, action))
    return judge(agent.cost, agent.task, state, action, following, agent.margin).amax(0)


def danger_distance(cost, task, state, action, following):
    """Distance of s' to danger (B,), m or m/s: the least margin that makes it unsafe, rounded up to
    1/256; at most 1."""
    distance = torch.ones_like(following[..., 0])
    for n in range(1, 9):  # bisection
        nearer = distance - 0.5**n
        unsafe = judge(cost, task, state, action, following, nearer) > 0
        distance = torch.where(unsafe, nearer, distance)
    inside = judge(cost, task, state, action, following, 0.0) > 0
    return torch.where(inside, 0, distance)


def model_margin(model, cost, data):
    """The margin of the conservative cost: 99% of the model's errors in the distance to danger are
    less, one step ahead on held-out steps near it. # ASSUMED: 99%; with lidars at least 2 cm, which
    decided in all our runs."""
    task = model.task
    jump = jumped(data["state"], data["next_state"], task).any(-1)
    rows = (data["held_out"] & (data["distance"] < 0.5) & ~jump).nonzero()[:20_000, 0]
    state, action, distance = (data[key][rows] for key in ("state", "action", "distance"))
    if not len(rows):
        warn("no held-out step is within 0.5 of danger: the margin is 0.05, not measured")
        return 0.05
    guess = model.best(state, action)
    error = (danger_distance(cost, task, state, action, guess) - distance).abs()
    return min(max(float(error.quantile(0.99)), 0.02 if task.lidars else 0.0), 0.99)


# ==== The agent: what steps 5 and 6 learn, and 4 and 7 ask ========================================


def around(proposal, task, levels=(-1.0, 0.0, 1.0)):
    """A fixed list of actions, the proposal first: (B, A) -> (M, B, A). Then, of up to two, the
    grid of levels, without 0 where all forces are clamped; of more, one changed by 0.5."""
    if task.act_dim > 2:
        change = 0.5 * torch.eye(task.act_dim, device=proposal.device)
        grid = (proposal + torch.cat([change, -change])[:, None]).clamp(-1, 1)  # (2 A, B, A)
    else:
        levels = (-1.0, 1.0) if (task.full < 1).all() else levels
        axis = torch.tensor(levels, device=proposal.device)
        grid = torch.cartesian_prod(*[axis] * task.act_dim).view(-1, 1, task.act_dim)
    return torch.cat([proposal[None], grid.expand(-1, *proposal.shape)])


class Agent(nn.Module):
    """All that a run learns, and how it acts. Networks see features(state)."""

    def __init__(self, task, cfg, model=None, cost=None, margin=0.0):
        super().__init__()
        self.task = task
        self.cfg = cfg
        self.eps = cfg.eps
        self.model = model
        self.cost = cost
        self.margin = margin
        self.register_buffer("mean", torch.zeros(task.own_dim))  # of own fields in D
        self.register_buffer("std", torch.ones(task.own_dim))
        self.register_buffer("log_lam", torch.tensor(math.log(10.0)))  # of the multiplier
        self.register_buffer("clone_error", torch.ones(task.act_dim))  # mean (in_full - a)^2 on D
        self.register_buffer("q_scale", torch.tensor(1.0))  # |Q_r|: its mean on a batch of D
        self.register_buffer("reached", torch.tensor(0.0))  # what reaching a goal is worth
        width = self.features(torch.zeros(1, task.state_dim)).shape[-1]
        both = width + task.act_dim
        self.actor = Mlp(width, cfg.hidden, task.act_dim)  # a = tanh(net(x))
        self.clone = copy.deepcopy(self.actor)  # the cloned policy, where the actor begins
        self.q_r = Mlp(both, cfg.hidden, 1, 2)  # twin reward critics
        self.q_r_slow = copy.deepcopy(self.q_r).requires_grad_(False)  # for targets
        self.q_s = Mlp(both, cfg.hidden, 2, 2)  # twins of (Q_f, Q_c), whose targets are in [0, 1]
        self.v_s = Mlp(width, cfg.hidden, 2)  # the least an action makes of them

    def features(self, state):
        """What networks see: (..., S) -> (..., F), with each thing's distance and nearness."""
        own, z = split(state, self.task)
        if self.task.moving:  # the goal's own button is no danger: it is moved out of sight
            buttons = z[..., self.task.things("buttons")]
            goal = (buttons - z[..., self.task.things("goal")]).abs() < 0.2
            z[..., self.task.things("buttons")] = torch.where(goal, 3.0, buttons)
        near = 8 * torch.exp(-10 * z.abs())
        parts = [(own - self.mean) / self.std, torch.view_as_real(z).flatten(-2), z.abs(), near]
        if self.task.things("circle"):  # the compass turns what is seen into the world
            place = 2 * z[..., 0] * torch.complex(own[..., 4], own[..., 3])
            parts.append(torch.view_as_real(place))
        return torch.cat(parts, -1)

    def propose(self, x):
        """The bare actor: x (B, F) -> (B, A) in [-1, 1]."""
        return torch.tanh(self.actor(x)[0])

    def imitate(self, x):
        """The cloned policy: x (B, F) -> (B, A) in [-1, 1]."""
        return torch.tanh(self.clone(x)[0])

    def worth(self, x, action):
        """The lesser of the twins' Q_r: x (B, F), action (B, A) -> (B,)."""
        return self.q_r(torch.cat([x, action], -1)).amin(0)[:, 0]

    def danger(self, x, actions):
        """The worse of the twins' Q_f and Q_c: x (B, F), actions (..., B, A) -> (..., B, 2)."""
        inputs = torch.cat([x.expand(*actions.shape[:-1], -1), actions], -1)
        return self.q_s(inputs.flatten(0, -2)).amax(0).unflatten(0, inputs.shape[:-1])

    @torch.inference_mode()
    def feasibility(self, state):
        """V_f of states: (B, S) -> array (B,) in [0, 1]; feasible where it is <= self.eps."""
        state = torch.as_tensor(state, device=self.mean.device)
        return self.v_s(self.features(state))[0, :, 0].clamp(0, 1).cpu().numpy()

    def candidates(self, x):
        """The actions that acting chooses from, a fixed list: x (B, F) -> (M, B, A)."""
        return torch.cat([around(self.propose(x), self.task), self.imitate(x)[None]])

    def filter(self, x):
        """Of the candidates the nearest to the proposal with Q_f <= eps, else the least Q_c."""
        choice = self.candidates(x)
        q_f, q_c = self.danger(x, choice).unbind(-1)  # (M, B)
        away = (choice - self.propose(x)).square().sum(-1)
        away = torch.where(q_f <= self.eps, away, math.inf)
        best = torch.where(away.amin(0) < math.inf, away.argmin(0), q_c.argmin(0))
        return choice[best, torch.arange(len(best))]

    def start(self, seeds, acting="auto"):
        """A Policy for as many episodes; acting is "auto" or one of `ways` (step 7). The seeds are
        for a fork whose policy is random."""
        return Policy(self, acting)


# ==== 4. Counterfactual roll-outs: what did not happen ============================================
# Steps 2 and 3 make what D lacks. A violation is an unsafe sample; the steps before it that no
# action could have saved are infeasible ones, which look harmless: step 5 tells.

ROUNDS = 6  # of roll-outs, spread over the training
LINGER = 20  # steps that a roll-out goes on after its first violation, so that leaving is learnt


def draw_starts(states, model, count, generator):
    """Where roll-outs begin (count, S): recorded states; every second one where nobody ever was.
    # ASSUMED: with lidars, the scene from up to 0.5 m beside, at a share of another row's motion,
    as safe drivers are never slow near a hazard; without, limited fields from the model's range."""
    task = model.task
    uniform = functools.partial(torch.rand, generator=generator, device=states.device)
    starts = states[torch.randint(len(states), (count,), generator=generator, device=states.device)]
    own, z = split(starts[::2], task)
    if task.lidars:
        shift = torch.polar(0.5 * uniform(len(z), 1).sqrt(), 2 * math.pi * uniform(len(z), 1))
        seen = z.abs() < 0.999 * task.reach.to(z.device)
        motion = own.roll(1, 0)[:, :3] * uniform(len(z), 1)  # velocity x, y and yaw rate
        own = torch.cat([motion, own[:, 3:]], -1)
        starts[::2] = join(own, torch.where(seen, z + shift, z), task)
    else:
        drawn = model.low + (model.high - model.low) * uniform(own.shape)
        starts[::2, list(task.limited)] = drawn[:, list(task.limited)]
    return starts


def behave(agent, state, held, noise):
    """What roll-outs do: state (B, S), held, noise (B, A) -> action (B, A). Half of them follow the
    filtered policy with noise, half do what is held, random actions. # FORK: or else."""
    half = len(state) // 2
    policy = agent.filter(agent.features(state[:half])) + noise[:half]
    return torch.cat([policy, held[half:]]).clamp(-1, 1)


@torch.no_grad()
def roll_out(agent, state, generator):
    """D_cf: drives the model from states (B, S) -> {state, action, next_state, cost (B, k), ...}.
    A row ends LINGER steps after its first violation, where elites disagree, an episode ends or a
    goal is redrawn. # DEVIATION: by one elite's mean; noise makes the nearest look too near."""
    task = agent.task
    model = agent.model
    shape = (len(state), task.act_dim)
    uniform = functools.partial(torch.rand, generator=generator, device=state.device)
    held = 2 * uniform(shape) - 1
    alive = torch.ones(len(state), dtype=torch.bool, device=state.device)
    since = torch.zeros(len(state), device=state.device)  # steps since the first violation
    table = []
    for _ in range(max(1, agent.cfg.horizon // task.repeat)):
        renew = uniform(len(state), 1) < 0.15  # rarely: held actions must not average out
        held = torch.where(renew, 2 * uniform(shape) - 1, held)
        noise = 0.3 * torch.randn(shape, generator=generator, device=held.device)
        action = behave(agent, state, held, noise)
        begin = state
        over = torch.zeros_like(alive)
        costs = []
        for _ in range(task.repeat):
            nexts = model.step(state, action)  # (E, B, S)
            costs.append(conservative_cost(agent, state, action, nexts) * ~over)
            state = nexts[0]
            alive = alive & (model.disagreement(nexts) <= model.limit) & model.foreseen(state)
            over = over | ended(state, task)
        costs = torch.stack(costs, -1)  # (B, k)
        table.append((begin, action, state, costs, over.float(), alive))
        since = since + task.repeat * ((since > 0) | (costs > 0).any(-1))
        alive = alive & ~over & (since <= LINGER)
    *columns, known = (torch.stack(column) for column in zip(*table))  # (H / k, B, .)
    names = ("state", "action", "next_state", "cost", "done")
    return {name: column[known] for name, column in zip(names, columns)}


# ==== 5. Feasibility: which states and actions still allow safety =================================
# V_f(s) = gamma_f^n if even the safest policy violates after n safe steps, 0 if some policy never
# violates. A state is called feasible where V_f <= eps: 0.97^n <= 0.5 is more than 22 steps ahead
# (0.44 s of a Point, 0.88 s of a Car). Q_c and V_c, the discounted share of unsafe steps ahead,
# still differ where Q_f is 1, so they show the way back.


def feasibility_loss(agent, rows):
    """How far Q_f, Q_c and V are from what they should be, on D and D_cf. # FORK: or others.

        V(s')     <- min of Q(s', a') over a' = pi(s') and corners of the action box (or, of more
                     than two numbers, pi(s') with one of them changed by 0.5)
        Q_f(s, a) <- max(max_j gamma_f^j c^_j, gamma_f^k (1 - end) V_f(s'))
        Q_c(s, a) <- (1 - gamma_f) sum_j gamma_f^j c^_j + gamma_f^k (1 - end) V_c(s')

    (Fisac et al. 2019; Zheng et al. 2024.) # DEVIATION: FISOR's V is a low expectile over actions
    in the data; D_cf holds all kinds of them, so Q is known over the box. Targets ask Q itself, not
    a slow copy. Outputs are linear and targets clamped to [0, 1]: a sigmoid hardly ever rises."""
    gamma_f = agent.cfg.gamma_f
    with torch.no_grad():
        k = rows["cost"].shape[-1]
        cost = gamma_f ** torch.arange(k, device=rows["cost"].device) * rows["cost"]
        corners = around(agent.propose(rows["next_x"]), agent.task, (-1.0, 1.0))  # (M, B, A)
        least = agent.danger(rows["next_x"], corners).amin(0).clamp(0, 1)  # (B, 2)
        later = gamma_f**k * (1 - rows["done"][:, None]) * least  # what has ended violates nothing
        q_f = torch.maximum(cost.amax(-1), later[:, 0])
        q_c = (1 - gamma_f) * cost.sum(-1) + later[:, 1]
        target = torch.stack([q_f, q_c], -1)
    q = agent.q_s(torch.cat([rows["x"], rows["action"]], -1))  # (2, B, 2)
    v = agent.v_s(rows["next_x"])[0]  # ASSUMED: at s' alone, where the least is computed anyway
    return 2 * (q - target).square().mean() + (v - least).square().mean()


# ==== 6. Policy: an offline algorithm, on D and, with PROCO, on D_cf ==============================
# All algorithms share networks, D, decisions, number of updates and rates; those that know safety
# one safety critic (DEVIATION: CPQ, too). They differ in the actor's loss, CPQ in its critics' too.
# PROCO's updates see D_cf beside D, so the actor has twice the rows.

CPQ_LIMIT = 0.1  # ASSUMED: Q_c above which CPQ calls an action unsafe


def with_counterfactuals(agent, rows, cf):
    """Rows of D and, after them, of D_cf, on which an algorithm trains with PROCO. In D_cf nobody
    drove: the action to clone is the cloned policy's, and trusted half as much.
    # ASSUMED: else the actor follows Q_r's errors, and PointCircle1 fell from 48 to 32."""
    cf["x"] = agent.features(cf["state"])
    cf["next_x"] = agent.features(cf["next_state"])
    cf["driver"] = agent.imitate(cf["x"]).detach()
    cf["trust"] = torch.full_like(cf["done"], 0.5)
    return {key: torch.cat([rows[key], cf[key]]) for key in rows if key in cf}


def reward_critic_loss(agent, d, generator):
    """TD3's twin critics (Fujimoto et al. 2018) on rows of D, with smoothed target actions; CPQ
    counts what follows only where the actor's Q_c there is within its limit (Xu et al. 2022).
    # DEVIATION: the actor has no slow copy, since cloning holds it still."""
    gamma = agent.cfg.gamma**agent.task.repeat
    with torch.no_grad():
        proposal = agent.propose(d["next_x"])
        noise = 0.2 * torch.randn(proposal.shape, generator=generator, device=proposal.device)
        following = (proposal + noise.clamp(-0.5, 0.5)).clamp(-1, 1)
        worth = agent.q_r_slow(torch.cat([d["next_x"], following], -1)).amin(0)[:, 0]
        if agent.cfg.algorithm == "cpq":
            worth = worth * (agent.danger(d["next_x"], proposal)[:, 1] <= CPQ_LIMIT)
        target = d["reward"] + gamma * (1 - d["done"]) * worth
        # What a decision is worth that reaches a goal, which is then redrawn: a plan ends there.
        gap = (target - agent.reached) * d["anew"]
        agent.reached += 0.01 * gap.sum() / d["anew"].sum().clamp(min=1)
    q_r = agent.q_r(torch.cat([d["x"], d["action"]], -1))[..., 0]  # (2, B)
    return 2 * (q_r - target).square().mean()


def actor_loss(agent, rows):
    """The actor's loss -> (loss, mean violation of the constraint). # FORK: an algorithm is a
    function of the actor's actions pi (B, A), the loss of TD3+BC (Fujimoto and Gu 2021), td3bc
    (B,), and its cloning term, cloning (B,)."""
    cfg = agent.cfg
    x = rows["x"]
    pi = agent.propose(x)
    cloning = rows["trust"] * (pi - rows["driver"]).square().mean(-1)
    if cfg.algorithm == "bc":
        return cloning.mean(), None
    q_r = agent.q_r(torch.cat([x, pi], -1), slice(1))[0, :, 0]  # the first twin's
    on_d = (rows["trust"] == 1).float()
    agent.q_scale.copy_((on_d @ q_r.detach().abs() / on_d.sum()).clamp(min=1e-6))
    td3bc = -q_r / agent.q_scale + 2 * cfg.bc_weight * cloning
    if cfg.algorithm == "td3bc":
        return td3bc.mean(), None
    if cfg.algorithm == "fisor":
        return fisor_loss(agent, rows, pi, cloning), None
    if cfg.algorithm == "cpq":
        return cpq_loss(agent, x, pi, td3bc, cloning), None
    return lagrangian_loss(agent, x, pi, td3bc)


def lagrangian_loss(agent, x, pi, td3bc):
    """Lagrangian TD3+BC -> (loss, mean violation); `update` raises lambda while that is too high.

        feasible states:    -Q_r / |Q_r| + 2 bc_weight (pi - a)^2 + lambda max(Q_f(s, pi) - eps, 0)
        infeasible states:  20 Q_c(s, pi), the way back

    a: the driver's action; in D_cf the clone's, and its term counts half.
    # ASSUMED: the constraint is a hinge. With Q_f - eps itself the many states that satisfy it
    pay for the few that break it, and lambda fell to zero."""
    q_f, q_c = agent.danger(x, pi).unbind(-1)
    feasible = agent.v_s(x)[0, :, 0].detach() <= agent.eps
    violation = (q_f - agent.eps).clamp(min=0)
    loss = torch.where(feasible, td3bc + agent.log_lam.exp() * violation, 20 * q_c).mean()
    return loss, (violation.detach() * feasible).sum() / feasible.sum().clamp(min=1)


def fisor_loss(agent, rows, pi, cloning):
    """FISOR (Zheng et al. 2024): regression on actions weighted by exp of their advantage.

        feasible:    trust exp(3 A_r) 1[Q_f(s, b) <= eps] (pi - b)^2
                     with A_r = (Q_r(b) - Q_r(pi)) / |Q_r|
        infeasible:  exp(20 (V_c(s) - Q_c(s, a))) (pi - a)^2

    a: the row's action; b: the driver's, in D_cf the clone's; weights are at most 20. # DEVIATION:
    a deterministic actor for a diffusion model, A_r against it for an expectile, Q_c for Q_f."""
    with torch.no_grad():
        x = rows["x"]
        better = (agent.worth(x, rows["driver"]) - agent.worth(x, pi)) / agent.q_scale
        allowed = agent.danger(x, rows["driver"])[:, 0] <= agent.eps
        v_f, v_c = agent.v_s(x)[0].unbind(-1)
        back = (20 * (v_c - agent.danger(x, rows["action"])[:, 1])).exp().clamp(max=20)
    forth = (3 * better).exp().clamp(max=20) * allowed * cloning
    back = back * (pi - rows["action"]).square().mean(-1)
    return torch.where(v_f <= agent.eps, forth, back).mean()


def cpq_loss(agent, x, pi, td3bc, cloning):
    """CPQ (Xu et al. 2022): reward only where Q_c(s, pi) is within the limit. # DEVIATION: with the
    cloning term of TD3+BC; without it a deterministic actor leaves the data at once."""
    allowed = agent.danger(x, pi)[:, 1].detach() <= CPQ_LIMIT
    return torch.where(allowed, td3bc, 2 * agent.cfg.bc_weight * cloning).mean()


def cpq_penalty(agent, d, generator):
    """CPQ pushes up Q_c of actions that nobody takes. # DEVIATION: it measures that by an
    auto-encoder, we by distance: drivers' actions in one place are nearer than 1, mean square."""
    action = torch.empty_like(d["action"]).uniform_(-1, 1, generator=generator)
    unusual = ((action - d["action"]).square().mean(-1) > 1).float()
    q_c = agent.q_s(torch.cat([d["x"], action], -1))[..., 1]  # (2, B)
    return 0.1 * (unusual * (1 - q_c).clamp(min=0)).mean()


# ==== 7. Acting: actor, filter or plan ============================================================

HOLD = (1, 3, 5, 8)  # decisions for which a plan holds its first action; then the actor drives
LOOK_AHEAD = 14  # decisions that a plan lasts; with 8, waiting moved danger behind the horizon
PRICE = 100.0  # of c and of d in a state of a plan (below), a tenth of it where V_f > eps


def ways(task, cfg):
    """The ways in which an agent can act, the default one last."""
    if not cfg.counterfactual:
        return ["actor", "filter"] if cfg.algorithm == "fisor" else ["actor"]
    if task.lidars:
        return ["clone", "actor", "filter", "plan"]
    # No plan without lidars: a robot that holds one action soon leaves the states in D. Nor is the
    # filter the default: one action that Q_f chooses can break a gait (Swimmer once: 15, not 26).
    return ["clone", "filter", "actor"]


def in_full(action, task):
    """Actions (B, A), with 1 or -1 for each force that the simulator clamps. A clone that averages
    left and right gives about 0; a plan that has to stay near 0 would stand still."""
    clamped = torch.as_tensor(task.full < 1, device=action.device)
    return torch.where(clamped, 1 - 2.0 * (action < 0), action)


@torch.no_grad()
def plan(agent, state):
    """The policy with look-ahead: state (B, S) -> (B, A), the first action of the plan with most

        sum over t of  gamma^kt (min(Q_r(s, a) - Q_r(s, pi), 0) / |Q_r| - plan_clone |a - clone|^2)
        - 100 * 0.9^t (c + d + 0.1 [V_f > eps])
        + gamma^kT Q_r(s_T, pi) / |Q_r|, or, where a goal is reached before, what that is worth

    |.|^2: the mean over A, in units of the clone's own error on D; clone: in_full; c: the predicate
    with the margin, d: with -2 cm, both where the best elite ends each decision.
    # DEVIATION: the abstract names no planner. But steering around a hazard is no smooth function
    of a state: our actors drove over it or stopped before it."""
    task = agent.task
    if task.moving:  # buttons that are off go on again, and nothing seen tells when
        state = state.index_fill(1, torch.tensor(task.own_dim - 1, device=state.device), 0)
    x = agent.features(state)
    choice = agent.candidates(x)  # (M, B, A)
    copies = len(HOLD) * len(choice)
    first = choice.flatten(0, 1).repeat(len(HOLD), 1)  # (P, A): a row a plan
    hold = torch.tensor(HOLD, device=x.device).repeat_interleave(len(first) // len(HOLD))[:, None]
    here = state.repeat(copies, 1)
    x = x.repeat(copies, 1)
    score = torch.zeros_like(x[:, 0])
    weight = torch.ones_like(score)
    for t in range(LOOK_AHEAD):
        proposal = agent.propose(x)
        action = torch.where(t < hold, first, proposal)
        away = (action - in_full(agent.imitate(x), task)).square() / agent.clone_error
        # Without this loss a plan that puts off its start for ever looks as good as the others.
        lost = (agent.worth(x, proposal) - agent.worth(x, action)).clamp(min=0)
        there = agent.model.best(here, action, task.repeat)
        going = agent.model.foreseen(there)  # else a goal is reached
        earned = torch.where(going, 0, agent.reached) - lost
        score = score + weight * (earned / agent.q_scale - agent.cfg.plan_clone * away.mean(-1))
        weight = weight * agent.cfg.gamma**task.repeat * going  # 0 behind a goal
        x = agent.features(there)
        unsafe = judge(agent.cost, task, here, action, there, agent.margin)
        # The model knows no contact: it would press on through a button that stands in its way.
        deep = judge(agent.cost, task, here, action, there, -0.02)
        infeasible = agent.v_s(x)[0, :, 0] > agent.eps
        score = score - PRICE * 0.9**t * (unsafe + deep + 0.1 * infeasible)
        here = there
    score = score + weight * agent.worth(x, agent.propose(x)) / agent.q_scale
    best = score.view(copies, -1).argmax(0) % len(choice)
    return choice[best, torch.arange(len(best))]


class Policy:
    """Who acts in a batch of episodes: remembers their last states and the decisions under way."""

    def __init__(self, agent, acting="auto"):
        known = ways(agent.task, agent.cfg)
        self.agent = agent
        self.acting = known[-1] if acting == "auto" else acting
        if self.acting not in known:
            raise ProcoError(f"this agent does not act by {acting}, but by {', '.join(known)}")
        self.last = None  # states a step ago
        self.age = 0  # steps driven so far

    @torch.inference_mode()
    def act(self, obs):
        """Actions for the next step of all episodes: obs (B, O) -> array (B, A) in [-1, 1].
        # DEVIATION: a decision lasts task.repeat steps (of the filter only while Q_f allows it):
        who decides anew at each step changes his mind, and PointGoal1 fell from 21 to 16."""
        agent = self.agent
        self.last = encode(np.asarray(obs, np.float32), agent.task, self.last)
        state = self.last.to(agent.mean.device)
        if self.age % agent.task.repeat == 0:
            self.decision = self.decide(state)
        elif self.acting == "filter":
            revise = agent.danger(agent.features(state), self.decision)[:, 0] > agent.eps
            if revise.any():
                self.decision[revise] = self.decide(state[revise])
        self.age += 1
        return self.decision.cpu().numpy() * agent.task.full

    def decide(self, state):
        """A decision for each state: (B, S) -> (B, A)."""
        agent = self.agent
        if self.acting == "plan":
            return plan(agent, state)
        by = {"clone": agent.imitate, "actor": agent.propose, "filter": agent.filter}
        return by[self.acting](agent.features(state))


# ==== 8. Training =================================================================================

Training = namedtuple("Training", "agent optimisers generator kept")  # kept: a dict of all else


def descend(optimiser, loss, share=1):
    """One step of an optimiser, at a share of its rate; the loss's other networks get nothing."""
    group = optimiser.param_groups[0]
    group["lr"] = share * optimiser.defaults["lr"]
    for param, gradient in zip(group["params"], torch.autograd.grad(loss, group["params"])):
        param.grad = gradient
    optimiser.step()


def draw(table, count, generator):
    """Rows of a table at random: {key: (B, .)} -> {key: (count, .)}."""
    some = next(iter(table.values()))
    chosen = torch.randint(len(some), (count,), generator=generator, device=some.device)
    return {key: column.index_select(0, chosen) for key, column in table.items()}


def update(agent, optimisers, d, cf, generator, share=1, reward=True, policy=True):
    """One update of the safety critics and, where asked, of Q_r and the actor -> its logs."""
    cfg = agent.cfg
    logs = {}
    rows_d = draw(d, cfg.batch, generator)
    rows = rows_d | {"driver": rows_d["action"], "trust": torch.ones_like(rows_d["done"])}
    if cf:
        rows = with_counterfactuals(agent, rows, draw(cf, cfg.batch, generator))
    # --- Safety critics: from half as many rows of D as of D_cf ---
    if "safety" in optimisers:
        start = cfg.batch // 2 if cf else 0
        loss = feasibility_loss(agent, {key: rows[key][start:] for key in rows})
        logs["feasibility_loss"] = loss.detach()
        if cfg.algorithm == "cpq":
            loss = loss + cpq_penalty(agent, rows_d, generator)
        descend(optimisers["safety"], loss, share)
    # --- Reward critics and their slow copy ---
    if reward and "q_r" in optimisers:
        loss = reward_critic_loss(agent, rows_d, generator)
        descend(optimisers["q_r"], loss, share)
        logs["reward_loss"] = loss.detach()
        with torch.no_grad():
            for slow, fast in zip(agent.q_r_slow.parameters(), agent.q_r.parameters()):
                slow.lerp_(fast, 0.02)
    # --- Actor and multiplier ---
    if policy:
        loss, violation = actor_loss(agent, rows)
        descend(optimisers["actor"], loss, share)
        logs["actor_loss"] = loss.detach()
        # --- Dual ascent: lambda, in [0.1, 100], rises while the violation is above 0.003 ---
        # With 0.0003 lambda rose to 100, and PointGoal1's actor cost 77 instead of 46.
        if violation is not None:
            agent.log_lam += 0.3 * (violation - 0.003).clamp(-0.003, 0.03)
            agent.log_lam.clamp_(math.log(0.1), math.log(100))
            infeasible = agent.v_s(rows_d["x"])[0, :, 0] > agent.eps
            logs |= {"lambda": agent.log_lam.exp(), "infeasible_share": infeasible.float().mean()}
    return logs


def begin_training(cfg, task, data, cost, saved=None):
    """A Training whose model is learnt and nothing else yet; or what a checkpoint saved."""
    torch.manual_seed(cfg.seed)  # of the first weights
    generator = torch.Generator(data["state"].device).manual_seed(cfg.seed)  # of all that is drawn
    clock = time.time()
    kept = {"report": {}, "seconds": {}, "step": 0, "cf": None, "metrics": [], "margin": 0.0}
    kept |= {"versions": versions(), "device": data["state"].device.type, "warnings": WARNINGS}
    model = Dynamics(task, cfg).requires_grad_(False) if cfg.counterfactual else None
    if cfg.counterfactual and not saved:
        model = train_dynamics(data, task, cfg, generator)
        kept["report"] = dynamics_report(model, data)
        kept["margin"] = cfg.margin if cfg.margin >= 0 else model_margin(model, cost, data)
        print(f"3 cost: margin of the conservative cost {kept['margin']:.4f}")
    kept["seconds"]["dynamics"] = time.time() - clock
    if saved:
        WARNINGS[:] = dict.fromkeys(saved["warnings"] + WARNINGS)
        if any(saved[key] != kept[key] for key in ("versions", "device")):
            warn(f"begun with {saved['versions']} on {saved['device']}: numbers differ a little")
        here = kept["versions"]
        kept = {key: saved[key] for key in kept} | {"warnings": WARNINGS}
        driving = ("mujoco", "gymnasium", "safety-gymnasium", "dsrl", "cores")
        kept["versions"] |= {key: here[key] for key in driving}  # which is done here
    agent = Agent(task, cfg, model, cost, kept["margin"]).to(data["state"].device)
    own = data["state"][:, : task.own_dim]
    agent.mean = own.mean(0)
    agent.std = own.std(0).clamp(min=1e-5)
    optimisers = {"clone": adam(agent.clone.parameters(), 1e-3)}
    optimisers["actor"] = adam(agent.actor.parameters(), 3e-4)
    if cfg.algorithm != "bc":
        optimisers["q_r"] = adam(agent.q_r.parameters(), 3e-4)
    if cfg.algorithm not in ("bc", "td3bc"):
        optimisers["safety"] = adam([*agent.q_s.parameters(), *agent.v_s.parameters()], 1e-3)
    if saved:
        agent.load_state_dict(saved["agent"])
        if saved["device"] == data["state"].device.type:
            generator.set_state(saved["generator"].cpu())
        for name, optimiser in optimisers.items():
            optimiser.load_state_dict(saved["optimisers"][name])
    return Training(agent, optimisers, generator, kept)


def save_training(training, identity, path):
    """A checkpoint: one dict of everything, networks and optimisers as they save themselves."""
    agent, optimisers, generator, kept = training
    saved = kept | {"agent": agent.state_dict(), "generator": generator.get_state()}
    saved["optimisers"] = {name: optimiser.state_dict() for name, optimiser in optimisers.items()}
    with whole(path) as file:
        torch.save(saved | {"identity": identity, "format": FORMAT}, file)


def add_round(cf, states, agent, generator):
    """A round of roll-outs with the present policy, added to D_cf."""
    count = max(20, round(agent.cfg.rollouts * agent.cfg.scale / ROUNDS))
    new = roll_out(agent, draw_starts(states, agent.model, count, generator), generator)
    if not len(new["state"]):
        raise ProcoError("no roll-out could be believed; the data are too few for a model of them")
    unsafe = (new["cost"] > 0).any(-1).float().mean()
    tqdm.write(f"4 roll-outs: {len(new['state'])} decisions, {unsafe:.1%} of them unsafe")
    return {key: torch.cat([cf[key], new[key]]) for key in new} if cf else new


def train(training, data, identity, path):
    """Steps 4 to 6, from where the training is to its end; now and then a checkpoint is written."""
    agent, optimisers, generator, kept = training
    cfg = agent.cfg
    # --- D as it is drawn ---
    d = decisions(data, agent.task, cfg.gamma, agent.margin if cfg.counterfactual else None)
    states = d.pop("state")
    following = d.pop("next_state")
    jump = jumped(states, following, agent.task, agent.task.repeat)
    redrawn = agent.model.closest.amax(-1) > 0 if agent.model else torch.zeros_like(jump)
    d["anew"] = (jump & redrawn).any(-1).float()  # whether a goal was reached
    d["x"] = agent.features(states)
    d["next_x"] = agent.features(following)
    d["reward"] = d["reward"] / d["reward"].std().clamp(min=1e-6)
    # --- Lengths, the same for every method: each actor gets as many updates, at the same rates ---
    parts = (cfg.clone_updates, cfg.feasibility_updates, cfg.updates)
    clone_end, before, rest = (max(1, round(part * cfg.scale)) for part in parts)
    total = clone_end + before + rest
    every = math.ceil((before + rest) / ROUNDS)
    began = time.time() - kept["seconds"].get("policy", 0)
    with tqdm(None, "4-6 policy", total, initial=kept["step"]) as bar:
        for step in range(kept["step"], total):
            if step < clone_end:
                rows = draw({"x": d["x"], "action": d["action"]}, cfg.batch, generator)
                loss = (agent.imitate(rows["x"]) - rows["action"]).square().mean()
                descend(optimisers["clone"], loss)
                logs = {"clone_loss": loss.detach()}
            else:
                if step == clone_end:
                    agent.actor.load_state_dict(agent.clone.state_dict())
                    error = in_full(agent.imitate(d["x"]).detach(), agent.task) - d["action"]
                    # ASSUMED: at least 0.04. Circle's drivers are so alike that the clone errs
                    # less; then each step aside costs so much that a plan waits for ever.
                    agent.clone_error = error.square().mean(0).clamp(min=0.04)
                if cfg.counterfactual and cfg.horizon and (step - clone_end) % every == 0:
                    kept["cf"] = add_round(kept["cf"], states, agent, generator)
                # Rates fall linearly over the last half of the time after cloning.
                share = min(1, 2 * (total - step) / (before + rest))
                even = step % 2 == 0
                policy = even and step >= clone_end + before
                logs = update(agent, optimisers, d, kept["cf"], generator, share, even, policy)
            kept["step"] = step + 1
            if step % 200 == 0 or step + 1 == total:
                logs = {key: float(value) for key, value in logs.items()}
                if not all(map(math.isfinite, logs.values())):
                    why = f"a loss is no longer finite at update {step + 1} ({logs})"
                    raise ProcoError(f"{why}: are the data odd? The last good checkpoint is kept")
                kept["metrics"].append({"step": step + 1} | logs)
                kept["seconds"]["policy"] = time.time() - began
                bar.update(step + 1 - bar.n)
                bar.set_postfix(logs)
            if step % 1000 == 0:  # only what has just been found finite
                save_training(training, identity, path)
    kept["cf"] = None  # large, and needed no more
    save_training(training, identity, path)


# ==== 9. The simulator, and evaluation in it ======================================================
# The last weights, never the best ones; the same episodes for every method and every way of acting.

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def import_simulator():
    """Safety-Gymnasium, made importable and faster; what it computes is equal to the last bit."""
    try:
        from mujoco import MjData
        from safety_gymnasium.assets.color import COLOR
    except ImportError as error:
        raise ProcoError(f"{error}: install safety-gymnasium as the README says") from None
    # since Python 3.11 dataclasses refuse defaults without a hash, and an array has none
    color = type("Color", (np.ndarray,), {"__hash__": object.__hash__})
    COLOR.update({name: rgba.view(color) for name, rgba in COLOR.items()})
    import safety_gymnasium.builder
    from safety_gymnasium import world
    from safety_gymnasium.assets.mocaps.gremlins import Gremlins

    # a flat sky: each reset decodes the six pictures of the stock one, for more than a second
    assets = world.yaml.safe_load(Path(world.BASE_DIR, "configs/assets.yaml").read_text("utf-8"))
    sky = {"@type": "skybox", "@builtin": "flat", "@width": "8", "@height": "8"}
    assets["textures"]["skybox"] = sky
    every_contact = MjData.contact.fget

    def load(file, Loader):
        return assets

    def contacts(data):  # without those with the floor (geom 0): most are, and no cost counts them
        pairs = every_contact(data)
        return [pairs[i] for i in np.flatnonzero(pairs.geom1 * pairs.geom2)]

    def move(gremlins):  # all alike, each about a place of its own
        data = gremlins.engine.data
        x = np.sin(data.time) * gremlins.travel
        data.mocap_pos[:] = x, np.cos(data.time) * gremlins.travel, gremlins.size

    world.yaml = SimpleNamespace(load=load, FullLoader=None)
    MjData.contact = property(contacts)
    Gremlins.move = move
    return safety_gymnasium


def make_env(name):
    """A new environment of a task. # FORK: one of your own has reset(seed=) -> (obs, info) and
    step(action) -> (obs, reward, cost, terminated, truncated, info)."""
    make = get_task(name).make
    if callable(make):
        return make()
    try:
        env = import_simulator().make(make)
    except ValueError:  # mujoco 3 reads no model in global coordinates
        raise ProcoError(f"mujoco can't load {make}; use mujoco 2.3.3, Python 3.11") from None
    if hasattr(env.unwrapped, "task"):  # it is slow to ask if each observation is in its space
        env.unwrapped.task.obs_info.obs_space_dict.contains = bool
    return env


def in_parallel(function, jobs):
    """function(job) for each job, in a process for each core -> results, in the jobs' order."""
    # Forked where that is safe: then a script that calls run() needs no __main__ guard.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    others = multiprocessing.active_children()  # of whoever uses this file as a library
    pool = ProcessPoolExecutor(min(CORES, len(jobs)), context, begin_worker)
    try:
        yield from pool.map(function, jobs)
    except BrokenProcessPool:
        why = "is there too little memory, or has your script no `if __name__ == '__main__':`?"
        raise ProcoError(f"a worker process ended by itself; {why}") from None
    finally:
        for child in set(multiprocessing.active_children()).difference(others):
            child.kill()
        pool.shutdown(cancel_futures=True)


def begin_worker():
    """Leaves Ctrl-C to the parent, and ends with it, whatever ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def drive(job):
    """Episodes side by side, so that the agent sees a batch: (checkpoint, task, predicate's text,
    way, seeds, show) -> rows {acting, seed, return, cost, length, path (T,) complex, unsafe}."""
    path, task, text, acting, seeds, show = job
    agent = load_run(path, cost=load_cost(task, text=text))
    policy = agent.start(seeds, acting)
    envs = [make_env(agent.task.name) for _ in seeds]
    stock = agent.task.lidars and isinstance(agent.task.make, str)  # it tells where the agent is
    obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])
    steps = [[] for _ in seeds]
    going = set(range(len(envs)))
    with tqdm(None, f"9 evaluation: {acting}", agent.task.steps, disable=not show) as bar:
        while going:
            actions = policy.act(obs)  # of those that have ended, too, which is simple
            bar.update()
            for n in sorted(going):
                obs[n], reward, cost, terminated, truncated, _ = envs[n].step(actions[n])
                at = envs[n].unwrapped.task.agent.pos[:2] if stock else (0, 0)
                steps[n].append((float(reward), float(cost), complex(*at), cost > 0))
                if terminated or truncated:
                    going.remove(n)
    rows = []
    for seed, episode in zip(seeds, steps):
        rewards, costs, path, unsafe = zip(*episode)
        row = {"acting": acting, "seed": seed, "return": sum(rewards), "cost": sum(costs)}
        rows.append(row | {"length": len(path), "path": path, "unsafe": unsafe})
    return rows


def evaluate(path, cfg, cost):
    """Drives the agent of a checkpoint, in each way or in one -> {way: its episodes, by seed}."""
    chosen = ways(get_task(cfg.task), cfg) if cfg.acting == "auto" else [cfg.acting]
    seeds = range(cfg.eval_seed, cfg.eval_seed + cfg.eval_episodes)
    shares = [seeds[n::CORES] for n in range(min(CORES, len(seeds)))]
    jobs = []
    for way in chosen:
        jobs += [(path, cfg.task, cost.text, way, share, share is shares[0]) for share in shares]
    driven = {way: [] for way in chosen}
    for row in sorted(itertools.chain(*in_parallel(drive, jobs)), key=itemgetter("seed")):
        driven[row["acting"]].append(row)
    return driven


def summarise(cfg, driven):
    """What results.json says of episodes -> {way: score}; normalised as by DSRL, cost limit 20."""
    infos = dsrl_infos()
    low = infos.get("MIN_EPISODE_REWARD", {}).get(cfg.task, math.nan)
    high = infos.get("MAX_EPISODE_REWARD", {}).get(cfg.task, math.nan)
    scores = {}
    for way, rows in driven.items():
        returns, costs = np.array([(row["return"], row["cost"]) for row in rows]).T
        score = {"episodes": len(rows), "return_mean": returns.mean(), "return_std": returns.std()}
        score |= {"cost_mean": costs.mean(), "cost_std": costs.std()}
        score |= {"zero_cost_share": (costs == 0).mean(), "normalized_cost": costs.mean() / 20}
        scores[way] = score | {"normalized_return": (returns.mean() - low) / (high - low)}
    return scores


def print_scores(title, scores):
    """A row for each way of acting."""
    print(f"9 evaluation of {title:<26}   return     cost   violation-free")
    for way, score in scores.items():
        words = {"clone": "cloned policy", "filter": "actor + filter"}.get(way, way)
        count = "{zero_cost_share:.0%} of {episodes} episodes".format(**score)
        print(f"   {words:<40}{score['return_mean']:8.2f} {score['cost_mean']:8.2f}   {count}")


# ==== 10. A run: from data to results =============================================================

FORMAT = 15  # of checkpoints, to be raised when older ones can't be read
WARNINGS = []  # where the program went another way than the reader may expect
EVALUATION = ("acting", "eval_episodes", "eval_seed")
HARMLESS = ("settings", "out", "device", "cost", *EVALUATION)  # not compared


def warn(text):
    """Says loudly, and for results.json, what the reader may not expect."""
    if text not in WARNINGS:
        WARNINGS.append(text)
    tqdm.write(f"WARNING: {text}", file=sys.stderr)


@contextlib.contextmanager
def whole(path):
    """A buffer that becomes a file by a temporary name: readers see a whole file or none."""
    buffer = io.BytesIO()  # a full disk is met here, not within HDF5 or torch
    yield buffer
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(buffer.getbuffer())
        os.replace(part, path)
    except OSError as error:
        raise ProcoError(f"can't write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def writable(folder, option):
    """Makes a folder and tries to write there. Raises ProcoError, which names what moves it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"{error.strerror or error}; {option} names another folder"
        raise ProcoError(f"can't write into {folder}: {reason}") from None


def write_table(path, rows):
    """A CSV file of what dicts hold but tuples; what a row lacks stays empty."""
    columns = dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], tuple))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    with whole(path) as file:
        file.write(text.getvalue().encode())


def versions():
    """What the numbers are made with: {package: version or None}."""
    names = ("torch", "numpy", "safety-gymnasium", "dsrl", "mujoco", "gymnasium")
    found = {name: next(importlib.metadata.distributions(name=name), None) for name in names}
    found = {name: there and there.version for name, there in found.items()}
    found |= {"python": sys.version.split()[0], "threads": torch.get_num_threads()}
    return found | {"cores": CORES}  # episodes that share a batch are rounded alike


def load_kept(path, device="cpu"):
    """What a results.json, a checkpoint or that of a folder holds. Raises ProcoError."""
    path = Path(os.path.expanduser(path))
    path = path if path.suffix in (".json", ".pt") else path / "checkpoint.pt"
    try:
        if path.suffix == ".json":
            kept = json.loads(path.read_text("utf-8"))
        else:
            kept = torch.load(path, map_location=device, weights_only=True)
        if kept["format"] == FORMAT:
            return kept
        reason = "is of another version of this program"
    except OSError as error:
        raise ProcoError(f"can't read {path}: {error.strerror or error}; train first") from None
    except Exception as error:  # noqa: BLE001 (torch raises many kinds for a file that is cut)
        reason = f"is damaged ({type(error).__name__})"
    raise ProcoError(f"{path} {reason}; train again, or use another --out")


def load_run(path, device="cpu", cost=None):
    """The Agent of a run's folder or checkpoint; cost: its predicate, loaded. Raises ProcoError."""
    path = Path(path)
    saved = load_kept(path.parent if path.name == "results.json" else path, device)
    cfg = Config(**saved["identity"]["settings"])
    task = get_task(cfg.task)
    model = Dynamics(task, cfg) if cfg.counterfactual else None
    cost = cost or load_cost(cfg.task, cfg.cost)
    if cost.digest != saved["identity"]["predicate"]:
        raise ProcoError(f"{path} was trained with another predicate of {cfg.task}; train again")
    agent = Agent(task, cfg, model, cost, saved["margin"])
    agent.load_state_dict(saved["agent"])
    return agent.to(device).requires_grad_(False)


def kept_run(folder, identity, device):
    """What --resume goes on with: (results of a finished run or None, checkpoint or None)."""
    now = identity["settings"] | identity  # flat; the hash of the data replaces --data
    differs = ""
    paths = [folder / name for name in ("results.json", "training.pt", "checkpoint.pt")]
    for path in filter(Path.exists, paths):
        kept = load_kept(path, device)
        was = kept["identity"]["settings"] | kept["identity"]
        other = [key for key in now if was.get(key) != now[key] and key not in HARMLESS]
        differs = "; ".join(f"{key} {was.get(key)}, now {now[key]}" for key in other)
        if not differs and path.suffix == ".pt":
            return None, kept | {"name": path.name}
        if not differs and all(was[key] == now[key] for key in EVALUATION):
            return kept, None
    if differs:
        raise ProcoError(f"{folder} holds another run ({differs}); use another --out")
    return None, None


def prepare(cfg):
    """Tries all that a run will need, before anything long -> task, cost, device."""
    task = get_task(cfg.task)
    cost = load_cost(cfg.task, cfg.cost)
    cuda = torch.cuda.is_available()
    if cfg.device not in ("auto", "cpu", "cuda") or (cfg.device == "cuda" and not cuda):
        raise ProcoError(f"there is no device {cfg.device!r} here; leave --device out")
    known = ways(task, cfg)
    if cfg.acting not in ("auto", *known):
        raise ProcoError(f"--method {cfg.method} on {cfg.task} acts by {', '.join(known)}")
    env = make_env(cfg.task)
    env.reset(seed=0)
    step = env.step(np.zeros(task.act_dim, np.float32))
    if len(step) != 6 or np.shape(step[0]) != (task.obs_dim,):
        form = f"6 values, the first an observation ({task.obs_dim},)"
        raise ProcoError(f"the environment of {cfg.task} has to answer a step by {form}")
    installed = versions()
    if isinstance(task.make, str) and not str(installed["mujoco"]).startswith("2.3"):
        warn(f"mujoco {installed['mujoco']} drives other paths than the 2.3 of DSRL's data")
    if not installed["dsrl"]:
        warn("the package dsrl is not installed: no normalised scores, no download of its data")
    writable(cfg.folder, "--out")
    return task, cost, "cuda" if cuda and cfg.device != "cpu" else "cpu"


@torch.random.fork_rng(devices=[])  # the caller's generator stays as it was
def run(cfg, resume=False):
    """A whole run, from data to results -> the content of results.json. Raises ProcoError."""
    WARNINGS.clear()
    task, cost, device = prepare(cfg)
    try:
        lock = FileLock(f"{cfg.folder}.lock").acquire(0)  # beside it: some versions leave the file
    except Timeout:
        why = f"another process works in {cfg.folder}; wait, or use another --out"
        raise ProcoError(why) from None
    with lock:
        clock = time.time()
        source, path = find_data(cfg)
        arrays, facts = load_data(path, task, cfg.max_episode_cost)
        facts |= {"source": source, "path": str(path)}
        size = f"{facts['episodes']} of {facts['of_episodes']} episodes, {facts['rows']} steps"
        level = f"return {facts['return_mean']:.2f}, {facts['unsafe_share']:.2%} unsafe"
        print(f"1 data: {source} {path}: {size}, {level}")
        identity = {"settings": dataclasses.asdict(cfg), "predicate": cost.digest}
        identity["data"] = {key: facts[key] for key in ("source", "rows", "hash")}
        results, saved = kept_run(cfg.folder, identity, device) if resume else (None, None)
        if results:
            print_scores(f"{cfg.task} {cfg.method}, finished before", results["acting"])
            return results
        part = cfg.folder / "training.pt"  # what is finished stays until this run is, too
        lost = part.exists() and not (saved and saved["name"] == part.name)
        if lost or (not resume and (cfg.folder / "results.json").exists()):
            warn(f"this run replaces another in {cfg.folder}; --resume with its settings keeps it")
            part.unlink(missing_ok=True)
        data = to_device(arrays, task, cost, device)
        seconds = {"data": time.time() - clock}
        print(f"2-6 training on {device}, {torch.get_num_threads()} threads")
        training = begin_training(cfg, task, data, cost, saved)
        training.kept["seconds"] = seconds | training.kept["seconds"]
        train(training, data, identity, part)
        clock = time.time()
        driven = evaluate(part, dataclasses.replace(cfg, acting="auto"), cost)
        training.kept["seconds"]["evaluation"] = time.time() - clock
        return finish(cfg, training, identity, facts, driven)


def finish(cfg, training, identity, facts, driven):
    """Writes what a run leaves; results.json is last, but for the picture -> its content."""
    folder = cfg.folder
    kept = training.kept
    seconds = kept["seconds"] | {"total": sum(kept["seconds"].values())}
    content = {"task": cfg.task, "method": cfg.method, "seed": cfg.seed, "format": FORMAT}
    content |= {"identity": identity, "settings": identity["settings"], "data": facts}
    content |= {"dynamics": kept["report"], "margin": kept["margin"], "timing": seconds}
    content |= {key: kept[key] for key in ("versions", "device", "warnings")}
    scores = summarise(cfg, driven)
    acting = list(scores)[-1] if cfg.acting == "auto" else cfg.acting
    content |= {"acting": scores, "eval": scores[acting] | {"acting": acting}}
    content = json.loads(json.dumps(content, default=float), parse_constant={}.get)  # no NaN
    for name in ("results.json", "report.png"):  # once they are there again, all is new
        (folder / name).unlink(missing_ok=True)
    os.replace(folder / "training.pt", folder / "checkpoint.pt")
    write_table(folder / "metrics.csv", kept["metrics"])
    write_table(folder / "episodes.csv", [row for rows in driven.values() for row in rows])
    with whole(folder / "results.json") as file:
        file.write(json.dumps(content, indent=1).encode())
    try:
        draw_report(folder / "report.png", training.agent, driven)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (the results are on disk)
        warn(f"no picture ({type(error).__name__}: {error})")
    print_scores(f"{cfg.task} {cfg.method}", scores)
    print(f"   {folder}/results.json after {seconds['total']:.0f} s")
    for text in WARNINGS:
        print(f"   NOTE: {text}")
    return content


@torch.no_grad()
def draw_report(path, agent, driven):
    """report.png: V_f where the first evaluation episode begins, and how it was driven."""
    from matplotlib.figure import Figure

    task = agent.task
    seen = task.lidars and isinstance(task.make, str) or task.name == "DoubleIntegrator"
    if not seen or agent.cfg.algorithm in ("bc", "td3bc"):  # these learn no V_f
        return
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="x, m", ylabel="y, m")
    reach = 2.5 if task.lidars else 2.0
    x, y = np.meshgrid(np.linspace(-reach, reach, 151), np.linspace(-reach, reach, 151))
    if task.lidars:
        env = make_env(task.name)
        first, *_, last = [*driven, *driven]
        own, z = split(encode(env.reset(seed=driven[last][0]["seed"])[0], task), task)
        moved = x + 1j * y - env.unwrapped.task.agent.pos[:2] @ [1, 1j]
        moved = torch.as_tensor(moved.ravel(), dtype=torch.cfloat)[:, None]
        seen = z.abs() < 0.999 * task.reach  # else there is nothing
        z = torch.where(seen, z - moved / (-2 * torch.complex(own[4], own[3])), z)
        own = torch.cat([agent.mean[:3].cpu(), own[3:]])  # moving as drivers do on average
        state = join(own.expand(len(z), -1), z, task)
        for way, colour in {first: "tab:red", last: "white"}.items():
            route = np.array(driven[way][0]["path"])
            hits = route[list(driven[way][0]["unsafe"])]
            axes.plot(route.real, route.imag, color=colour, lw=1)
            axes.plot(hits.real, hits.imag, "x", color=colour, label=f"{way}: {len(hits)} x")
        axes.legend(facecolor="0.5")
    else:
        state = np.stack([x.ravel(), y.ravel()], -1).astype(np.float32)
        axes.contour(x, y, double_integrator_infeasible(x, y), [0.5], linestyles="--")
        axes.set(ylabel="speed, m/s (dashed: closed form)")
    v_f = agent.feasibility(state).reshape(x.shape)
    mesh = axes.pcolormesh(x, y, v_f, cmap="cividis", vmin=0, vmax=1, rasterized=True)
    axes.contour(x, y, v_f, [agent.eps], colors="white")
    where = " at the drivers' mean speed" if task.lidars else ""
    figure.colorbar(mesh, label=f"V_f{where} (line: eps = {agent.eps:g})")
    with whole(path) as file:
        figure.savefig(file, dpi=110, format="png")


def parser():
    """The command line, made from Config."""
    line = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)  # only what is given
    line.description = __doc__.split("Shapes:")[0]
    line.epilog = "Defaults in brackets; DoubleIntegrator and velocity tasks have their own."
    line.formatter_class = argparse.RawDescriptionHelpFormatter
    groups = {}
    for field in dataclasses.fields(Config):
        about = field.metadata
        group = about["group"]
        groups[group] = groups.get(group) or line.add_argument_group(group)
        flag = "--" + field.name.replace("_", "-")
        words = about["help"] + (f" ({about['default']})" if about["default"] != "" else "")
        groups[group].add_argument(flag, type=type(about["default"]), metavar="X", help=words)
    line.add_argument("--resume", action="store_true", help="go on with a stopped run")
    line.add_argument("--evaluate", metavar="RUN", help="drive a finished run; writes nothing")
    return line


def serve(program, work, hint="nothing was lost"):
    """The exit code of a command: 0; 2 and one sentence on stderr; 130 where it was stopped."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (closed by whoever called)
    with contextlib.suppress(AttributeError):  # a folder's name may be no ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
        sys.stdout.flush()
        return 0
    except (KeyboardInterrupt, BrokenPipeError) as stop:  # Ctrl-C, SIGTERM, a closed pipe
        print(f"\n{program}: stopped; {hint}", file=sys.stderr)
        if isinstance(stop, BrokenPipeError):  # nothing is flushed into it
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 130
    except (ProcoError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:  # torch's own error is a RuntimeError
        if "memory" not in f"{type(error)} {error}".lower():
            raise
        print(f"{program}: there is too little memory; take smaller settings", file=sys.stderr)
    return 2


def again(path, given):
    """--evaluate: drives a finished run, and writes nothing. Raises ProcoError."""
    other = [key.replace("_", "-") for key in given if key not in ("cost", *EVALUATION)]
    if other:
        raise ProcoError(f"--evaluate drives a run as trained: it takes no --{' --'.join(other)}")
    cfg = Config(**load_kept(path)["identity"]["settings"] | {"acting": "auto"} | given)
    driven = evaluate(path, cfg, load_cost(cfg.task, cfg.cost))
    print_scores(f"{cfg.task} {cfg.method}", summarise(cfg, driven))


def main(argv=None):
    """The command line -> exit code."""
    given = vars(parser().parse_args(argv))
    if "evaluate" in given:
        return serve("proco", lambda: again(given.pop("evaluate"), given))
    resume = given.pop("resume", False)
    hint = "the same command with --resume goes on from what was kept"
    return serve("proco", lambda: run(Config(**given), resume), hint)


# ---- The scripted demonstrator: data where no recordings can be had; no part of PROCO ------------


# An agent as its plans see it: top speed m/s, lag of the speed s, rate of turning rad/s, how far
# its centre is ahead of the point about which it turns m, the discs that cover it (place along its
# front m, radius m), and the steps between two points of a plan.
Body = namedtuple("Body", "top lag rate pivot discs every")
BODIES = {
    "Point": Body(1.5, 0.52, 3.0, 0.0, ((0, 0.1), (0.1, 0.07)), 4),
    "Car": Body(0.78, 0.14, 1.3, 0.055, ((-0.08, 0.175), (0.08, 0.107)), 3),
}
SIZES = {"hazards": 0.2, "vases": 0.13, "buttons": 0.1, "gremlins": 0.14}  # radius, m


class Demonstrator:
    """Drives one episode: at each step it begins the plan with the most progress less penalties
    for dangers and a margin around them. It knows true positions, which no data show."""

    def __init__(self, task, env, rng):
        self.name = task.name
        self.car = task.name.startswith("Car")
        self.body = BODIES["Car" if self.car else "Point"]
        self.sim = env.unwrapped.task
        self.rng = rng
        # a style for each episode, so that data vary: margin m, noise, eagerness, share of coasting
        style = rng.uniform([0.03, 0, 2, 0], [0.12, 0.3, 5, 0.2])
        self.margin, self.noise, self.eager, self.coast = style
        # --- P plans: turn by an angle (a Point while it drives), then straight; from rest at 0 ---
        circle = "Circle" in task.name
        rates = self.body.rate * np.array([1, 0.5, 0.2] if circle and not self.car else [1])
        angles = np.linspace(-math.pi / 2, math.pi / 2, 17)
        plans = np.array(list(itertools.product([1.0, -1.0], angles, rates)))
        gas, angle, rate = plans.T[..., None]  # (P, 1)
        self.gas = gas.ravel()  # (P,) 1 or -1
        self.turn = np.clip(angle / task.dt, -rate, rate).ravel()  # (P,) rad/s now
        every = self.body.every - circle  # steps between two points; one less where walls are
        clock = task.dt * np.arange(1, 14 * every + 1)  # (steps,) s
        self.times = clock[every - 1 :: every]  # (T,) s
        turned = np.clip(angle, -rate * clock, rate * clock)  # (P, steps)
        front = np.exp(1j * turned)
        push = gas * front  # thrust and wheels saturate early, so driving is all or nothing
        if self.car:
            push = push * (turned == angle)  # it turns on the spot
        since = np.maximum(self.times - clock[:, None] + task.dt, 0)  # (steps, T)
        moved = self.body.top * task.dt * (1 - np.exp(-since / self.body.lag))
        self.heading = front[:, every - 1 :: every]  # (P, T)
        self.path = push @ moved + self.body.pivot * (self.heading - 1)  # (P, T) x + iy, m

    def act(self, obs):
        """The action (2,) for an observation (O,)."""
        here = self.sim.agent.pos[:2] @ [1, 1j]
        x_axis = self.sim.agent.mat[:2, 0] @ [1, 1j]  # of the body, in the world
        front = x_axis
        if self.car:  # its front is -y, and its spin needs 0.06 s to die
            front = -1j * x_axis * np.exp(0.06j * obs[8])
        drift = self.body.lag * (1 - np.exp(-self.times / self.body.lag))  # m per m/s
        velocity = complex(obs[3], obs[4]) * x_axis
        paths = here + front * self.path + velocity * drift  # (P, T)
        judge_plans = self.judge_circle if "Circle" in self.name else self.judge_goal
        value, depth = judge_plans(here, paths, front * self.heading)
        hard = np.maximum(depth - self.margin + 0.02, 0)  # the danger itself and 2 cm
        value -= 20 / self.eager * (depth.max(1) + depth.mean(1))
        value -= 100 * hard.max(1) + 400 * hard.mean(1)
        value -= 0.8 * (np.sign(self.turn) * obs[8] < -0.3)  # no dithering between left and right
        best = value.argmax()
        return self.add_noise(self.gas[best], self.turn[best], depth[best].max() == 0)

    def add_noise(self, gas, turn, clear):
        if not self.car:
            thrust = gas * (self.rng.random() > self.coast)
            noise = self.noise * self.rng.standard_normal(2)
            return np.clip([thrust, turn / self.body.rate] + noise, -1, 1).astype(np.float32)
        # noise on wheels only slows them; where all is clear, it is another plan instead
        if clear and self.rng.random() < self.noise / 5:
            gas = self.rng.choice([-1, 1])
            turn = self.rng.choice([-1, 0, 1])
        wheels = [gas, gas] if turn == 0 else [np.sign(turn), -np.sign(turn)]
        return np.array(wheels, np.float32)

    def judge_goal(self, here, paths, headings):
        """Progress (P,), m, and how deep plans are in dangers and their margins (P, T), m."""
        goal = self.sim.goal.pos[:2] @ [1, 1j]
        if abs(goal - here) > 3:  # out of the lidar's sight: to the middle of the arena
            goal = 0j
        distance = np.abs(paths - goal)
        hit = distance < 0.28
        if "Button" in self.name:
            gaps = [np.abs(paths + at * headings - goal) - r for at, r in self.body.discs]
            hit = np.minimum(*gaps) < 0.06  # 4 cm into the button, to be sure
        first = np.where(hit.any(1), hit.argmax(1), len(self.times) - 1)
        early = self.body.top * (self.times[-1] - self.times[first])
        value = np.where(hit.any(1), early - distance.min(1), -distance[:, -1])
        if "Button" in self.name:  # it stops who presses it
            until = np.minimum(np.arange(len(self.times)), first[:, None])
            paths, headings = (np.take_along_axis(x, until, 1) for x in (paths, headings))
        depth = np.zeros(paths.shape)
        for kind, size in SIZES.items():
            things = getattr(self.sim, kind, None)
            if things is None or not things.is_constrained:
                continue
            track = np.array(things.pos)[:, :2] @ [1, 1j]
            if kind == "buttons":  # the goal is no danger
                track = np.delete(track, things.goal_button)
            track = track[np.abs(track - here).argsort()[:5], None]  # of the nearest: (N, 1)
            if kind == "gremlins":  # all circle alike: radius 0.35 m, 1 rad/s, with a lag
                now = self.sim.data.time - 0.09
                turn = np.exp(-1j * self.times) - 1
                track = track + 0.35j * np.exp(-1j * now) * turn  # (N, T)
            # only the agent's centre must stay out of hazards
            for at, radius in [(0, 0)] if kind == "hazards" else self.body.discs:
                part = paths + at * headings
                gap = np.abs(part[:, None] - track).min(1)  # (P, N, T) -> (P, T)
                depth = np.maximum(depth, size + radius + self.margin - gap)
        return value, depth

    def judge_circle(self, here, paths, headings):
        """The task's own reward along plans (P,), and how deep they are in walls (P, T), m."""
        radius = np.abs(paths)
        velocity = np.diff(paths, prepend=here) / self.times[0]
        reward = (paths.conj() * velocity).imag / radius / (1 + np.abs(radius - 1.5))
        wall = np.abs(paths.real)
        if self.name.endswith("2"):
            wall = np.maximum(wall, np.abs(paths.imag))
        return 6 * reward.mean(1), np.maximum(wall - 1.125 + self.margin, 0)


def make_demonstrator(task, env, rng):
    """act(obs (O,)) -> action (A,) float32 in [-1, 1], for one episode of env, just reset."""
    if task.name != "DoubleIntegrator":
        return Demonstrator(task, env, rng).act
    # it speeds up to a speed of its own and brakes in time for a stop before the wall
    top, stop, brake, noise = rng.uniform([0.3, 0.3, 0.3, 0], [2, 0.95, 0.9, 0.5])

    def act(obs):
        room = max(stop - obs[0], 0)
        wanted = min(top, math.sqrt(2 * brake * room)) if room else -0.2
        push = (wanted - obs[1]) / 0.3
        if room > obs[1]:
            push += noise * rng.normal()
        return np.clip([push], -1, 1).astype(np.float32)

    return act


if __name__ == "__main__":
    sys.exit(main())
