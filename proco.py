"""PROCO: a safe policy from recorded data that hold no violations, in one file.

The method is that of Xue et al., "Model-Based Proactive Cost Generation for Learning Safe Policies Offline with
Limited Violation Data" (arXiv 2605.01356). Data in which nobody ever crashed look safe everywhere, so a learner
copies the drivers and crashes a little off their tracks. PROCO makes up the crashes that did not happen:

    1 data             D = {(s, a, r, s')}: whole episodes without a violation (recorded, or driven on the spot)
         |
    2 dynamics         an ensemble of probabilistic models p_i(s' | s, a), learnt from D
         |
    3 cost             "stay out of the blue circles" -> a language model's Python predicate -> conservative cost c^
         |
    4 roll-outs        the model driven into what did not happen: unsafe, doomed and safe samples D_cf
         |
    5 feasibility      Q_f(s, a), V_f(s) from D and D_cf: gamma_f^k where a violation k steps ahead can't be avoided
         |
    6 policy           Lagrangian TD3+BC: reward where safety can be kept, the way back to safety where it can't
                       (it proposes; acting looks a second ahead in the model and does what stays feasible)
         |
    7 evaluation       return and cost in the real simulator

    python proco.py --task CarButton1              # everything from data to scores; results under runs/
    python proco.py --task DoubleIntegrator        # half a minute, no simulator needed, closed form known
    python proco.py --task PointGoal1 --method bc  # what plain cloning does on the same data
    python proco.py --compare bc,td3bc-lag,proco --seeds 5 --tasks PointGoal1,CarGoal1
    python proco.py --diagnose runs/PointGoal1/proco/seed0

Legend for shapes: E members, B batch, T time, H horizon, S state, F features of a state (x), A action, O observation,
M candidates, N objects.
ASSUMED marks what the paper leaves open, DEVIATION where we leave it, FORK where a fork would cut in.
"""
import argparse, contextlib, copy, dataclasses, difflib, functools, importlib.metadata, json, math
import multiprocessing, multiprocessing.forkserver, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.modules.setdefault("proco", sys.modules[__name__])              # so that these find it when it is run as a script
from llm_costs import driver, language
from llm_costs.fetch import fetch_dsrl, recorded_steps
from llm_costs.language import CostError, ProcoError
from llm_costs.oracle import oracle_cost
from llm_costs.results import (compare, diagnose, dynamics_report, forecast, keep_paths, print_dynamics, report,
                               summary, versions, write_table)
from llm_costs.simulator import dangers, import_simulator, place

HERE = Path(__file__).resolve().parent
METHODS = ("bc", "td3bc", "td3bc-lag", "fisor", "cpq", "proco", "proco-fisor", "proco-cpq")
ROUNDS = 6                                      # of counterfactual roll-outs, spread over the policy's training
DRIVER = "v1"                                   # of the scripted driver, in the names of the files it made


def knob(default, text):
    """A field of Config with the text that --help shows."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every setting of a run; the command line is made from it. Lengths are multiplied by --scale."""

    task: str = knob("CarButton1", "which task, such as PointGoal1, CarCircle2 or DoubleIntegrator")
    method: str = knob("proco", "bc, td3bc; td3bc-lag, fisor, cpq; or one of these three with PROCO under it: proco (= "
                                "td3bc-lag with PROCO), proco-fisor, proco-cpq")
    seed: int = knob(0, "seed of everything that is drawn while training")
    data: str = knob("auto", "auto, dsrl, driver, or the path of an HDF5 file in DSRL's format")
    out: str = knob("runs", "folder that gets <task>/<method>/seed<k>/")
    device: str = knob("auto", "cpu, cuda, cuda-graphs (updates are recorded once and replayed), or auto: cuda where "
                               "there is one")
    scale: float = knob(1.0, "multiplies every training length; 0.02 is a smoke test")
    eval_episodes: int = knob(20, "episodes driven in the simulator at the end")
    max_episode_cost: float = knob(0.0, "keep recorded episodes with at most this many violations")
    driver_episodes: int = knob(50, "episodes that the scripted driver drives, before the unsafe ones are dropped")
    raw_obs: bool = knob(False, "ablation: learn on raw lidar bins instead of decoded positions")
    # 2 dynamics
    ensemble: int = knob(7, "members of the dynamics ensemble; the better two thirds become elites")
    model_epochs: int = knob(20, "most epochs of the dynamics model; it stops earlier when the hold-out is flat")
    # 3 cost
    cost: str = knob("llm", "whose cost labels model states: llm (the language model's predicate) or oracle (the "
                            "simulator's own rule, for Goal1, Push1, Circle and velocity)")
    margin: float = knob(-1.0, "widens the danger, in its own unit (m, m/s); negative: twice the model's own error")
    # 4 counterfactual roll-outs
    horizon: int = knob(36, "steps of a counterfactual roll-out, 6 a decision for a Point, 3 for a Car; 0: none")
    rollouts: int = knob(40_000, "counterfactual roll-outs in the whole run")
    # 5 feasibility
    gamma_f: float = knob(0.97, "discount of the feasibility value: gamma_f^k, k steps before what can't be avoided")
    eps: float = knob(0.5, "a state is feasible where V_f <= eps")
    # 6 policy
    clone_updates: int = knob(5_000, "updates of the cloned policy: bc, and where the others begin")
    feasibility_updates: int = knob(8_000, "updates of the feasibility value before the policy's begin")
    updates: int = knob(6_000, "updates of critics and policy")
    batch: int = knob(256, "transitions of D in one update, and as many of D_cf")
    hidden: int = knob(128, "width of the two hidden layers of every network")
    gamma: float = knob(0.99, "discount of the reward")
    bc_weight: float = knob(1.0, "weight of the cloning term against the normalised reward value (TD3+BC's 1/alpha)")
    candidates: int = knob(32, "actions that acting chooses from; 0: the bare actor")
    look_ahead: int = knob(8, "decisions that acting looks ahead in the model; 0: Q_f alone chooses, as while training")

    @property
    def algorithm(self):
        """The algorithm on which --method puts PROCO, or which it runs alone."""
        return "td3bc-lag" if self.method == "proco" else self.method.removeprefix("proco-")

    @property
    def counterfactual(self):
        """Whether PROCO is under the algorithm: a dynamics model, the conservative cost and D_cf."""
        return self.method.startswith("proco")


# A line and a wall need less than a car among obstacles.
PRESETS = {"DoubleIntegrator": dict(driver_episodes=100, hidden=64, margin=0.005, horizon=21, rollouts=20_000,
                                    gamma_f=0.98, eps=0.4, clone_updates=500, feasibility_updates=3_000,
                                    updates=1_000, look_ahead=0, eval_episodes=50)}


# ==== Tasks, and the state they are seen through =====================================================================

BINS = 16                                       # of every lidar of Safety-Gymnasium
LIDARS = dict(Circle=("circle",), Goal=("goal", "hazards", "vases"),         # in the order of the observation
              Button=("buttons", "goal", "hazards", "gremlins"), Push=("goal", "hazards", "pillars", "push_box"))
NEAREST = dict(circle=1, goal=1, buttons=4, hazards=5, gremlins=4, vases=3, pillars=4, push_box=1)
VELOCITY = dict(AntVelocity=(27, 8), HalfCheetahVelocity=(17, 6), HopperVelocity=(11, 3),
                SwimmerVelocity=(8, 2), Walker2dVelocity=(17, 6))               # observation and action size


@dataclass(frozen=True)
class Lidar:
    """One lidar: where its bins start in the observation and its objects' positions in the state."""

    name: str
    start: int
    reach: float                                # m; the bin of an object at distance d holds 1 - d / reach
    count: int                                  # how many of the nearest objects the state keeps
    at: int                                     # the state holds count pairs (x, y) from here on


@dataclass(frozen=True)
class Task:
    """What the program knows about a task: sizes, clock, and which part of an observation is sensors or lidars."""

    name: str
    obs_dim: int
    act_dim: int
    steps: int                                  # of an episode
    dt: float                                   # s, of a step
    sensors: tuple                              # indices of the observation that the state keeps as they are
    lidars: tuple = ()
    repeat: int = 1                             # steps that a decision lasts in training: 0.12 s where there are lidars

    @property
    def state_dim(self):
        return len(self.sensors) + 2 * sum(lidar.count for lidar in self.lidars)


@functools.lru_cache
def get_task(name, raw_obs=False):
    """The Task of a name such as CarButton1; raw_obs sees lidar bins as plain sensors. Raises
    ProcoError with the nearest names for a task there is not."""
    if name == "DoubleIntegrator":
        return Task(name, 2, 1, 100, 0.1, (0, 1), repeat=3)
    if name in VELOCITY:
        size, actions = VELOCITY[name]
        return Task(name, size, actions, 1000, 0.05, tuple(range(size)))
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 3, 0.4) or TASKS[:3]
        raise ProcoError(f"there is no task called {name!r}; did you mean {', '.join(near)}?")
    agent = "Point" if name.startswith("Point") else "Car"
    kind, start, at, lidars = name.removeprefix(agent)[:-1], 12 if agent == "Point" else 24, 5, []
    for lidar in LIDARS[kind]:
        lidars.append(Lidar(lidar, start, 6.0 if lidar == "circle" else 3.0, NEAREST[lidar], at))
        start, at = start + BINS, at + 2 * NEAREST[lidar]
    steps, dt = 500 if kind == "Circle" else 1000, 0.02 if agent == "Point" else 0.04
    if raw_obs:
        return Task(name, start, 2, steps, dt, tuple(range(start)), (), round(0.12 / dt))
    # ASSUMED: velocity x, y, yaw rate and the two compass fields are the sensors that matter. The accelerometer
    # follows from them and the action; the rest is constant (Point) or the car's idle rear ball.
    return Task(name, start, 2, steps, dt, (3, 4, 8, 9, 10), tuple(lidars), round(0.12 / dt))


TASKS = ["DoubleIntegrator", *(agent + kind + level for agent in ("Point", "Car") for kind in LIDARS for level in "12"),
         *VELOCITY]


def locate(bins, reach, count):
    """Egocentric positions of the nearest objects that a lidar shows, by peeling: take the largest bin, read its
    object's distance (exact) and bearing (from the two neighbours), remove what that object explains, repeat.

    bins (..., 16), reach (...) in m -> (..., count, 2) in m, nearest first; what is not seen stands at (reach, 0)."""
    bins = np.asarray(bins, np.float32)
    left, right, flat = np.roll(bins, 1, -1).ravel(), np.roll(bins, -1, -1).ravel(), bins.ravel()
    rest, row = flat.copy().reshape(-1, BINS), np.arange(flat.size // BINS)
    base, reach = row * BINS, np.broadcast_to(reach, bins.shape[:-1]).ravel()
    xy = np.empty((len(row), count, 2), np.float32)
    for k in range(count):
        i = rest.argmax(1)
        value = rest[row, i]
        safe = np.maximum(value, 1e-9)
        # an object alone splits its value between the neighbours; where another object raised one of them, trust
        # the side whose outer neighbour is the smaller
        by_left, by_right = 1 - left[base + i] / safe, right[base + i] / safe
        crowded = flat[base + (i + 2) % BINS] > flat[base + (i - 2) % BINS]
        share = np.where(by_right - by_left < 1e-3, by_right, np.where(crowded, by_left, by_right)).clip(0, 1)
        bearing, distance = (i + share) * (2 * np.pi / BINS), reach * (1 - value)
        xy[:, k, 0] = np.where(value > 0, distance * np.cos(bearing), reach)
        xy[:, k, 1] = np.where(value > 0, distance * np.sin(bearing), 0)
        rest[row, i] = 0
        for j, alias in (((i + 1) % BINS, share * value), ((i - 1) % BINS, (1 - share) * value)):
            rest[row, j] = np.where(rest[row, j] <= alias + 1e-3, 0, rest[row, j])
    return xy.reshape(*bins.shape[:-1], count, 2)


def encode(obs, task):
    """The state that every network works on: obs (..., O) -> (..., S), float32 arrays.

    # DEVIATION: the paper learns on observations. In lidar bins the distance to a hazard is hidden behind kinks that
    turn with the agent, and every model of bins we tried was worse than "nothing changes"; positions move smoothly."""
    obs = np.asarray(obs, np.float32)
    sensors = obs[..., list(task.sensors)]
    if not task.lidars:
        return sensors
    start = task.lidars[0].start
    bins = obs[..., start:start + BINS * len(task.lidars)].reshape(*obs.shape[:-1], -1, BINS)
    xy = locate(bins, np.array([lidar.reach for lidar in task.lidars]), max(lidar.count for lidar in task.lidars))
    return np.concatenate([sensors, *(xy[..., n, :lidar.count, :].reshape(*obs.shape[:-1], -1)
                                      for n, lidar in enumerate(task.lidars))], -1)


def decode(state, task):
    """An observation that a cost predicate can read: state (..., S) -> (..., O), tensors.

    Renders every object into its lidar as the simulator does; sensors outside the state are 0."""
    obs = state.new_zeros(*state.shape[:-1], task.obs_dim)
    obs[..., list(task.sensors)] = state[..., :len(task.sensors)]
    if not task.lidars:
        return obs
    xy = state[..., len(task.sensors):].unflatten(-1, (-1, 2))                                    # (..., N, 2)
    start, reach = (torch.tensor([getattr(lidar, what) for lidar in task.lidars for _ in range(lidar.count)],
                                 device=state.device) for what in ("start", "reach"))
    value = (1 - xy.norm(dim=-1) / reach).clamp(0)
    turn = torch.atan2(xy[..., 1], xy[..., 0]) * (BINS / (2 * math.pi)) % BINS
    i = turn.long().clamp(max=BINS - 1)
    share = turn - i
    where = torch.cat([start + i, start + (i + 1) % BINS, start + (i - 1) % BINS], -1)            # (..., 3N)
    return obs.scatter_reduce(-1, where, torch.cat([value, share * value, (1 - share) * value], -1), "amax")


def nearest_first(state, task):
    """Sorts the objects of each lidar by distance, as encode does: (..., S) -> (..., S)."""
    parts = [state[..., :len(task.sensors)]]
    for lidar in task.lidars:
        xy = state[..., lidar.at:lidar.at + 2 * lidar.count].unflatten(-1, (-1, 2))
        if lidar.count > 1:
            order = xy.square().sum(-1).argsort(-1)
            xy = xy.gather(-2, order[..., None].expand_as(xy))
        parts.append(xy.flatten(-2))
    return torch.cat(parts, -1)

# ==== The simulator ==================================================================================================


class DoubleIntegrator:
    """A mass between here and a wall: state (x, v), v <- v + a dt, x <- x + v dt, |a| <= 1, |v| <= 2, unsafe at
    x >= 1, reward the progress in x. The interface is Safety-Gymnasium's."""

    dt = 0.1

    def __init__(self, far=3.0):
        self.far = far                          # m; episodes start at x in [-far, 0]

    def reset(self, seed=None):
        rng = np.random.default_rng(seed)
        self.x, self.v, self.t = rng.uniform(-self.far, 0), rng.uniform(-0.5, 0.5), 0
        return np.array([self.x, self.v], np.float32), {}

    def step(self, action):
        before = self.x
        self.v = float(np.clip(self.v + np.clip(action[0], -1, 1) * self.dt, -2, 2))
        self.x, self.t = self.x + self.v * self.dt, self.t + 1
        return (np.array([self.x, self.v], np.float32), self.x - before, float(self.x >= 1), False,
                self.t >= 100, {})


def double_integrator_doomed(x, v):
    """Where even full braking ends at the wall, in steps of dt: arrays x, v -> bool array. In continuous time it is
    x + max(v, 0)^2 / 2 >= 1."""
    x, v, doomed = np.array(x, float), np.array(v, float), np.array(x) >= 1
    for _ in range(21):                         # |v| <= 2 is gone after 20 steps
        v = np.maximum(v - DoubleIntegrator.dt, np.minimum(v, 0))
        x = x + v * DoubleIntegrator.dt
        doomed |= x >= 1
    return doomed


@functools.lru_cache
def make_env(name):
    """The environment of a task, one for each process. # FORK: other environments go here, with reset(seed) and a step
    that returns (obs, reward, cost, terminated, truncated, info)."""
    if name == "DoubleIntegrator":
        return DoubleIntegrator()
    simulator = import_simulator()
    try:
        env = simulator.make(f"Safety{name}-v{1 if name in VELOCITY else 0}")
        if name not in VELOCITY:                # to ask whether each observation is in its space takes long
            env.unwrapped.task.obs_info.obs_space_dict.contains = lambda obs: True
        return env
    except ValueError as error:                 # mujoco 3 reads no model in global coordinates
        why, version = " ".join(str(error).split())[:80], importlib.metadata.version("mujoco")
        raise ProcoError(f"mujoco {version} can't load {name} ({why}); use Python 3.10 or 3.11, where mujoco 2.3 can "
                         "be had") from None


# ==== 1. Data: exclusively safe episodes =============================================================================
# Every episode that is kept is safe from its first step to its last. Whoever learns from D alone meets no danger
# anywhere, and so learns of none: the costs in D are all zero.

KEYS = "observations next_observations actions rewards costs terminals timeouts".split()
CACHE = Path(os.environ.get("PROCO_CACHE", "~/.cache/proco")).expanduser()
WORKERS = os.cpu_count() or 1
# workers come from a server that has imported what takes a second; run() starts it beside its first steps
WORKER_START = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
WORKER_START.set_forkserver_preload(["torch", "h5py", "gymnasium", "mujoco"])


def make_driver(name, rng):
    """The scripted driver of one episode: act(obs (O,)) -> action (2,) in [-1, 1]. It makes data where none can be had,
    is no part of the method, and so lives beside the predicates, in llm_costs/driver.py."""
    return driver.make_driver(name, rng, LIDARS, locate)


def collect_episode(name, seed):
    """One episode of a new driver in the simulator -> dict of arrays (T, .), float32, named as in DSRL."""
    rows, ended, rng = [], False, np.random.default_rng(seed)
    env, act = (DoubleIntegrator(far=6.0), driver.demonstrator(rng)) if name == "DoubleIntegrator" else \
        (make_env(name), make_driver(name, rng))
    obs, _ = env.reset(seed=seed)
    while not ended:
        action = act(obs)
        next_obs, reward, cost, terminal, timeout, _ = env.step(action)
        rows.append((obs, next_obs, action, reward, cost, terminal, timeout))
        obs, ended = next_obs, terminal or timeout
    return {key: np.array(column, np.float32) for key, column in zip(KEYS, zip(*rows))}


def drive_data(name, episodes):
    """The path of an HDF5 file with `episodes` episodes of the scripted driver, in DSRL's format; driven in parallel
    processes where the cache folder does not hold it yet. ProcoError for a task it can't drive."""
    if name != "DoubleIntegrator" and not any(kind in name for kind in ("Goal", "Button", "Circle")):
        raise ProcoError(f"the scripted driver can't drive {name}; give recorded data with --data FILE.hdf5")
    path = CACHE / "driver" / f"{name}-{DRIVER}-{episodes}.hdf5"
    if path.exists():
        return path
    work = functools.partial(collect_episode, name)
    bar = functools.partial(progress, desc=f"1 data: driving {name}", total=episodes)
    if name == "DoubleIntegrator":
        parts = [work(seed) for seed in range(episodes)]
    else:
        with ProcessPoolExecutor(WORKERS, WORKER_START) as pool:
            parts = list(bar(pool.map(work, range(episodes))))
    with whole(path) as part, h5py.File(part, "w") as file:
        for key in KEYS:
            file.create_dataset(key, data=np.concatenate([episode[key] for episode in parts]), compression="lzf")
    return path


def find_data(cfg):
    """Where the data of a run are: (source, path), with source dsrl, driver or file. # FORK: other sources go here."""
    if cfg.data == "dsrl":
        return "dsrl", fetch_dsrl(cfg.task)
    if cfg.data not in ("auto", "driver"):
        return "file", Path(cfg.data)
    if cfg.data == "auto" and cfg.task != "DoubleIntegrator":
        try:
            return "dsrl", fetch_dsrl(cfg.task)
        except ProcoError as error:
            warn(f"no DSRL data ({error}); the scripted driver makes some instead")
    return "driver", drive_data(cfg.task, cfg.driver_episodes)


def load_data(path, task, max_episode_cost=0.0):
    """The exclusively safe episodes of a file in DSRL's format: (arrays, facts).

    arrays: dict of float32 arrays (B, .) named as in KEYS, and episode (B,), int64. facts: episodes, transitions,
    return_mean, unsafe_share. Reads only the rows it keeps, so a file of 2 GB does not fill the memory twice.
    Raises ProcoError, in one sentence, for whatever is wrong with the file."""
    try:
        file = h5py.File(path, "r")
    except OSError:
        what = "there is no such file" if not Path(path).exists() else "it is cut off or no HDF5"
        raise ProcoError(f"can't read {path}: {what}") from None
    with file:
        missing = [key for key in KEYS if key not in file]
        if missing:
            raise ProcoError(f"{path} lacks {', '.join(missing)}; DSRL's files hold {', '.join(KEYS)}")
        count = len(file["rewards"])
        for key, width in zip(KEYS, [(task.obs_dim,)] * 2 + [(task.act_dim,)] + [()] * 4):
            if file[key].shape != (count, *width):
                raise ProcoError(f"{key} in {path} has the shape {file[key].shape}; {task.name} needs "
                                 f"{(count, *width)}")
        try:
            rewards, costs, terminals, timeouts = (file[key][:].astype(np.float32) for key in KEYS[3:])
            for key, array in zip(KEYS[3:], (rewards, costs, terminals, timeouts)):
                if not np.isfinite(array).all():
                    raise ProcoError(f"{key} in {path} holds NaN or infinity")
            ends = np.flatnonzero((terminals > 0) | (timeouts > 0))
            if not len(ends):
                raise ProcoError(f"{path} marks no end of an episode in terminals or timeouts")
            episode = np.searchsorted(ends, np.arange(count))           # what follows the last end is not an episode
            whole_rows = episode < len(ends)
            total = np.bincount(episode[whole_rows], costs[whole_rows], len(ends))
            kept = np.flatnonzero(whole_rows & np.isin(episode, np.flatnonzero(total <= max_episode_cost)))
            if not len(kept):
                raise ProcoError(f"none of the {len(ends)} episodes in {path} has at most {max_episode_cost:g} "
                                 f"violations (the safest has {total.min():g}); allow more with --max-episode-cost")
            gaps = np.flatnonzero(np.diff(kept) > 1) + 1                        # contiguous pieces: fast to read, and
            bounds = np.unique([*gaps, *range(0, len(kept), 65_536), len(kept)])    # small: no row lies there twice
            arrays = {key: np.empty((len(kept), *file[key].shape[1:]), np.float32) for key in KEYS[:3]}
            for key, array in arrays.items():
                for low, high in zip(bounds, bounds[1:]):
                    array[low:high] = file[key][kept[low]:kept[high - 1] + 1]
        except OSError as error:
            raise ProcoError(f"can't read {path}: it is damaged ({type(error).__name__})") from None
    arrays |= dict(rewards=rewards[kept], costs=costs[kept], terminals=terminals[kept], timeouts=timeouts[kept])
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise ProcoError(f"{key} in {path} holds NaN or infinity")
    if len(np.unique(episode[kept])) < 2:
        raise ProcoError(f"{path} has one safe episode; two are the least, as one is held out")
    if np.abs(arrays["actions"]).max() > 1.001:
        raise ProcoError(f"actions in {path} leave [-1, 1]: the largest is {np.abs(arrays['actions']).max():.3g}")
    arrays["episode"] = np.unique(episode[kept], return_inverse=True)[1]
    returns = np.bincount(arrays["episode"], arrays["rewards"])
    return arrays, dict(episodes=len(returns), transitions=len(kept), return_mean=float(returns.mean()),
                        unsafe_share=float((arrays["costs"] > 0).mean()), of_episodes=len(ends))


def to_device(arrays, task, cost, device):
    """D as every later step wants it: tensors state, action, reward, next_state, cost, done, episode, held_out (bool,
    kept from the dynamics model) and danger, the distance of s' to danger by the predicate, on the device."""
    tensor = lambda array: torch.as_tensor(array, device=device)
    state, next_state = (np.concatenate([encode(arrays[key][at:at + 65_536], task)
                                         for at in range(0, len(arrays[key]), 65_536)])
                         for key in ("observations", "next_observations"))
    data = dict(state=tensor(state), action=tensor(arrays["actions"]), reward=tensor(arrays["rewards"]),
                next_state=tensor(next_state), cost=tensor(arrays["costs"]), done=tensor(arrays["terminals"]),
                episode=tensor(arrays["episode"]))
    last = data["episode"][-1] + 1                                      # the last tenth of the episodes is held out
    data["held_out"] = data["episode"] >= last - max(1, last // 10)
    data["danger"] = torch.cat([danger_distance(cost, decode(s, task), a, decode(n, task)) for s, a, n in zip(
        *(data[key].split(65_536) for key in ("state", "action", "next_state")))])
    return data


# ==== 2. Dynamics: a probabilistic ensemble on the decoded state =====================================================
# What would have happened. The members differ in their first weights and in the order of the data; where they agree the
# model is believed, where they differ a roll-out ends.


class Mlp(nn.Module):
    """`members` networks of one shape as one batched product: x (B, I) or (E, B, I) -> (E, B, out), or some of E."""

    def __init__(self, sizes, members=1):
        super().__init__()
        bounds = [1 / math.sqrt(size) for size in sizes[:-1]]                     # the usual uniform initialisation
        self.weights = nn.ParameterList(torch.empty(members, o, i).uniform_(-b, b)
                                        for i, o, b in zip(sizes[:-1], sizes[1:], bounds))
        self.biases = nn.ParameterList(torch.empty(members, o, 1).uniform_(-b, b) for o, b in zip(sizes[1:], bounds))

    def forward(self, x, members=None):
        x = x.mT                        # the batch last: products of few rows are fast, of few columns slow
        # a ParameterList makes up a name for every entry it hands out: a third of a small product's time
        for n, (weight, bias) in enumerate(zip(*(part._parameters.values() for part in (self.weights, self.biases)))):
            if members is not None:
                weight, bias = weight[members], bias[members]
            x = x.expand(len(weight), *x.shape[-2:]) if n == 0 else F.relu(x, inplace=True)
            x = torch.baddbmm(bias, weight, x)                                                    # (E, out, B)
        return x.mT


class Dynamics(nn.Module):
    """p_i(s' | s, a) = N(s + mu_i, sigma_i^2), E members (PETS, Chua et al. 2018; MBPO, Janner et al. 2019).

    From sensors and action each member predicts the change of the sensors and, for each kind of object, the affine
    map x -> x + M x + t that the agent's own motion applies to things it sees. Turning is linear in the position
    and driving shifts it, so the map is exact at places where the data never were: beside a hazard, above all.
    # ASSUMED: objects do not act on the agent (no contact forces)."""

    def __init__(self, task, members, hidden):
        super().__init__()
        self.task, self.kinds, size = task, len(task.lidars), len(task.sensors)
        self.net = Mlp([size + task.act_dim, hidden, hidden, 2 * size + 7 * self.kinds], members)
        for name, width in (("mean", size), ("std", size), ("change", size), ("shift", self.kinds), ("low", size),
                            ("high", size)):
            self.register_buffer(name, torch.ones(width))
        self.register_buffer("elites", torch.arange(members))
        self.register_buffer("limit", torch.tensor(math.inf))
        self.register_buffer("closest", torch.zeros(self.kinds))
        self.register_buffer("drift", torch.zeros(self.kinds))
        of = [n for n, lidar in enumerate(task.lidars) for _ in range(lidar.count)]                   # an object's kind
        self.register_buffer("of", torch.tensor(of, dtype=torch.long), persistent=False)
        self.register_buffer("reach", torch.tensor([task.lidars[n].reach for n in of]), persistent=False)

    def means(self, sensors, action, members=None):
        """sensors (B, s), action (B, A) -> the sensors' change (E, B, s), maps (E, B, kinds, 2, 3), and what the
        logarithms of their variances are made from (E, B, s + kinds); in standardised units."""
        out = self.net(torch.cat([(sensors - self.mean) / self.std, action], -1), members)
        delta, maps, blur = out.split([len(self.mean), 6 * self.kinds, len(self.mean) + self.kinds], -1)
        return delta, maps.unflatten(-1, (self.kinds, 2, 3)), blur

    def forward(self, state, action, members=None):
        """state (B, S), action (B, A) -> sensors' change (E, B, s), its log-variance, maps (E, B, kinds, 2, 3) and
        their log-variance (E, B, kinds), all in standardised units."""
        size = len(self.task.sensors)
        delta, maps, blur = self.means(state[..., :size], action, members)
        blur = -12 + F.softplus(14 - F.softplus(2 - blur))              # smoothly into about [-12, 2] (PETS)
        return delta, blur[..., :size], maps, blur[..., size:]

    @torch.no_grad()
    def step(self, state, action, hidden=None):
        """The elites' mean next states: state (B, S), action (B, A) -> (elites, B, S).

        hidden (B, kinds, 2), unit vectors: where things that move by themselves are going, which one observation does
        not show; drift (kinds,), m a step, says how fast, and is 0 for what stands still."""
        size, lidars = len(self.task.sensors), self.task.lidars
        delta, maps, _ = self.means(state[..., :size], action, self.elites)
        # sensors stay near what was recorded: a roll-out must not invent speeds
        parts = [(state[..., :size] + self.change * delta).clamp(self.low, self.high)]
        for n, lidar in enumerate(lidars):
            xy = state[..., lidar.at:lidar.at + 2 * lidar.count].unflatten(-1, (-1, 2))           # (B, N, 2)
            unseen = xy.norm(dim=-1, keepdim=True) > 0.999 * lidar.reach
            moved = xy + self.shift[n] * move(maps[..., n, :, :], xy)
            moved = moved if hidden is None else moved + self.drift[n] * hidden[:, n, None]
            parts.append(torch.where(unseen, xy, moved).flatten(-2))
        return nearest_first(torch.cat(parts, -1), self.task)

    @torch.no_grad()
    def hold(self, state, action, steps):
        """The best elite's mean state after some steps of one held action: state (B, S), action (B, A) -> (B, S). As
        the maps depend on sensors and action alone, things are moved once, by the product of the maps."""
        size, best = len(self.task.sensors), int(self.elites[0])
        sensors, whole = state[:, :size], torch.eye(2, 3, device=state.device)[..., None, None]   # x -> whole (x, 1)
        for _ in range(steps):
            delta, maps, _ = self.means(sensors, action, slice(best, best + 1))
            sensors = (sensors + self.change * delta[0]).clamp(self.low, self.high)
            maps = self.shift[:, None] * maps[0].permute(2, 3, 1, 0).contiguous()                 # (2, 3, kinds, B)
            whole = whole + maps[:, :1] * whole[0] + maps[:, 1:2] * whole[1]
            whole[:, 2] += maps[:, 2]
        x, y = state[:, size:].unflatten(-1, (len(self.of), 2)).permute(2, 1, 0).contiguous()     # (N, B): long rows
        (a, b, c), (d, e, f) = whole.index_select(2, self.of)
        unseen = x * x + y * y > (0.999 * self.reach[:, None]) ** 2
        xy = torch.stack([torch.where(unseen, x, a * x + b * y + c), torch.where(unseen, y, d * x + e * y + f)])
        return nearest_first(torch.cat([sensors, xy.permute(2, 1, 0).flatten(-2)], -1), self.task)

    def foreseen(self, state):
        """Whether the model can say what comes next: not where something is redrawn when it is reached, as goals are,
        and nearer than any recorded one. state (B, S) -> (B,) bool."""
        return (nearest(state, self.task) >= self.closest).all(-1)

    def disagreement(self, nexts):
        """How far apart the elites' predictions of the sensors lie, in usual changes: nexts (E, B, S) -> (B,)."""
        return (nexts[..., :len(self.task.sensors)].std(0) / self.change).amax(-1)


def nearest(state, task):
    """Distance of the nearest object of each kind: (..., S) -> (..., kinds), m."""
    return torch.stack([state[..., lidar.at:lidar.at + 2].norm(dim=-1) for lidar in task.lidars], -1) if task.lidars \
        else state[..., :0]


def redrawn(state, next_state, task):
    """Whether the nearest object of a kind moved faster than anything can, 5 cm a step: (B, S) x 2 -> (B, kinds)."""
    reach = torch.tensor([lidar.reach for lidar in task.lidars], device=state.device)
    here, there = nearest(state, task), nearest(next_state, task)
    return (here < 0.99 * reach) & ((here - there).abs() > 0.05)


def move(maps, xy):
    """The affine maps' displacement of positions: maps (..., 2, 3), xy (..., N, 2) -> (..., N, 2)."""
    return xy @ maps[..., :2].mT + maps[..., None, :, 2]


def pair_objects(state, next_state, task):
    """Which object is which one step later: displacements (B, N, 2) in m, and which of them to trust (B, N).

    The order by distance changes and lidars show a bearing wrong where objects stand close, so positions are first
    carried along by the velocimeter and the gyroscope; only what is then found within 2 cm counts as the same."""
    turn, shift = -task.dt * next_state[:, 2], task.dt * next_state[:, :2]
    cos, sin = turn.cos(), turn.sin()
    spin = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)           # (B, 2, 2)
    deltas, trusted = [], []
    for lidar in task.lidars:
        here, there = (s[:, lidar.at:lidar.at + 2 * lidar.count].unflatten(-1, (-1, 2)) for s in (state, next_state))
        guess = (here - shift[:, None]) @ spin.mT
        gap, match = torch.cdist(guess, there).min(-1)                                            # (B, N)
        deltas.append(there.gather(1, match[..., None].expand_as(here)) - here)
        trusted.append((gap < 0.02) & (here.norm(dim=-1) < 0.99 * lidar.reach))
    return torch.cat(deltas, 1), torch.cat(trusted, 1)


def dynamics_loss(model, state, action, next_state, delta, trusted):
    """Each member's loss and, for the hold-out, its mean absolute error: batches (E, B, .) -> (E,), (E,).

    beta-NLL (Seitzer et al. 2022, beta = 1/2): the variance's root, detached, weighs each error, so that noisy
    fields neither drown the rest nor are ignored. The absolute error is what early stopping goes by: a few
    wrongly paired objects spoil a held-out likelihood long before the model has learnt all it can."""
    size = len(model.task.sensors)
    mean, spread, maps, blur = model(state, action)
    error = (next_state[..., :size] - state[..., :size]) / model.change - mean
    loss = ((error.square() * (-spread).exp() + spread) * (spread / 2).exp().detach()).mean((1, 2))
    score = error.abs().mean((1, 2))
    for n, (lidar, mine) in enumerate(zip(model.task.lidars, object_slices(model.task))):
        xy = state[..., lidar.at:lidar.at + 2 * lidar.count].unflatten(-1, (-1, 2))               # (E, B, N, 2)
        error = delta[..., mine, :] / model.shift[n] - move(maps[..., n, :, :], xy)
        noise = blur[..., n, None]                                                                # (E, B, 1)
        nll = (error.square().mean(-1) * (-noise).exp() + noise) * (noise / 2).exp().detach()
        weight = trusted[..., mine].to(nll.dtype)
        total = weight.sum((1, 2)).clamp(min=1)
        loss = loss + (nll * weight).sum((1, 2)) / total
        score = score + (error.abs().mean(-1) * weight).sum((1, 2)) / total
    return loss, score


def train_dynamics(data, task, cfg, generator):
    """Fits the ensemble with a hold-out of whole episodes; each member keeps its best weights -> Dynamics.

    data: dict with state, action, next_state (B, .) and episode (B,) on one device."""
    state, action, next_state, device = data["state"], data["action"], data["next_state"], data["state"].device
    size, model = len(task.sensors), Dynamics(task, cfg.ensemble, cfg.hidden // 2).to(device)
    sensors, change = state[:, :size], next_state[:, :size] - state[:, :size]
    delta, trusted = pair_objects(state, next_state, task) if task.lidars else (state[:, :0], state[:, :0])
    # a constant field says nothing: its scale of 1 keeps its change at 0 instead of dividing noise by noise
    model.mean, model.std = sensors.mean(0), torch.where(sensors.std(0) > 1e-5, sensors.std(0), 1)
    model.change = torch.where(change.std(0) > 1e-6, change.std(0), 1)
    # ASSUMED: a roll-out may leave what was recorded by half its range. With a twentieth the double integrator's model
    # braked at speeds above the recorded 1.3 m/s as if they were 1.3, and missed a sixth of what is doomed.
    reach = 0.5 * (sensors.amax(0) - sensors.amin(0))
    model.low, model.high = sensors.amin(0) - reach, sensors.amax(0) + reach
    model.shift = torch.stack([delta[:, mine][trusted[:, mine]].square().mean().sqrt().clamp(min=1e-3)
                               for mine in object_slices(task)]) if task.lidars else model.shift
    jumped = redrawn(state, next_state, task)
    model.closest = torch.where(jumped.float().mean(0) > 1e-4, nearest(state, task).amin(0), 0)
    train, test = ((data["held_out"] == kind).nonzero()[:, 0] for kind in (False, True))
    test = test[torch.randperm(len(test), generator=generator, device=device)[:8192]]
    optimiser = adam(model, rate=2e-2)
    best, kept, stale = torch.full((cfg.ensemble,), math.inf, device=device), None, 0
    fields, epochs = (state, action, next_state, delta, trusted), max(1, round(cfg.model_epochs * cfg.scale))
    for epoch in (bar := progress(range(epochs), "2 dynamics")):
        order = torch.stack([torch.randperm(len(train), generator=generator, device=device)
                             for _ in range(cfg.ensemble)])                                       # (E, B)
        optimiser.rate = 2e-2 * (1 - epoch / epochs)                     # so high that 20 epochs do what 40 did at 3e-3
        for rows in train[order].split(512, 1):
            descend(optimiser, dynamics_loss(model, *(field[rows] for field in fields))[0].sum())
        with torch.no_grad():
            _, score = dynamics_loss(model, *(field[test].expand(cfg.ensemble, *field[test].shape) for field in fields))
        better = score < best * 0.995
        kept = {name: torch.where(better.view(-1, 1, 1), value, kept[name]) if kept else value.clone()
                for name, value in model.net.state_dict().items()}
        best, stale = torch.minimum(score, best), 0 if bool(better.any()) else stale + 1
        bar.set_postfix_str(f"hold-out error {float(best.mean()):.4f}")
        if stale >= 5:
            break
    model.requires_grad_(False).net.load_state_dict(kept)
    model.elites = best.argsort()[:max(1, round(cfg.ensemble * 2 / 3))]
    # ASSUMED: what is still misplaced by 0.2 m/s moves by itself: gremlins by 0.26, hazards, blurred by lidars, by 0.16
    blur = (model(state[test], action[test], model.elites[:1])[3][0] / 2).exp().median(0).values * model.shift
    model.drift = torch.where(blur > 0.2 * task.dt, math.sqrt(2) * blur, 0)
    # ASSUMED: a roll-out is believed as long as the elites differ by at most three times what is usual on real states
    if len(model.elites) > 1:
        model.limit = (3 * model.disagreement(model.step(state[test], action[test])).quantile(0.99)).clamp(min=0.5)
    return model


def object_slices(task):
    """For each lidar, which of the state's N objects are its own."""
    first = [(lidar.at - len(task.sensors)) // 2 for lidar in task.lidars]
    return [slice(at, at + lidar.count) for at, lidar in zip(first, task.lidars)]


# ==== 3. Cost: a predicate written by a language model, which nobody has to trust ====================================
# What may not happen, in words, turned into code that reads an observation. The data need no labels for it, and the
# model's states can be judged as well as recorded ones.


@functools.lru_cache
def load_cost(name):
    """The cost predicate of a task: cost(obs (..., O), action (..., A), next_obs (..., O), margin=0.0) -> (...) of 0.
    and 1. for next_obs, `margin` widening the danger in its own unit (m, m/s). Read from llm_costs/<name>.py, compiled
    and checked. Raises CostError. # FORK: a cost of your own goes here."""
    try:
        return compile_cost((HERE / "llm_costs" / f"{name}.py").read_text(), name)
    except OSError:
        raise CostError(f"there is no cost predicate for {name}: write one with --write-cost") from None


def compile_cost(text, name, data=None):
    """A predicate's source, which may be a stranger's -> the callable that load_cost describes.

    Nothing of it runs before its syntax tree has passed a whitelist; then it has to give 0 or 1 for each row, the same
    twice, monotone in the margin, on made-up steps and on `data`, recorded (obs, action, next_obs). Raises CostError.
    A call costs some milliseconds beside its tensor work, so large batches are cheap and small ones are not."""
    return language.compile_cost(text, get_task(name), data)


def prompt(name):
    """What a language model is told of a task: llm_costs/PROMPT.md with the knowledge that applies, as text."""
    return language.prompt(get_task(name))


def write_cost(name, url, model, key=None, attempts=3, out_dir=None, data=None):
    """Has a language model write a task's predicate: asks the OpenAI-compatible endpoint at url, checks the reply, says
    what was wrong and asks again, and caches the first reply that passes. `data`, (obs, action, next_obs) of recorded
    safe steps, may be flagged to 1%. -> the path. Raises CostError, and ProcoError where nobody answers."""
    return language.write_cost(get_task(name), url, model, key, attempts, out_dir, data)


def danger_distance(cost, obs, action, next_obs, top=1.0):
    """How far next_obs is from danger, in the constraint's own unit (m, m/s): the smallest margin at which the
    predicate calls it unsafe, by bisection. 0 within danger, `top` for all that is farther. -> (B,)"""
    low, high = torch.zeros_like(next_obs[..., 0]), torch.full_like(next_obs[..., 0], top)
    inside = cost(obs, action, next_obs, 0.0) > 0
    for _ in range(8):
        middle = (low + high) / 2
        unsafe = cost(obs, action, next_obs, middle) > 0
        low, high = torch.where(unsafe, low, middle), torch.where(unsafe, middle, high)
    return torch.where(inside, 0, high)


@torch.no_grad()
def conservative_cost(model, cost, state, action, nexts, margin):
    """c^(s, a) = max over the elites i of cost(s, a, s'_i, margin): state (B, S), nexts (E, B, S) -> (B,) 0 or 1."""
    task = model.task
    return cost(decode(state, task), action, decode(nexts, task), margin).amax(0)


@torch.no_grad()
def caution_shares(model, cost, state, action, margin):
    """What makes the cost conservative: of the rows (B, S), (B, A) that it calls unsafe, the shares that only the
    margin and only a minority of the elites call so -> (share unsafe, share by the margin, share by a minority)."""
    obs, nexts = decode(state, model.task), decode(model.step(state, action), model.task)
    wide, plain = (cost(obs, action, nexts, m) for m in (margin, 0.0))                            # (E, B)
    unsafe = wide.amax(0) > 0
    return tuple(float(x.float().mean().nan_to_num())
                 for x in (unsafe, plain.amax(0)[unsafe] == 0, wide.mean(0)[unsafe] < 0.5))


@torch.no_grad()
def model_margin(model, cost, data):
    """Twice the root mean square error of the model's distance to danger one step ahead, over held-out steps nearer
    than 0.5 to danger, in the constraint's unit (m, m/s). # ASSUMED: two sigma, within 0.02 and 0.05."""
    task = model.task
    rows = (data["held_out"] & (data["danger"] < 0.5)).nonzero()[:, 0][:20_000]
    state, action = data["state"][rows], data["action"][rows]
    seen = danger_distance(cost, decode(state, task), action, decode(model.step(state, action)[0], task))
    wrong = seen - data["danger"][rows]
    # errors beyond 0.1 are objects that came into view or were drawn anew, which no margin can cover
    wrong = wrong[wrong.abs() < 0.1]
    return min(max(2 * float(wrong.square().mean().sqrt()), 0.02), 0.05) if len(wrong) else 0.05


# ==== 4. Counterfactual roll-outs: what did not happen ===============================================================
# Steps 2 and 3 together make what D lacks. A roll-out that ends in a violation is an unsafe sample; the steps
# before it that no action could have saved are infeasible ones, which look as harmless as any: step 5 tells.

LINGER = 20     # steps that a roll-out goes on after its first violation: leaving danger must be learnt, too
MOTION = 3      # the first sensors of a state with lidars: velocity x, y and yaw rate
RISKY = 10      # steps before a violation that count as risky, and are drawn more often in training


def displaced(state, task, generator):
    """Starts where nobody ever was: states (B, S) seen from up to 0.5 m beside, with a share of another one's motion.

    ASSUMED. Shifting all that the agent sees is moving the agent; drivers who never come near a hazard, and never
    slowly, leave most of what a filter must judge out of reach of a roll-out of half a second."""
    size, count, device = len(task.sensors), len(state), state.device
    draw = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    bearing, distance = 2 * math.pi * draw(count), 0.5 * draw(count).sqrt()
    shift = torch.stack([bearing.cos(), bearing.sin()], -1) * distance[:, None]
    moving = state[torch.randperm(count, generator=generator, device=device), :MOTION] * draw(count, 1)
    xy = state[:, size:].unflatten(-1, (-1, 2)) + shift[:, None]
    for mine, lidar in zip(object_slices(task), task.lidars):               # what was out of reach stays so
        seen = state[:, lidar.at:lidar.at + 2 * lidar.count].unflatten(-1, (-1, 2))
        xy[:, mine] = torch.where(seen.norm(dim=-1, keepdim=True) > 0.999 * lidar.reach, seen, xy[:, mine])
    return nearest_first(torch.cat([moving, state[:, MOTION:size], xy.flatten(-2)], -1), task)


@torch.no_grad()
def counterfactual_rollouts(model, cost, agent, starts, cfg, margin, generator):
    """D_cf: drives the model from starts (N, S) for cfg.horizon steps -> dict of rows state, action, next_state,
    cost (B, k), one a step of the decision, and risky. # FORK: other behaviours go here.

    Members predict with their means, one elite is drawn for each roll-out (noise on every position would make the
    nearest of many look nearer than it is), and so is a direction of what moves by itself; the conservative cost
    labels; cut is what lies past the model's limit of disagreement, where something would be redrawn, or LINGER steps
    past the first violation. Five behaviours, a fifth of the roll-outs each: the policy with noise, one held random
    action, random actions, the action that Q_f fears most, and the one it fears least."""
    count, device = len(starts), starts.device
    draw = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    behaviour = torch.arange(count, device=device) * 5 // count
    member = torch.randint(len(model.elites), (count,), generator=generator, device=device)
    parts = [(behaviour == b).nonzero()[:, 0] for b in range(5)]
    held, noise = 2 * draw(count, model.task.act_dim) - 1, 0.5 * draw(count, 1)
    hidden = F.normalize(torch.randn(count, model.kinds, 2, generator=generator, device=device), dim=-1)
    state, alive, since, rows = starts, torch.ones(count, dtype=torch.bool, device=device), starts.new_zeros(count), []
    for _ in range(max(1, cfg.horizon // model.task.repeat)):
        renew = draw(count, 1) < 0.3                                    # random, yet not so hasty as to average out
        held[parts[2]] = torch.where(renew, 2 * draw(*held.shape) - 1, held)[parts[2]]
        action = held.clone()
        policy = agent.choose(state[parts[0]], generator, 8)
        action[parts[0]] = policy + noise[parts[0]] * torch.randn(policy.shape, generator=generator, device=device)
        for part, sign in ((parts[3], 1), (parts[4], -1)):
            x = agent.features(state[part])
            options = candidate_actions(agent.propose(x), 8, generator)                           # (M, B, A)
            best = (sign * agent.danger(x, options)[..., 0]).argmax(0)                            # (B,)
            action[part] = options[best, torch.arange(len(part), device=device)]
        action, begin, known, unsafe = action.clamp(-1, 1), state, alive, []
        for _ in range(model.task.repeat):
            nexts = model.step(state, action, hidden)                                             # (E, N, S)
            unsafe.append(conservative_cost(model, cost, state, action, nexts, margin))
            if len(nexts) > 1:
                known = known & (model.disagreement(nexts) <= model.limit)
            state = nexts[member, torch.arange(count, device=device)]
            known = known & model.foreseen(state)
        unsafe = torch.stack(unsafe, -1)                                                          # (N, k)
        rows.append((begin, action, state, unsafe, known))
        since = torch.where((unsafe > 0).any(-1) | (since > 0), since + model.task.repeat, since)
        alive = known & (since <= LINGER)
    state, action, following, unsafe, keep = (torch.stack(column) for column in zip(*rows))       # (H, N, .)
    hit = (unsafe > 0).any(-1) & keep
    ahead = RISKY // model.task.repeat
    risky = F.max_pool1d(F.pad(hit.T[:, None].float(), (0, ahead)), ahead + 1, 1)[:, 0].T         # (H, N)
    return dict(state=state[keep], action=action[keep], next_state=following[keep], cost=unsafe[keep],
                risky=risky[keep] > 0)


# ==== 5. Feasibility: which states and actions still allow safety ====================================================
# V_f(s) = gamma_f^k: a violation k steps ahead that nobody can avoid any more. V_f(s) = 0: somebody can stay safe
# for ever. Between the two lies eps; the boundary V_f = eps is what report.png draws in white.

# ASSUMED: what a plan pays for leaving the cloned policy. With less an agent stands still less often, and errs more.
PLAN_CLONE = 0.15


class Agent(nn.Module):
    """All that a run learns besides the model, and how it acts. Networks see features(state).

    actor        a = tanh(actor(s)), the policy's proposal             clone    the same, cloned from D, kept as it was
    q_r          twin reward critics                                   q_r_slow their slow copy, for targets
    q_s          twin safety critics with two outputs: Q_f, the feasibility value, and Q_c, the discounted cumulative
                 cost (times 1 - gamma_f, so in [0, 1], too)
    v_s          V_f and V_c, the least that an action can make of Q_f and Q_c
    log_lam      logarithm of the multiplier lambda"""

    def __init__(self, task, cfg, data=None):
        super().__init__()
        self.task, self.eps, self.gamma = task, cfg.eps, cfg.gamma
        self.candidates = cfg.candidates if cfg.counterfactual or cfg.algorithm == "fisor" else 0
        size, hidden = len(task.sensors), cfg.hidden
        sensors = data["state"][:, :size] if data else torch.ones(2, size)
        std = sensors.std(0)
        self.register_buffer("mean", sensors.mean(0))
        self.register_buffer("std", torch.where(std > 1e-5, std, 1))
        width, acts = self.features(torch.zeros(1, task.state_dim, device=sensors.device)).shape[-1], task.act_dim
        net = lambda inputs, outputs, members=1: Mlp([inputs, hidden, hidden, outputs], members)
        self.actor, self.clone = net(width, acts), net(width, acts)
        self.q_r, self.q_r_slow = net(width + acts, 1, 2), net(width + acts, 1, 2)
        self.q_s, self.v_s = net(width + acts, 2, 2), net(width, 2)
        self.register_buffer("log_lam", torch.tensor(math.log(10.0)))
        self.register_buffer("q_scale", torch.tensor(1.0))      # mean |Q_r| on D
        self.look_ahead, self.model = cfg.look_ahead, None
        self.q_r_slow.load_state_dict(self.q_r.state_dict())
        self.clone.load_state_dict(self.actor.state_dict())
        self.q_r_slow.requires_grad_(False)
        self.to(sensors.device)

    def features(self, state):
        """What networks are fed: sensors standardised; of each object its position, its distance, and how close
        it is on scales of 30 and 10 cm (a danger is 20 cm wide); for the circle, where the agent is in the world.
        (..., S) -> (..., F)"""
        size = len(self.task.sensors)
        parts = [(state[..., :size] - self.mean) / self.std]
        if self.task.lidars:
            xy = state[..., size:].unflatten(-1, (-1, 2))
            distance = xy.norm(dim=-1)
            parts += [xy.flatten(-2), distance, 2 * torch.exp(-3 * distance), 8 * torch.exp(-10 * distance)]
            if self.task.lidars[0].name == "circle":                    # compass = -0.5 (sin yaw, cos yaw)
                sin, cos, x, y = -2 * state[..., 3], -2 * state[..., 4], -xy[..., 0, 0], -xy[..., 0, 1]
                parts.append(torch.stack([cos * x - sin * y, sin * x + cos * y], -1))
        return torch.cat(parts, -1)

    def propose(self, x):
        """The bare actor: x (B, F), features of states -> (B, A) in [-1, 1]."""
        return torch.tanh(self.actor(x)[0])

    def danger(self, x, actions):
        """The graver of the twins' Q_f and Q_c: x (B, F), actions (..., B, A) -> (..., B, 2)."""
        inputs = torch.cat([x.expand(*actions.shape[:-1], x.shape[-1]), actions], -1)
        return self.q_s(inputs.flatten(0, -2)).amax(0).unflatten(0, inputs.shape[:-1])

    def choose(self, state, generator=None, count=None):
        """The policy with its feasibility filter: state (B, S) -> (B, A).

        Like FISOR, which takes the safest of 16 sampled actions, the actor proposes and Q_f chooses: of `count`
        candidates the nearest to the proposal among those with Q_f <= eps; if there is none, that with the least Q_c.
        Choosing by Q_r instead finds its errors: it fell from 48 to 15 on PointCircle1."""
        x, count = self.features(state), self.candidates if count is None else count
        return self.filtered(x, generator, count)[0] if count else self.propose(x)

    def filtered(self, x, generator=None, count=None):
        """choose() on features x (B, F) -> its action (B, A), the candidates (M, B, A), which are feasible (M, B)."""
        generator, proposal = generator or torch.Generator(x.device).manual_seed(0), self.propose(x)
        options = candidate_actions(proposal, count or self.candidates, generator)                # (M, B, A)
        q_f, q_c = self.danger(x, options).unbind(-1)                                             # (M, B)
        away, feasible = (options - proposal).square().sum(-1), q_f <= self.eps
        best = torch.where(feasible.any(0), torch.where(feasible, away, math.inf).argmin(0), q_c.argmin(0))
        return options[best, torch.arange(len(x), device=x.device)], options, feasible

    def imagine(self, model, state):
        """The policy with look-ahead: state (B, S) -> (B, A).

        Each of the filter's candidates begins two plans or three: held throughout; held for a drawn number of
        decisions, after which the actor drives; and, every second one, followed by another drawn action. The best model
        drives all. Ruled out is what Q_f calls infeasible at its beginning or V_f on its way; of the others the best by

            gamma^t Q_r(end) / |Q_r| - PLAN_CLONE sum over its decisions of gamma^t (a - clone(s))^2

        is begun: TD3+BC's objective, for plans. Where none is left, choose() decides.
        # DEVIATION: PROCO's policy does not plan. But steering around a hazard is no smooth function of one
        observation: clones and actors of ours drove over hazards or, filtered, came to rest before them (README)."""
        generator, x = torch.Generator(state.device).manual_seed(0), self.features(state)
        draw = lambda *shape: torch.rand(*shape, generator=generator, device=state.device)
        chosen, options, feasible = self.filtered(x, generator)
        hope = feasible.any(0).nonzero()[:, 0]          # where nothing is feasible there is nothing to plan
        if not len(hope):
            return chosen
        state, x, options, feasible = state[hope], x[hope], options[:, hope], feasible[:, hope]
        count, size, last = len(options), options.shape[-1], self.look_ahead
        # half of the numbers are -1, 0 or 1: straight on and full speed, which agents often want, are drawn at all
        second = torch.where(draw(count, size) < 0.5, 2 * draw(count, size) - 1, (3 * draw(count, size)).floor() - 1)
        leave = 2 + (draw(2, count) * (last - 2)).long()                # when the actor, when the second action sets in
        leave[1, ::2] = 0                               # never
        begun, who = feasible.nonzero(as_tuple=True)    # a row a plan: how it begins and whose it is
        # kind: 0, the first action is held; 1, the actor drives; 2, the second action
        kind, action, here, x = torch.zeros_like(begun), options[begun, who], state[who], x[who]
        alive, away, weight, discount = kind == 0, 0, torch.ones_like(x[:, 0]), self.gamma ** self.task.repeat
        for t in range(last):
            driven = (kind == 1).nonzero()[:, 0]
            action[driven] = self.propose(x[driven])
            away = away + weight * (action - torch.tanh(self.clone(x)[0])).square().mean(-1)
            there = model.hold(here, action, self.task.repeat)
            alive = alive & model.foreseen(there)               # what comes where a goal is redrawn, Q_r knows from D
            x_there = self.features(there)
            here, x = (torch.where(alive[:, None], *pair) for pair in ((there, here), (x_there, x)))
            weight = torch.where(alive, weight * discount, weight)
            keep = (~alive | (self.v_s(x_there)[0, :, 0] <= self.eps)).nonzero()[:, 0]
            # plans that begin alike are driven as one until they part
            part = [keep[(kind[keep] == 0) & (leave[n, begun[keep]] == t + 1)] for n in (0, 1)]
            rows = torch.cat([keep, *part])
            kind, begun, who, here, x, action, alive, away, weight = (
                v[rows] for v in (kind, begun, who, here, x, action, alive, away, weight))
            kind[len(keep):] = 1
            kind[len(rows) - len(part[1]):] = 2
            action = torch.where(kind[:, None] == 2, second[begun], action)
        worth = self.q_r(torch.cat([x, self.propose(x)], -1)).amin(0)[:, 0]
        score = x.new_full((3, *feasible.shape), -math.inf)
        score[kind, begun, who] = weight * worth / self.q_scale - PLAN_CLONE * away
        score, best = score.flatten(0, 1).max(0)
        planned = options[best % count, torch.arange(len(hope), device=state.device)]
        chosen[hope] = torch.where(score[:, None] > -math.inf, planned, chosen[hope])
        return chosen

    @property
    def plans(self):
        """Whether acting looks ahead: with a model, decisions to look, and candidates."""
        return bool(self.model is not None and self.look_ahead and self.candidates)

    def _state(self, obs):
        return torch.as_tensor(encode(np.asarray(obs), self.task), device=self.mean.device)

    @torch.inference_mode()
    def act(self, obs, held=None):
        """Actions for observations: obs (B, O) -> (B, A), a float32 array in [-1, 1]. held (B, A): the decisions under
        way, which stay where Q_f still calls them feasible; a decision is meant for task.repeat steps."""
        state, decide = self._state(obs), functools.partial(self.imagine, self.model) if self.plans else self.choose
        if held is None:
            return decide(state).cpu().numpy()
        action = torch.as_tensor(held, device=state.device).clone()
        revise = self.danger(self.features(state), action)[:, 0] > self.eps
        if revise.any():
            action[revise] = decide(state[revise])
        return action.cpu().numpy()

    @torch.inference_mode()
    def feasibility(self, obs):
        """V_f of observations: obs (B, O) -> (B,) in [0, 1], a float32 array; feasible where it is <= self.eps."""
        return self.v_s(self.features(self._state(obs)))[0, :, 0].clamp(0, 1).cpu().numpy()


def candidate_actions(proposal, count, generator):
    """Actions to choose from: proposal (B, A) -> (M, B, A). The proposal, the corners of the action box (bang-bang
    agents need little else), noisy copies of the proposal and random actions, half each."""
    size, device = proposal.shape[-1], proposal.device
    corners = torch.cartesian_prod(*[torch.arange(-1.0, 2, 2, device=device)] * size).view(-1, size) if size <= 2 \
        else torch.randint(0, 2, (4, size), generator=generator, device=device) * 2.0 - 1
    rest = max(0, count - 1 - len(corners))
    noise = torch.randn(rest // 2, 1, size, generator=generator, device=device)
    fresh = torch.rand(rest - rest // 2, size, generator=generator, device=device) * 2 - 1
    shared = torch.cat([corners, fresh])[:, None].expand(-1, *proposal.shape)
    return torch.cat([proposal[None], (proposal + 0.4 * noise).clamp(-1, 1), shared])


def feasibility_loss(agent, x, action, next_x, cost, gamma_f, generator):
    """How far Q and V are from what they should be, on rows of D and D_cf: x, next_x (B, F), action (B, A) and the cost
    (B, k) of the k steps which the decision lasts. # FORK: other safety critics go here.

        V(s')     <- min over candidates a' of Q(s', a')
        Q_f(s, a) <- max(max_j gamma_f^j c^_j, gamma_f^k V_f(s'))         (Fisac et al. 2019; Zheng et al. 2024)
        Q_c(s, a) <- (1 - gamma_f) sum_j gamma_f^j c^_j + gamma_f^k V_c(s')

    where Q learns from the minimum itself, not from the network V, which lags behind it and is for acting and reports.

    For k = 1 and c^ of 0 or 1 the first is FISOR's (1 - gamma_f) c^ + gamma_f max(c^, V_f(s')). Outputs are linear and
    targets clamped to [0, 1]: a sigmoid that starts low hardly ever rises.
    # DEVIATION: V takes the minimum over actions sampled in the whole box instead of FISOR's low expectile over the
    actions in the data. D_cf holds actions of all kinds, so Q is known over the box; and where one action in four saves
    a state, the 0.1-expectile still stands at a quarter of the doomed value, at every step anew."""
    with torch.no_grad():
        weight = gamma_f ** torch.arange(cost.shape[-1], device=cost.device)                      # (k,)
        now = torch.stack([(weight * cost).amax(-1), (1 - gamma_f) * (weight * cost).sum(-1)], -1)
        options = candidate_actions(agent.propose(next_x), 5, generator)
        least = agent.danger(next_x, options).amin(0).clamp(0, 1)                                 # (B, 2)
        later = gamma_f ** cost.shape[-1] * least
        target = torch.stack([torch.maximum(now[:, 0], later[:, 0]), now[:, 1] + later[:, 1]], -1)    # (B, 2)
    q = agent.q_s(torch.cat([x, action], -1))                                                     # (2, B, 2)
    v = agent.v_s(next_x)[0]
    return (q - target).square().mean() * 2 + (v - least).square().mean()


# ==== 6. Policy: an offline algorithm, on D and, with PROCO, on D_cf ==================================================
# All algorithms share networks, data and updates, and differ in one function: lagrangian_loss, fisor_loss,
# cpq_loss. Each runs on D alone, or with PROCO under it on D and D_cf, which with_counterfactuals joins.

CPQ_LIMIT = 0.1     # ASSUMED: Q_c, in [0, 1], above which CPQ calls an action unsafe: a tenth of its future in danger


def with_counterfactuals(d, cf):
    """What PROCO adds to an algorithm, all in one place: beside rows of D, rows of D_cf with the conservative cost.

    d, cf: dicts of x, action, next_x, cost (B, .), cf with driver (B, A), too; cf None for an algorithm alone. -> the
    same rows with driver, what somebody sensible did there, and trust (B,), how far to follow that. On D_cf, where
    nobody drove, the cloned policy stands in at half the weight (ASSUMED). Without it the actor follows Q_r's errors
    where there is no record: PointCircle1 fell from 48 to 32."""
    rows = dict(d, driver=d["action"], trust=torch.ones_like(d["action"][:, 0]))
    if cf is None:
        return rows
    cf = dict(cf, trust=torch.full_like(cf["action"][:, 0], 0.5))
    return {key: torch.cat([rows[key], cf[key]]) for key in cf}


def reward_critic_loss(agent, x, action, reward, next_x, done, gamma, generator, limit=None):
    """TD3's twin critics (Fujimoto et al. 2018) on D, with smoothed target actions; reward and done (B,). CPQ (Xu et
    al. 2022) counts what follows only where the next action's Q_c is within a limit. # DEVIATION: the actor has no slow
    copy, as cloning holds it still."""
    with torch.no_grad():
        noise = 0.2 * torch.randn(action.shape, generator=generator, device=action.device)
        following = ((proposal := agent.propose(next_x)) + noise.clamp(-0.5, 0.5)).clamp(-1, 1)
        worst = agent.q_r_slow(torch.cat([next_x, following], -1)).amin(0)[:, 0]
        if limit is not None:
            worst = worst * (agent.danger(next_x, proposal)[..., 1] <= limit)
        target = reward + gamma * (1 - done) * worst
    return (agent.q_r(torch.cat([x, action], -1))[..., 0] - target).square().mean() * 2


def penalty(agent, x, driver, generator):
    """CPQ's penalised cost critic: Q_c of actions that nobody takes is pushed up. # DEVIATION: far from the driver's
    action is what CPQ measures with a variational auto-encoder. Nearer than 1 lie actions that drivers take in the same
    place: with 0.5 Q_c called a fifth of D unsafe, and the reward critics' targets jumped (loss 60 instead of 1.5)."""
    action = 2 * torch.rand(driver.shape, generator=generator, device=driver.device) - 1
    unusual = ((action - driver).square().mean(-1) > 1).float()
    q_c = agent.q_s(torch.cat([x, action], -1))[..., 1]                                           # (2, B)
    return 0.1 * (unusual * (1 - q_c).clamp(min=0)).mean()


def actor_loss(agent, rows, cfg):
    """The actor's loss of an algorithm -> (loss, mean violation of the Lagrangian's constraint or None). rows:
    with_counterfactuals'. The functions below get x (B, F), the actor's actions pi (B, A), TD3+BC's loss gain
    (B,) and its cloning term clone (B,). # FORK: another algorithm is another function here."""
    x = rows["x"]
    pi = agent.propose(x)
    q_r = agent.q_r(torch.cat([x, pi], -1), slice(1)).flatten()                                   # the first twin's
    on_d = (rows["trust"] == 1).float()
    agent.q_scale.copy_((on_d @ q_r.detach().abs() / on_d.sum()).clamp(min=1e-6))
    clone = rows["trust"] * (pi - rows["driver"]).square().mean(-1)
    gain = -q_r / agent.q_scale + 2 * cfg.bc_weight * clone                                       # TD3+BC
    if cfg.algorithm == "td3bc":
        return gain.mean(), None
    if cfg.algorithm == "fisor":
        return fisor_loss(agent, rows, pi, clone)
    if cfg.algorithm == "cpq":
        return cpq_loss(agent, x, pi, gain, clone, cfg)
    return lagrangian_loss(agent, x, pi, gain)


def lagrangian_loss(agent, x, pi, gain):
    """Lagrangian TD3+BC (Fujimoto and Gu 2021).

        feasible states:    - Q_r / |Q_r| + bc_weight (pi - a)^2 + lam max(Q_f(s, pi) - eps, 0)
        infeasible states:  Q_c(s, pi), the way back

    # DEVIATION: the constraint is a hinge. With Q_f - eps itself, the many states that satisfy it pay for the few that
    break it: lambda fell to zero and the bare actor crashed."""
    q_f, q_c = agent.q_s(torch.cat([x, pi], -1)).amax(0).unbind(-1)
    feasible = (agent.v_s(x)[0, :, 0] <= agent.eps).detach()
    violation = (q_f - agent.eps).clamp(min=0)
    loss = torch.where(feasible, gain + agent.log_lam.exp().detach() * violation, 20 * q_c).mean()
    return loss, (violation.detach() * feasible).sum() / feasible.sum().clamp(min=1)


def fisor_loss(agent, rows, pi, clone):
    """FISOR (Zheng et al. 2024): regression on actions weighted by exp of their advantage.

        feasible states:    exp(3 A_r / |Q_r|) 1[Q_f(s, a) <= eps] (pi - a)^2,    A_r = Q_r(s, a) - Q_r(s, pi)
        infeasible states:  exp(20 (V_c(s) - Q_c(s, a))) (pi - a)^2

    # DEVIATION: a deterministic actor instead of a diffusion model, A_r against the policy instead of an expectile."""
    with torch.no_grad():
        x = rows["x"]
        driven = torch.cat([x, rows["driver"]], -1)
        better = agent.q_r(driven).amin(0)[:, 0] - agent.q_r(torch.cat([x, pi], -1)).amin(0)[:, 0]
        weight = (3 * better / agent.q_scale).exp().clamp(max=20) * (agent.q_s(driven).amax(0)[:, 0] <= agent.eps)
        v_f, v_c = agent.v_s(x)[0].unbind(-1)
        back = (20 * (v_c - agent.q_s(torch.cat([x, rows["action"]], -1)).amax(0)[:, 1])).exp().clamp(max=20)
    return torch.where(v_f <= agent.eps, weight * clone, back * (pi - rows["action"]).square().mean(-1)).mean(), None


def cpq_loss(agent, x, pi, gain, clone, cfg):
    """CPQ (Xu et al. 2022): - 1[Q_c(s, pi) <= limit] Q_r / |Q_r|. # DEVIATION: with the cloning term of TD3+BC, as a
    deterministic actor without it leaves the data at once."""
    allowed = agent.q_s(torch.cat([x, pi], -1)).amax(0)[:, 1].detach() <= CPQ_LIMIT
    return torch.where(allowed, gain, 2 * cfg.bc_weight * clone).mean(), None


def dual_step(agent, violation, tolerance=0.003):
    """Dual ascent: lambda rises while the mean of max(Q_f(s, pi) - eps, 0) over feasible states is above the
    tolerance, and falls below it; within [0.1, 100]. violation: a number, as a tensor."""
    with torch.no_grad():
        agent.log_lam += 0.3 * (violation - tolerance).clamp(-0.003, 0.03)
        agent.log_lam.clamp_(math.log(0.1), math.log(100))


# ==== 7. Evaluation in the simulator =================================================================================
# The last weights, never the best ones; the same episode seeds for every method; the model's world is not trusted.


def drive(agent, name, seeds, act=None, bar=None):
    """Episodes with the given seeds, in lockstep so that the agent sees a batch -> for each its seed, ret, cost,
    length, obs (T, O), actions (T, A), costs (T,), path (T, 2) and dangers (N, 3)."""
    envs = [make_env.__wrapped__(name) for _ in seeds]
    obs = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds)])
    rows = [SimpleNamespace(seed=int(seed), ret=0.0, cost=0.0, length=0, obs=[], costs=[], actions=[], path=[],
                            dangers=dangers(env)) for seed, env in zip(seeds, envs)]
    # DEVIATION: with look-ahead an action is a decision, kept for as long as decisions last in training unless Q_f
    # revises it. Deciding anew at each step, an agent changes its mind: PointGoal1 fell from 21.1 to 15.5 (cost 0).
    every = agent.task.repeat if act is None and agent.plans else 1
    alive = list(range(len(envs)))
    while alive:
        held, going = [np.stack([rows[i].actions[-1] for i in alive])] if rows[alive[0]].length % every else [], []
        if bar:
            bar.update()
        for i, action in zip(alive, (act or agent.act)(obs[alive], *held)):
            rows[i].obs.append(obs[i].astype(np.float32))
            rows[i].actions.append(action)
            obs[i], reward, cost, terminated, truncated, _ = envs[i].step(action)
            rows[i].ret, rows[i].cost, rows[i].length = rows[i].ret + reward, rows[i].cost + cost, rows[i].length + 1
            rows[i].costs.append(cost)
            rows[i].path.append(place(envs[i]))
            if not (terminated or truncated):
                going.append(i)
        alive = going
    for row in rows:                            # thousands of small arrays would take long to send
        row.__dict__.update({key: np.array(getattr(row, key)) for key in ("obs", "costs", "actions", "path")})
    return rows


def drive_checkpoint(folder, name, seeds, behaviour, first):
    """One worker's share of an evaluation: behaviour is policy, filter (Q_f alone), bare or clone. Who has the first
    seed shows a bar for all."""
    torch.set_num_threads(1)
    agent = load_run(folder)
    if behaviour in ("bare", "filter"):
        agent.look_ahead, agent.candidates = 0, agent.candidates * (behaviour == "filter")
    act = None
    if behaviour == "clone":
        act = lambda obs: torch.tanh(agent.clone(agent.features(agent._state(obs)))[0]).detach().numpy()
    with progress(None, "7 evaluation", total=agent.task.steps, disable=seeds[0] != first) as bar:
        return drive(agent, name, seeds, act, bar)


def evaluate(folder, name, episodes, first_seed=10_000, behaviour="policy"):
    """Drives a run's agent in the simulator, in parallel processes: the last weights, the same episode seeds for
    every method -> list of episodes, by seed."""
    shares = [range(first_seed, first_seed + episodes)[w::WORKERS] for w in range(min(WORKERS, episodes))]
    work = functools.partial(drive_checkpoint, str(folder), name, behaviour=behaviour, first=first_seed)
    if name == "DoubleIntegrator":
        rows = [row for share in shares for row in work(share)]
    else:
        pool = ProcessPoolExecutor(len(shares), WORKER_START)
        rows = [row for part in pool.map(work, shares) for row in part]
        pool.shutdown(wait=False)               # they take half a second to leave
    return sorted(rows, key=lambda row: row.seed)


# ==== 8. A run: train, evaluate, keep ================================================================================

WARNINGS = []                                   # what results.json must tell besides the numbers
FORMAT = 3                                      # of checkpoint.pt, to be raised when older ones can't be read


def warn(text):
    """Says loudly, and for results.json, that the program took another way than the reader may expect."""
    WARNINGS.append(text)
    tqdm.write(f"WARNING: {text}", file=sys.stderr)


def progress(iterable, desc, **more):
    """A progress bar with what is left."""
    return tqdm(iterable, desc, dynamic_ncols=True, mininterval=0.5, file=sys.stdout, **more)


@contextlib.contextmanager
def whole(path):
    """A temporary name beside path, renamed to it at the end: readers see the whole file or none."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise ProcoError(f"can't write {path}: {error.strerror or error}; check the folder and the disk") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def adam(*nets, rate=3e-4):
    """Adam (Kingma and Ba 2015) for the parameters of several networks: what it keeps between two steps."""
    params = [param for net in nets for param in net.parameters()]
    mean, square = ([torch.zeros_like(p, requires_grad=False) for p in params] for _ in range(2))
    return SimpleNamespace(params=params, peak=rate, rate=rate, step=params[0].new_zeros(()), mean=mean, square=square)


@torch.no_grad()
def descend(optimiser, loss):
    """One step of Adam; gradients of other networks that the loss passes through are not computed. torch.optim.Adam
    calls the same kernel; what it does around that takes twice as long on a CPU, with networks as small as these."""
    o, gradients = optimiser, torch.autograd.grad(loss, optimiser.params)
    o.step += 1
    torch._fused_adam_(o.params, gradients, o.mean, o.square, [], [o.step] * len(o.params), lr=o.rate, beta1=0.9,
                       beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)


def decisions(data, task, gamma, margin=None):
    """D in decisions that last k = task.repeat steps: every stretch of k recorded steps within an episode, with the
    mean action, the discounted reward and the cost of each step (B, k): with a margin the conservative one, else as
    recorded.

    # DEVIATION: a control step of 0.02 s changes next to nothing, so the values of its actions differ by less than a
    network's error, and 25 steps of bootstrapping lie between a danger and the last chance to brake."""
    k, episode = task.repeat, data["episode"]
    first = (episode[k - 1:] == episode[:len(episode) - k + 1]).nonzero()[:, 0]
    rows = first[:, None] + torch.arange(k, device=first.device)                                  # (B, k)
    weight, danger = gamma ** torch.arange(k, device=first.device), data["danger"][rows]
    return dict(state=data["state"][first], action=data["action"][rows].mean(1), danger=danger.amin(1),
                next_state=data["next_state"][rows[:, -1]],
                reward=(weight * data["reward"][rows]).sum(1), done=data["done"][rows].amax(1),
                cost=(data["cost"][rows] > 0 if margin is None else danger <= margin).float())


class Learner:
    """The training of one run, as what a checkpoint must hold and one update. Sections 4 to 6 do the work."""

    def __init__(self, cfg, task, data, cost, model, margin):
        self.cfg, self.task, self.data, self.cost, self.model, self.margin = cfg, task, data, cost, model, margin
        self.generator = torch.Generator(data["state"].device).manual_seed(cfg.seed + 2)
        self.agent = agent = Agent(task, cfg, data)
        self.optimisers = dict(clone=adam(agent.clone, rate=1e-3), actor=adam(agent.actor), q_r=adam(agent.q_r),
                               safety=adam(agent.q_s, agent.v_s, rate=1e-3))
        self.slow, self.fast = ([p.data for p in net.parameters()] for net in (agent.q_r_slow, agent.q_r))
        self.step, self.cf, self.snapshots, self.metrics, self.graphs = 0, None, [], [], None
        if cfg.device == "cuda-graphs":         # what a graph reads must stay where it is: the learning rates, too
            self.graphs = {}
            for optimiser in self.optimisers.values():
                optimiser.rate = agent.mean.new_tensor(optimiser.peak)
        count = lambda updates: max(1, round(updates * cfg.scale))
        self.clone_updates = count(cfg.clone_updates)
        self.alone = count(cfg.feasibility_updates) if cfg.counterfactual else 0
        self.updates = 0 if cfg.method == "bc" else self.alone + count(cfg.updates)
        self.data = data = decisions(data, task, cfg.gamma, margin if cfg.counterfactual else None)
        self.near = data["danger"].argsort()[:max(1, len(data["danger"]) // 4)]
        data["reward"] = data["reward"] / data["reward"].std().clamp(min=1e-6)
        self.see(data)

    def see(self, rows):
        """Adds to rows what the networks see of them, once for all updates."""
        rows["x"], rows["next_x"] = self.agent.features(rows["state"]), self.agent.features(rows["next_state"])

    def draw(self, count, rows):
        return torch.randint(rows, (count,), generator=self.generator, device=self.data["state"].device)

    def clone_update(self):
        """Behaviour cloning: the method bc, the first policy that is rolled out, and what --diagnose drives."""
        rows = self.draw(self.cfg.batch, len(self.data["state"]))
        agent, x, action = self.agent, self.data["x"].index_select(0, rows), self.data["action"].index_select(0, rows)
        loss = (torch.tanh(agent.clone(x)[0]) - action).square().mean()
        descend(self.optimisers["clone"], loss)
        if self.step == self.clone_updates - 1:
            agent.actor.load_state_dict(agent.clone.state_dict())
        return dict(clone_loss=loss.detach())

    def roll_out(self):
        """One round of counterfactual roll-outs with the current policy, added to D_cf. Starts: half of them recorded
        states, half of them off every track (displaced, or from earlier roll-outs where there is nothing to displace);
        in either half every second one from the quarter of D nearest to danger."""
        cfg, data = self.cfg, self.data
        self.snapshots.append((copy.deepcopy(self.agent.state_dict()), self.generator.get_state()))
        count = max(20, round(cfg.rollouts * cfg.scale) // ROUNDS)
        rows = torch.cat([self.draw(count // 2, len(data["state"])),
                          self.near[self.draw(count - count // 2, len(self.near))]])
        rows = rows[torch.randperm(count, generator=self.generator, device=rows.device)]
        starts, half = data["state"][rows], count // 2
        if self.task.lidars:
            starts[:half] = displaced(starts[:half], self.task, self.generator)
        elif self.task.state_dim == 2:          # a plane can be covered as far as the record goes
            low, high = data["state"].amin(0), data["state"].amax(0)
            spot = torch.rand(starts[:half].shape, generator=self.generator, device=low.device)
            starts[:half] = low + (high - low) * spot
        elif self.cf:
            starts[:half] = self.cf["state"][self.draw(half, len(self.cf["state"]))]
        starts = starts[torch.randperm(count, generator=self.generator, device=rows.device)]
        new = counterfactual_rollouts(self.model, self.cost, self.agent, starts, cfg, self.margin, self.generator)
        rows = self.draw(5_000, len(new["state"]))
        shares = caution_shares(self.model, self.cost, new["state"][rows], new["action"][rows], self.margin)
        tqdm.write("4 roll-outs: {} rows, {:.1%} unsafe; of these {:.0%} only by the margin, {:.0%} only by a minority "
                   "of the elites; {:.1%} at most {} steps before".format(len(new["state"]), *shares,
                                                                       float(new["risky"].float().mean()), RISKY))
        self.see(new)
        new["driver"] = torch.tanh(self.agent.clone(new["x"])[0]).detach()
        self.cf = {key: torch.cat([self.cf[key], new[key]]) for key in new} if self.cf else new
        self.risky = self.cf["risky"].nonzero()[:, 0]
        self.graphs = None if self.graphs is None else {}               # they knew the smaller D_cf

    def sample_cf(self, count):
        """Rows of D_cf: half at random, half from those at or before a violation."""
        rows = self.draw(count - count // 2, len(self.cf["state"]))
        if len(self.risky):
            rows = torch.cat([rows, self.risky[self.draw(count // 2, len(self.risky))]])
        return {key: self.cf[key].index_select(0, rows) for key in ("x", "action", "next_x", "cost", "driver")}

    def update(self):
        """One update: now and then a round of roll-outs, and at every step what learn() does."""
        cfg, step = self.cfg, self.step - self.clone_updates
        if cfg.counterfactual and cfg.horizon and step % math.ceil(self.updates / ROUNDS) == 0:
            self.roll_out()
        for optimiser in self.optimisers.values():                      # constant, then falling to nothing
            rate = optimiser.peak * min(1, 2 * (1 - step / self.updates))
            optimiser.rate = rate if self.graphs is None else optimiser.rate.fill_(rate)
        policy = step % 2 == 0 and step >= self.alone
        return self.learn(policy) if self.graphs is None else self.replay(policy)

    def replay(self, policy):
        """learn(policy) as a CUDA graph: its kernels recorded once and started as one, with new random numbers each
        time. Recorded after two eager updates, in which optimisers and libraries make what they keep, and anew when
        D_cf has grown. Where recording fails all updates are eager."""
        known = self.graphs.get(policy, 0)
        if known in (0, 1):
            self.graphs[policy], stream = known + 1, torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                logs = self.learn(policy)
            torch.cuda.current_stream().wait_stream(stream)
            return logs
        if known == 2:
            graph = torch.cuda.CUDAGraph()
            try:
                graph.register_generator_state(self.generator)
                with torch.cuda.graph(graph):
                    known = graph, self.learn(policy)
            except (RuntimeError, AttributeError) as error:
                warn(f"no CUDA graph of the updates ({error}); they go on one kernel after the other")
                self.graphs = None
                return self.learn(policy)
            self.graphs[policy] = known
        known[0].replay()
        return known[1]

    def learn(self, policy):
        """One step of the safety critics, which learn alone at first (a policy that learns beside an unripe Q_f finds
        its errors and keeps them); with `policy`, every second time (TD3), of reward critics, actor and multiplier."""
        cfg, agent, logs = self.cfg, self.agent, {}
        cf = self.sample_cf(cfg.batch) if self.cf else None
        chosen = self.draw(cfg.batch, len(self.data["state"]))
        d = {key: self.data[key].index_select(0, chosen) for key in ("x", "action", "reward", "next_x", "done", "cost")}
        rows = with_counterfactuals(d, cf)
        if cfg.algorithm != "td3bc":
            mostly = slice(cfg.batch // 2 if cf else 0, None)           # half as many rows of D as of D_cf
            loss = feasibility_loss(agent, *(rows[key][mostly] for key in ("x", "action", "next_x", "cost")),
                                    cfg.gamma_f, self.generator)
            logs["feasibility_loss"] = loss.detach()
            if cfg.algorithm == "cpq":
                loss = loss + penalty(agent, d["x"], d["action"], self.generator)
            descend(self.optimisers["safety"], loss)
        if policy:
            loss = reward_critic_loss(agent, *(d[key] for key in ("x", "action", "reward", "next_x", "done")),
                                      cfg.gamma ** self.task.repeat, self.generator,
                                      CPQ_LIMIT if cfg.algorithm == "cpq" else None)
            descend(self.optimisers["q_r"], loss)
            torch._foreach_lerp_(self.slow, self.fast, 0.02)
            logs["reward_loss"] = loss.detach()
            loss, violation = actor_loss(agent, rows, cfg)
            descend(self.optimisers["actor"], loss)
            logs["actor_loss"] = loss.detach()
            if violation is not None:
                dual_step(agent, violation)
                logs |= dict(lam=agent.log_lam.exp().clone(), violation=violation)
            if cfg.counterfactual:
                with torch.no_grad():
                    v_f = agent.v_s(d["x"])[0, :, 0]
                    logs["infeasible_share"] = (v_f > agent.eps).float().mean()
        return logs

    def state(self):
        return dict(step=self.step, agent=self.agent.state_dict(), generator=self.generator.get_state(),
                    optimisers={name: (o.step, o.mean, o.square) for name, o in self.optimisers.items()},
                    snapshots=self.snapshots, metrics=self.metrics)

    def restore(self, saved):
        """Takes up a checkpoint. D_cf is not kept but rolled out again, from the agents and the random states of the
        time, which is exact and takes seconds."""
        finished = saved["step"] == self.clone_updates + self.updates
        for agent, random in () if finished else saved["snapshots"]:
            self.agent.load_state_dict(agent)
            self.generator.set_state(random.cpu())
            self.roll_out()
        self.snapshots, self.step, self.metrics = saved["snapshots"], saved["step"], saved["metrics"]
        self.agent.load_state_dict(saved["agent"])
        self.generator.set_state(saved["generator"].cpu())                      # a GPU's, too, is read from there
        for name, optimiser in self.optimisers.items():
            optimiser.step, optimiser.mean, optimiser.square = saved["optimisers"][name]


@contextlib.contextmanager
def interruptible():
    """A list that Ctrl-C and SIGTERM fill, so that training leaves between two updates with a checkpoint."""
    asked, before = [], {}
    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):       # not in the main thread: whoever is in charge there decides
                before[name] = signal.signal(name, lambda number, frame: asked.append(number))
        yield asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def train(cfg, task, data, cost, folder, resume):
    """Steps 2 to 6 -> (Learner, seconds of each step, the dynamics report). Checkpoints in folder/checkpoint.pt; with
    resume it goes on from there, on a CPU bit for bit as if it had never stopped."""
    path, seconds, saved = folder / "checkpoint.pt", {}, None
    if resume and path.exists():
        saved = load_checkpoint(path, data["state"].device)
        differs = [key for key, value in saved["config"].items() if value != getattr(cfg, key) and key != "out"]
        if differs:
            raise ProcoError(f"{path} was trained with other settings ({', '.join(differs)}); use another --out")
    torch.manual_seed(cfg.seed)                 # weights; everything else is drawn from generators of its own
    start, model, report, margin = time.time(), None, {}, cfg.margin
    if cfg.counterfactual:
        if saved:
            model = load_dynamics(saved["model"], task, cfg).to(data["state"].device)
            report, margin, seconds = saved["report"], saved["margin"], saved["seconds"]
            torch.set_rng_state(saved["random"].cpu())
        else:
            model = train_dynamics(data, task, cfg, torch.Generator(data["state"].device).manual_seed(cfg.seed + 1))
            report = dynamics_report(model, data)
            margin = cfg.margin if cfg.margin >= 0 else model_margin(model, cost, data)
            seconds["dynamics"] = time.time() - start
        print_dynamics(report, margin)
    rng = torch.get_rng_state()
    learner = Learner(cfg, task, data, cost, model, margin)
    if saved:
        learner.restore(saved["learner"])

    def checkpoint():
        with whole(path) as part:
            torch.save(dict(config=dataclasses.asdict(cfg), model=model and model.state_dict(), report=report,
                            margin=margin, seconds=seconds, random=rng, learner=learner.state(), format=FORMAT), part)

    if not saved:
        checkpoint()
    total = learner.clone_updates + learner.updates
    stages = (("clone", "0 cloned policy", learner.clone_updates), ("policy", "5+6 feasibility, policy", total))
    with interruptible() as asked:
        for name, words, end in stages:
            start = time.time()
            bar = progress(None, words, total=end, initial=learner.step, disable=learner.step >= end)
            while learner.step < end:
                logs = learner.clone_update() if name == "clone" else learner.update()
                learner.step += 1
                last = learner.step == end
                if learner.step % 200 == 1 or last or asked:
                    logs = {key: float(value) for key, value in logs.items()}
                    if not all(map(math.isfinite, logs.values())):
                        raise ProcoError(f"a loss is no longer finite at update {learner.step} ({logs}); {path} keeps "
                                         "the last good state: lower the learning rates or look at the data")
                    if learner.step % 200 == 1 or last:
                        learner.metrics.append(dict(step=learner.step, stage=name, **logs))
                    bar.update(learner.step - bar.n)
                    bar.set_postfix_str(" ".join(f"{key.removesuffix('_loss')} {value:.3g}"
                                                 for key, value in logs.items()))
                if learner.step % 2000 == 1 or last or asked:       # only what has just been found finite is kept
                    seconds[name] = seconds.get(name, 0) + time.time() - start
                    start = time.time()
                    checkpoint()
                if asked:
                    raise ProcoError(f"stopped at update {learner.step} of {total}; the same command with --resume "
                                     "goes on")
            bar.close()
    return learner, seconds, report


def load_checkpoint(path, device="cpu"):
    """The content of a checkpoint.pt. It is pickled, so load only your own."""
    try:
        saved = torch.load(path, map_location=device, weights_only=False)
    except OSError:
        raise ProcoError(f"there is no {path}: train first, or give another folder") from None
    except Exception as error:                  # torch and pickle raise many kinds for a file that is cut
        raise ProcoError(f"{path} is damaged ({type(error).__name__}); train again") from None
    if saved.get("format") != FORMAT:
        raise ProcoError(f"{path} is of another version of this program; train again")
    return saved


def load_dynamics(weights, task, cfg):
    """The Dynamics of a checkpoint, from its state_dict."""
    model = Dynamics(task, cfg.ensemble, cfg.hidden // 2).requires_grad_(False)
    model.elites = weights["elites"]            # their number differs from a fresh model's
    model.load_state_dict(weights)
    return model


def load_run(folder, device="cpu"):
    """The agent of a finished run: .act(obs (B, O)) -> (B, A), .feasibility(obs (B, O)) -> (B,), .eps. Raises
    ProcoError where there is no run."""
    saved = load_checkpoint(Path(folder) / "checkpoint.pt", device)
    cfg = Config(**saved["config"])
    task = get_task(cfg.task, cfg.raw_obs)
    agent = Agent(task, cfg)
    agent.load_state_dict(saved["learner"]["agent"])
    if saved["model"]:
        object.__setattr__(agent, "model", load_dynamics(saved["model"], task, cfg).to(device))     # no part of its own
    return agent.to(device).requires_grad_(False)


def run_folder(cfg):
    """Where a run is kept."""
    return Path(cfg.out) / cfg.task / cfg.method / f"seed{cfg.seed}"


def run(cfg, resume=False):
    """Everything, from data to results -> the content of results.json."""
    WARNINGS.clear()
    begin, task = time.time(), get_task(cfg.task, cfg.raw_obs)
    if os.name == "posix":
        multiprocessing.forkserver.ensure_running()
    for name, low, high in (("scale", 0, 1e6), ("eps", 0, 1), ("gamma_f", 0, 1), ("gamma", 0, 1.000001),
                            ("horizon", -1, 1e4), ("ensemble", 0, 100), ("hidden", 1, 1e5), ("batch", 1, 1e6),
                            ("driver_episodes", 1, 1e6), ("eval_episodes", 0, 1e6)):
        if not low < getattr(cfg, name) < high:
            raise ProcoError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is out of range: {low} < value < "
                             f"{high:g}")
    for name, known in (("method", METHODS), ("cost", ("llm", "oracle"))):
        if getattr(cfg, name) not in known:
            raise ProcoError(f"there is no {name} called {getattr(cfg, name)!r}; there are {', '.join(known)}")
    device = torch.device("cpu" if cfg.device == "cpu" or not torch.cuda.is_available() else "cuda")
    if cfg.device not in ("auto", device.type, *["cuda-graphs"] * (device.type == "cuda")):
        raise ProcoError(f"there is no device {cfg.device!r} here; leave --device out, or say cpu" +
                         ", cuda or cuda-graphs" * torch.cuda.is_available())
    installed = versions()
    if cfg.task != "DoubleIntegrator" and (installed["mujoco"] or "").startswith("3"):
        warn(f"mujoco {installed['mujoco']} drives other paths than the 2.3 of the DSRL data and of published scores")
    if not installed["dsrl"]:
        warn("the package dsrl is not installed (README): no normalised scores and no download of its data")
    folder = run_folder(cfg)
    with whole(folder / "config.json") as part:
        part.write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    cost = oracle_cost(task) if cfg.cost == "oracle" else load_cost(cfg.task)
    source, path = find_data(cfg)
    arrays, facts = load_data(path, task, cfg.max_episode_cost)
    print(f"1 data: {source} {path}: {facts['episodes']} of {facts['of_episodes']} episodes kept, "
          f"{facts['transitions']} transitions, return {facts['return_mean']:.2f}, {facts['unsafe_share']:.2%} unsafe")
    minutes = forecast(cfg, task, facts["transitions"]) / 60
    print(f"   what follows takes about {minutes:.1f} minutes on this CPU; on a GPU nobody has measured it")
    data = to_device(arrays, task, cost, device)
    seconds = dict(data=time.time() - begin)
    learner, trained, dynamics = train(cfg, task, data, cost, folder, resume)
    if cfg.counterfactual:
        print(f"   warning time: V_f = {cfg.gamma_f:g}^k says a violation in k steps can't be avoided; eps = "
              f"{cfg.eps:g} warns {math.log(cfg.eps) / math.log(cfg.gamma_f):.0f} steps ahead")
    write_table(folder / "metrics.csv", learner.metrics)
    start = time.time()
    rows = evaluate(folder, cfg.task, cfg.eval_episodes)
    seconds |= trained | dict(evaluation=time.time() - start, total=time.time() - begin)
    write_table(folder / "episodes.csv", [dict(seed=row.seed, **{"return": row.ret}, cost=row.cost, length=row.length)
                                          for row in rows])
    keep_paths(folder, cfg.task, rows, load_run(folder))
    report(folder)
    results = dict(task=cfg.task, method=cfg.method, seed=cfg.seed, data=dict(source=source, path=str(path), **facts),
                   dynamics=dynamics, margin=learner.margin, eval=summary(cfg.task, rows), timing=seconds,
                   versions=installed, warnings=list(WARNINGS))
    with whole(folder / "results.json") as part:
        part.write_text(json.dumps(results, indent=1, default=float))
    score = results["eval"]
    print(f"7 evaluation: {cfg.task} {cfg.method}: return {score['return_mean']:.2f} +- {score['return_std']:.2f}, "
          f"cost {score['cost_mean']:.2f} +- {score['cost_std']:.2f}, {score['zero_cost_share']:.0%} of {len(rows)} "
          f"episodes without a violation" + (f"; normalised return {score['normalized_return']:.3f}, cost at limit 20 "
          f"{score['normalized_cost']:.3f}" if score["normalized_return"] is not None else ""))
    print(f"   {folder}/results.json after {results['timing']['total']:.0f} s")
    print("".join(f"   NOTE: {text}\n" for text in WARNINGS), end="")
    return results


def parse(argv):
    """The command line as (Config, the other flags); --help is made from Config's fields."""
    parser = argparse.ArgumentParser(prog="proco.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__.split("Legend")[0])
    for field in dataclasses.fields(Config):
        flag, text = "--" + field.name.replace("_", "-"), f"{field.metadata['help']} (default: {field.default})"
        if field.type is bool or field.type == "bool":
            parser.add_argument(flag, action="store_true", help=field.metadata["help"])
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, metavar="X",
                                help=text.replace("%", "%%"))
    parser.add_argument("--resume", action="store_true", help="go on where a run with the same settings was stopped")
    parser.add_argument("--diagnose", metavar="RUN", help="print what the run in folder RUN knows, and leave")
    parser.add_argument("--report", metavar="RUN", help="draw report.png of the run in folder RUN again, and leave")
    parser.add_argument("--compare", metavar="M,M", help="train what is missing of these methods, and print a table")
    parser.add_argument("--seeds", type=int, default=5, metavar="K", help="training seeds of --compare (default: 5)")
    parser.add_argument("--tasks", metavar="T,T", help="tasks of --compare (default: --task)")
    parser.add_argument("--write-cost", action="store_true", help="have a language model write the cost predicate")
    parser.add_argument("--llm-url", default=os.environ.get("PROCO_LLM_URL"), help="an OpenAI-compatible endpoint, "
                        "such as http://localhost:11434/v1 (default: the environment's PROCO_LLM_URL)")
    parser.add_argument("--llm-model", default=os.environ.get("PROCO_LLM_MODEL"), help="its model (PROCO_LLM_MODEL)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an expected failure")
    parser.set_defaults(**PRESETS.get(parser.parse_known_args(argv)[0].task, {}))
    args = vars(parser.parse_args(argv))
    cfg = Config(**{field.name: args.pop(field.name) for field in dataclasses.fields(Config)})
    return cfg, SimpleNamespace(**args)


def main(argv=None):
    """The command line -> exit code: 0, or 2 with one sentence on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    cfg, more = parse(argv)
    try:
        if more.diagnose:
            diagnose(more.diagnose, cfg.eval_episodes)
        elif more.report:
            print(report(more.report))
        elif more.compare:
            if more.seeds < 1:
                raise ProcoError("--seeds has to be at least 1")
            compare({(task, method): [parse([*argv, "--task", task, "--method", method, "--seed", str(seed)])[0]
                                      for seed in range(more.seeds)]
                     for task in (more.tasks or cfg.task).split(",") for method in more.compare.split(",")})
        elif more.write_cost:
            if not (more.llm_url and more.llm_model):
                raise ProcoError("--write-cost needs --llm-url and --llm-model (or PROCO_LLM_URL and PROCO_LLM_MODEL)")
            write_cost(cfg.task, more.llm_url, more.llm_model, data=recorded_steps(cfg))
        else:
            run(cfg, more.resume)
        return 0
    except ProcoError as error:
        if more.debug:
            raise
        print(f"proco: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("proco: interrupted before there was anything to keep; start again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
