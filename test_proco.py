# /// script
# requires-python = ">=3.10,<3.12"  # as proco.py
# dependencies = [
#     "torch==2.13.0", "numpy<2.3", "safety-gymnasium==0.4.0", "dsrl==0.1.0", "requests>=2.28",
#     "gymnasium==0.28.1", "mujoco==2.3.3", "xmltodict>=0.13", "pyyaml>=6.0", "imageio>=2.27",
#     "h5py>=3.8", "tqdm>=4.60", "matplotlib>=3.6", "filelock>=3.12", "pytest>=7.0",
#     "ruff>=0.17,<0.18",
# ]
# [tool.uv]
# override-dependencies = [
#     "gymnasium==0.28.1", "mujoco==2.3.3",
#     "pygame; python_version < '0'", "gym; python_version < '0'", "pybullet; python_version < '0'",
#     "bullet-safety-gym; python_version < '0'", "gymnasium-robotics; python_version < '0'",
# ]
# ///
"""All that judges proco.py: its tests, how fast it is, and how it does beside other methods.

    uv run test_proco.py                    # the tests; or python -m pytest -q
    uv run test_proco.py --bench            # two ratios: training and driving
    uv run test_proco.py --compare bc,td3bc-lag,proco --tasks PointGoal1,CarButton1 --seeds 5

--compare takes proco.py's options, too. It trains what is missing, takes what is finished, and
writes compare.csv, compare.md and compare.png into --out.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import proco
from llm_costs import score, write
from proco import (
    TASKS,
    Agent,
    Config,
    CostError,
    Dynamics,
    ProcoError,
    decode,
    encode,
    get_task,
    join,
    load_cost,
    locate,
    split,
)

# ==== --compare: the claim ========================================================================
# Every mean is over training seeds and layouts (evaluation seeds). Both are drawn from many, and
# all runs of a task drive the same layouts: the two are crossed, and so is the bootstrap.

MEASURES = ("return", "cost", "violation_free", "normalized_return")
RESAMPLES = 4000


def all_configs(methods, tasks, seeds, given):
    """The runs of a comparison: {(task, method): [Config of each seed]}. Raises ProcoError."""
    configs = {}
    for task in tasks:
        for method in methods:
            own = given | {"task": task, "method": method}
            configs[task, method] = [Config(**own, seed=seed) for seed in range(seeds)]
    return configs


def check_runs(runs):
    """Tries all that the runs will need before the first one is trained -> {folder: identity that
    its results must have}. Raises ProcoError."""
    expected = {}
    prepared = [(cfg, *proco.prepare(cfg)[:2]) for cfg in runs]
    data = {}
    for cfg, task, cost in prepared:
        if cfg.task not in data:
            source, path = proco.find_data(cfg)
            _, facts = proco.load_data(path, task, cfg.max_episode_cost)
            data[cfg.task] = {"source": source, "rows": facts["rows"], "hash": facts["hash"]}
        identity = {"predicate": cost.digest, "data": data[cfg.task]}
        expected[cfg.folder] = identity
        settings = {"settings": dataclasses.asdict(cfg)}
        finished, _ = proco.kept_run(cfg.folder, identity | settings, "cpu")
        if finished and isinstance(task.make, str):
            made = finished["versions"]["mujoco"]
            now = proco.versions()["mujoco"]
            if made != now:
                raise ProcoError(
                    f"{cfg.folder} was driven by mujoco {made}, now {now}; use another --out"
                )
    return expected


def finished_run(cfg, expected):
    """A run, trained if it is not finished -> its episodes (L, 4), the MEASURES of each in its
    default way of acting, and its results. Raises ProcoError where its files don't agree."""
    results = proco.run(cfg, resume=True)
    for key, value in expected.items():
        if results["identity"][key] != value:
            raise ProcoError(f"{cfg.folder}: {key} has changed since the comparison began")
    way = results["eval"]["acting"]
    try:
        with open(cfg.folder / "episodes.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["acting"] == way]
        returns = np.array([float(row["return"]) for row in rows])
        costs = np.array([float(row["cost"]) for row in rows])
    except (OSError, LookupError, ValueError) as error:
        raise ProcoError(f"can't read {cfg.folder}/episodes.csv: {error}") from None
    means = [results["eval"][name] for name in ("episodes", "return_mean", "cost_mean")]
    if not np.allclose(means, [len(rows), returns.mean(), costs.mean()]):
        raise ProcoError(f"{cfg.folder}: episodes.csv is not of the run in results.json")
    infos = proco.dsrl_infos()
    low = infos.get("MIN_EPISODE_REWARD", {}).get(cfg.task, math.nan)
    high = infos.get("MAX_EPISODE_REWARD", {}).get(cfg.task, math.nan)
    normal = (returns - low) / (high - low)
    return np.stack([returns, costs, costs == 0, normal], -1), results


def say_what_differs(results):
    """A warning for what the runs of a comparison were not all made by: versions, way of acting."""
    rows = [
        result["versions"]
        | {"acting of " + result["method"]: result["eval"]["acting"]}
        | {"device": result["device"]}
        for result in results
    ]
    for key in dict.fromkeys(key for row in rows for key in row):
        made = dict.fromkeys(str(row[key]) for row in rows if key in row)
        if len(made) > 1:
            proco.warn(f"not all runs are made alike: {key} {', '.join(made)}")


def draw_shares(rng, count):
    """Which share of each resample each of `count` things has: (R, count)."""
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def crossed_bootstrap(values, rng):
    """Means of some methods, and resampled ones: {method: (K, L, V)} -> {method: (1 + R, V)}.

    The first row is the mean itself. Seeds and layouts are resampled independently of each other;
    each resample takes the same layouts for all seeds, and the same of both for all methods."""
    count_seeds, count_layouts, _ = next(iter(values.values())).shape
    seeds = draw_shares(rng, count_seeds)
    layouts = draw_shares(rng, count_layouts)
    means = {}
    for method, value in values.items():
        resampled = np.einsum("rk,rl,klv->rv", seeds, layouts, value)
        means[method] = np.concatenate([value.mean((0, 1))[None], resampled])
    return means


def with_interval(name, means):
    """{name, name_low, name_high} of means (1 + R,): the mean and its 95% interval."""
    low, high = np.quantile(means[1:], (0.025, 0.975))
    row = {name: means[0], f"{name}_low": low, f"{name}_high": high}
    return {key: None if math.isnan(value) else float(value) for key, value in row.items()}


def comparison_rows(means, first, acting):
    """The table, a row for each task and method: {(task, method): (1 + R, V)} -> dicts. The way of
    acting that counts, {(task, method): its name}, stands in each."""
    rows = []
    for (task, method), values in means.items():
        row = {"task": task, "method": method, "acting": acting[task, method]}
        for n, name in enumerate(MEASURES):
            row |= with_interval(name, values[:, n])
        if method != first:
            difference = values - means[task, first]
            for n, name in enumerate(MEASURES):
                row |= with_interval(f"{name}_difference", difference[:, n])
        rows.append(row)
    return rows


def cell(row, name):
    """A number of a row and its interval, if it has one, as text."""
    value = row.get(name)
    if value is None:
        return "-"
    if f"{name}_low" not in row:
        return f"{value:.2f}"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def markdown(rows, names, by=("task", "method", "acting")):
    """A Markdown table: what it is by, then the cells of these names."""
    heads = [*by, *(name.replace("_", " ") for name in names)]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        lines.append([row[key] for key in by] + [cell(row, name) for name in names])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def comparison_text(rows, ways, first, seeds, layouts):
    """compare.md: the values, the differences to the first method, and the ways of acting."""
    text = f"{seeds} training seeds, {layouts} layouts; 95% intervals of a bootstrap over both"
    if seeds == 1:
        text += ". With one seed they say nothing of how much another one would differ"
    text += ".\n\n" + markdown(rows, MEASURES)
    others = [row for row in rows if row["method"] != first]
    if others:
        names = [f"{name}_difference" for name in MEASURES]
        text += f"\nDifferences to {first}, paired by seed and layout:\n\n" + markdown(
            others, names
        )
    text += "\nEach way of acting:\n\n"
    return text + markdown(ways, MEASURES[:3])


def ways_rows(task, method, scores):
    """A row for each way of acting, means over seeds: [{way: score} of each seed] -> dicts."""
    rows = []
    for way in scores[0]:
        row = {"task": task, "method": method, "acting": way}
        keys = ("return_mean", "cost_mean", "zero_cost_share")
        for name, key in zip(MEASURES, keys):
            row[name] = np.mean([score[way][key] for score in scores])
        rows.append(row)
    return rows


def draw_comparison(path, rows):
    """compare.png: return against cost, a panel for each task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(len(tasks), 5)
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(1 + 2.2 * columns, 0.5 + 2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, task in zip(panels, tasks):
        for row in rows:
            if row["task"] != task:
                continue
            bars = {}
            for axis, name in (("xerr", "cost"), ("yerr", "return")):
                low = row[name] - row[f"{name}_low"]
                high = row[f"{name}_high"] - row[name]
                bars[axis] = [[max(low, 0)], [max(high, 0)]]
            axes.errorbar(row["cost"], row["return"], fmt="o", label=row["method"], **bars)
        axes.set(title=task, xlabel="cost", ylabel="return")
        axes.plot(0, 0, alpha=0)  # both axes hold 0, so that no difference looks larger
        axes.margins(0.1)
    panels[0].legend(loc="lower right")
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    with proco.whole(path) as file:
        figure.savefig(file, dpi=110, format="png")


def compare(methods, tasks, seeds, given):
    """Trains what is missing of a comparison and writes compare.csv, .md and .png -> the rows."""
    configs = all_configs(methods, tasks, seeds, given)
    runs = [cfg for seeds_of in configs.values() for cfg in seeds_of]
    out = Path(os.path.expanduser(runs[0].out))
    proco.writable(out, "--out")
    expected = check_runs(runs)
    everything = []
    rng = np.random.default_rng(0)
    means = {}
    acting = {}
    ways = []
    for task in tasks:
        values = {}
        for method in methods:
            pairs = [finished_run(cfg, expected[cfg.folder]) for cfg in configs[task, method]]
            values[method] = np.stack([episodes for episodes, _ in pairs])  # (K, L, V)
            results = [result for _, result in pairs]
            everything += results
            counted = dict.fromkeys(result["eval"]["acting"] for result in results)
            acting[task, method] = ", ".join(counted)
            ways += ways_rows(task, method, [result["acting"] for result in results])
        layouts = values[methods[0]].shape[1]
        for method, value in crossed_bootstrap(values, rng).items():
            means[task, method] = value
    for method in methods if len(tasks) > 1 else ():
        means["all", method] = np.mean([means[task, method] for task in tasks], 0)
        counted = dict.fromkeys(acting[task, method] for task in tasks)
        acting["all", method] = ", ".join(counted)
    rows = comparison_rows(means, methods[0], acting)
    text = comparison_text(rows, ways, methods[0], seeds, layouts)
    proco.write_table(out / "compare.csv", rows)
    with proco.whole(out / "compare.md") as file:
        file.write(text.encode())
    print(f"\n{text}\n{out}/compare.csv and compare.md")
    say_what_differs(everything)
    try:
        (out / "compare.png").unlink(missing_ok=True)
        draw_comparison(out / "compare.png", rows)
    except Exception as error:  # noqa: BLE001 (whatever matplotlib raises: the tables are on disk)
        proco.warn(f"no picture ({type(error).__name__}: {error})")
    return rows


# ==== --bench: two ratios =========================================================================


def plain_network(inputs, hidden, outputs):
    """Two hidden layers, as they are usually written."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


class PlainTD3BC:
    """td3bc as it is usually written: a module for each network, twins one after the other, Adam
    without fusion, and a slow copy of the actor. Without that copy it computes what proco.py does
    (a test)."""

    def __init__(self, agent, slow_actor=True):
        width = agent.actor.weights[0].shape[-1]
        sizes = (width + agent.task.act_dim, agent.cfg.hidden)
        self.cfg = agent.cfg
        self.gamma = agent.cfg.gamma**agent.task.repeat
        self.actor = plain_network(width, agent.cfg.hidden, agent.task.act_dim)
        self.twins = [plain_network(*sizes, 1) for _ in range(2)]
        self.slow = copy.deepcopy(self.twins)
        self.slow_actor = copy.deepcopy(self.actor) if slow_actor else self.actor
        plain = {"lr": 3e-4, "foreach": False, "fused": False}
        parameters = [*self.twins[0].parameters(), *self.twins[1].parameters()]
        self.critic_adam = torch.optim.Adam(parameters, **plain)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), **plain)

    def update(self, table, generator):
        """One update of critics, their slow copies and the actor."""
        rows = proco.draw(table, self.cfg.batch, generator)
        x, action = rows["x"], rows["action"]
        with torch.no_grad():
            proposal = torch.tanh(self.slow_actor(rows["next_x"]))
            noise = 0.2 * torch.randn(proposal.shape, generator=generator)
            following = (proposal + noise.clamp(-0.5, 0.5)).clamp(-1, 1)
            pair = torch.cat([rows["next_x"], following], -1)
            worth = torch.min(self.slow[0](pair), self.slow[1](pair))[:, 0]
            target = rows["reward"] + self.gamma * (1 - rows["done"]) * worth
        pair = torch.cat([x, action], -1)
        loss = sum(F.mse_loss(twin(pair)[:, 0], target) for twin in self.twins)
        self.critic_adam.zero_grad()
        loss.backward()
        self.critic_adam.step()
        pi = torch.tanh(self.actor(x))
        q = self.twins[0](torch.cat([x, pi], -1))
        loss = -q.mean() / q.abs().mean().detach() + 2 * self.cfg.bc_weight * F.mse_loss(pi, action)
        self.actor_adam.zero_grad()
        loss.backward()
        self.actor_adam.step()
        pairs = list(zip(self.slow, self.twins))
        if self.slow_actor is not self.actor:
            pairs.append((self.slow_actor, self.actor))
        with torch.no_grad():
            for slow, fast in pairs:
                for late, early in zip(slow.parameters(), fast.parameters()):
                    late.copy_(0.02 * early + 0.98 * late)


def td3bc_pair(rows=10_000):
    """proco.py's td3bc and one with plain modules, of PointGoal1's sizes -> a function (table,
    generator) that makes an update, the agent, the plain twin, and a table of random numbers."""
    cfg = Config(task="PointGoal1", method="td3bc", hidden=128, batch=256)
    task = get_task(cfg.task)
    agent = proco.Agent(task, cfg)
    width = agent.actor.weights[0].shape[-1]
    optimisers = {"actor": proco.adam(agent.actor.parameters(), 3e-4)}
    optimisers["q_r"] = proco.adam(agent.q_r.parameters(), 3e-4)
    table = {"x": torch.randn(rows, width), "next_x": torch.randn(rows, width)}
    table["action"] = 2 * torch.rand(rows, task.act_dim) - 1
    table["reward"] = torch.randn(rows)
    table["done"] = torch.zeros(rows)
    table["anew"] = torch.zeros(rows)
    plain = PlainTD3BC(agent, slow_actor=False)

    def ours(table, generator):
        proco.update(agent, optimisers, table, None, generator)

    return ours, agent, plain, table


def bench_training(updates=100, rounds=15):
    """Prints how much faster a td3bc update is than TD3+BC as it is usually written, and than
    plain modules that compute the same; rounds in turn -> both ratios."""
    ours, agent, plain, table = td3bc_pair()
    works = {
        "proco.py": ours,
        "usual TD3+BC": PlainTD3BC(agent).update,
        "no slow actor": plain.update,
    }
    seconds = {name: [] for name in works}
    for round_ in range(-1, rounds):  # the first is to warm up
        for name, work in works.items():
            generator = torch.Generator().manual_seed(round_ + 1)
            begin = time.perf_counter()
            for _ in range(updates):
                work(table, generator)
            if round_ >= 0:
                seconds[name].append((time.perf_counter() - begin) / updates)
    print(f"td3bc, batch 256, hidden 128, {torch.get_num_threads()} thread(s), ms an update")
    for name, times in seconds.items():
        print(f"   {name:<16}" + " ".join(f"{1000 * one:.2f}" for one in times))
    usual, same = (
        np.median(seconds[name]) / np.median(seconds["proco.py"]) for name in list(works)[1:]
    )
    print(f"   medians: {usual:.2f} times as fast as usual TD3+BC, {same:.2f} without a slow actor")
    return usual, same


# The stock simulator in a process of its own. Since Python 3.11 dataclasses refuse its defaults, so
# they become factories; nothing else is changed.
STOCK_SIMULATOR = """
import dataclasses, json, sys, time
import numpy as np

stock_field = dataclasses._get_field

def get_field(cls, name, *rest):
    default = getattr(cls, name, None)
    if isinstance(default, np.ndarray):
        setattr(cls, name, dataclasses.field(default_factory=default.copy))
    return stock_field(cls, name, *rest)

dataclasses._get_field = get_field
import safety_gymnasium
"""
STOCK_DRIVE = """
import proco, torch

torch.set_num_threads(1)
env = safety_gymnasium.make("SafetyCarButton1-v0")
proco.make_env = lambda name: env
begin = time.perf_counter()
text = proco.load_cost("CarButton1").text
for seed in range(int(sys.argv[2])):
    proco.drive((sys.argv[1], "CarButton1", text, sys.argv[3], [seed], False))
print(time.perf_counter() - begin)
"""


def stock_seconds(path, episodes, acting):
    """Seconds an episode of CarButton1 takes in one process with the stock simulator."""
    code = STOCK_SIMULATOR + STOCK_DRIVE
    command = [sys.executable, "-W", "ignore", "-c", code, str(path), str(episodes), acting]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=proco.HERE)
    return float(done.stdout.split()[-1]) / episodes


def bench_driving(rounds=3, episodes=10, stock_episodes=2, method="proco"):
    """Prints how much faster CarButton1 is driven than with the stock simulator -> ratio."""
    with tempfile.TemporaryDirectory() as out:
        short = {"scale": 0.02, "driver_episodes": 4, "eval_episodes": 2, "data": "demonstrator"}
        cfg = Config(task="CarButton1", method=method, out=out, **short)
        acting = proco.run(cfg)["eval"]["acting"]
        path = cfg.folder / "checkpoint.pt"
        cfg = dataclasses.replace(cfg, eval_episodes=episodes, acting=acting)
        cost = load_cost(cfg.task)
        ours = []
        stock = []
        for _ in range(rounds):
            begin = time.perf_counter()
            proco.evaluate(path, cfg, cost)
            ours.append((time.perf_counter() - begin) / episodes)
            stock.append(stock_seconds(path, stock_episodes, acting))
    print(f"driving CarButton1 by {acting}, {os.cpu_count()} core(s), s an episode")
    for name, seconds in (("proco.py", ours), ("stock simulator", stock)):
        print(f"   {name:<16}" + " ".join(f"{one:.2f}" for one in seconds))
    ratio = np.median(stock) / np.median(ours)
    print(f"   medians: {ratio:.2f} times as fast")
    return ratio


def bench():
    """Prints both ratios."""
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        bench_training()
    bench_driving()


# ==== The command line ============================================================================


def command(argv):
    """Does what the command line says -> exit code. Raises ProcoError."""
    words = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("test_proco.py", description=__doc__, **words)
    parser.add_argument("--bench", action="store_true", help="print the two ratios")
    parser.add_argument("--compare", metavar="METHODS", help="such as bc,td3bc-lag,proco")
    parser.add_argument("--tasks", metavar="T,T", help="(default: proco.py's --task)")
    parser.add_argument("--seeds", metavar="K", type=int, default=1, help="seeds 0 to K - 1 (1)")
    flags, rest = parser.parse_known_args(argv)
    if flags.compare is None and (flags.tasks or flags.seeds != 1):
        raise ProcoError("--tasks and --seeds say what --compare METHODS compares: it is missing")
    if flags.bench and flags.compare is not None:
        raise ProcoError("--bench and --compare do not go together")
    if flags.bench:
        bench()
        return 0
    if flags.compare is None:
        return int(pytest.main([__file__, "-q", *rest]))
    given = vars(proco.parser().parse_args(rest))
    given.pop("resume", None)
    for name in ("method", "seed"):
        if name in given:
            raise ProcoError(f"--compare takes its own methods and --seeds K, not --{name}")
    if "evaluate" in given:
        raise ProcoError("--compare and --evaluate do not go together")
    if flags.seeds < 1:
        raise ProcoError(f"--seeds {flags.seeds} is no number of seeds; it must be at least 1")
    if flags.tasks and "task" in given:
        raise ProcoError("give --tasks or --task, not both")
    task = given.pop("task", "CarButton1")
    tasks = (flags.tasks or task).split(",")
    compare(
        list(dict.fromkeys(flags.compare.split(","))),
        list(dict.fromkeys(tasks)),
        flags.seeds,
        given,
    )
    return 0


def main(argv=None):
    """The command line -> exit code: 2 and one sentence where a user can put something right."""
    codes = []
    work = functools.partial(command, argv)
    hint = "the same command goes on"
    return proco.serve("test_proco", lambda: codes.append(work()), hint) or codes[0]


# ==== Surroundings of the tests ===================================================================

NOBODY = "http://127.0.0.1:9/nobody"  # nobody listens there
QUICK = {
    "task": "DoubleIntegrator",
    "scale": 0.01,
    "eval_episodes": 3,
    "driver_episodes": 4,
    "rollouts": 1000,
    "horizon": 6,
    "ensemble": 2,
    "hidden": 16,
}


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """No network, one thread, and a cache of the tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PROCO_CACHE", str(folder))
        patch.setenv("DSRL_DATASET_DIR", str(folder / "dsrl"))
        patch.setattr(proco, "CACHE", folder)
        patch.setattr(proco, "MIRROR", NOBODY)
        torch.set_num_threads(1)
        yield folder


def quick(out, method="bc", **changes):
    """The Config of a run that takes a second."""
    return Config(**QUICK | {"out": str(out), "method": method} | changes)


def flags(cfg):
    """The command line that makes a Config."""
    fields = dataclasses.asdict(cfg).items()
    return [f"--{name.replace('_', '-')}={value}" for name, value in fields]


def python(code, **environment):
    """Runs code in a process of its own, from standard input -> the finished process."""
    command = [sys.executable, "-"]
    more = {"input": code, "text": True, "capture_output": True}
    return subprocess.run(
        command, cwd=proco.HERE, env=os.environ | environment, check=False, **more
    )


def is_refused(capsys, argv, *words, program=proco.main, name="proco"):
    """A command ends with code 2 and one sentence that holds these words."""
    capsys.readouterr()
    assert program(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"{name}: ")
    assert not any("Traceback" in line for line in lines)
    for word in words:
        assert word in lines[-1]


def snapshot(folder):
    """All that is in a folder: {path: bytes}."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder):
    """What a finished run has learnt: {name: tensor}."""
    return proco.load_kept(folder / "checkpoint.pt")["agent"]


def same_run(one, two):
    """Whether two runs learnt and drove the same, to the last bit."""
    for name, value in weights(one).items():
        assert torch.equal(value, weights(two)[name]), name
    for name in ("episodes.csv", "metrics.csv"):
        assert (one / name).read_text() == (two / name).read_text()


DI = TASKS["DoubleIntegrator"]
SINGLE = dataclasses.replace(DI, repeat=1)  # decides anew at each step
SLOW = pytest.mark.skipif(not os.environ.get("PROCO_SLOW"), reason="set PROCO_SLOW=1")
WITH_LIDARS = [name for name, task in TASKS.items() if task.lidars]
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**changes):
    """Settings of a run on the double integrator that takes seconds."""
    settings = {"task": "DoubleIntegrator", "hidden": 32, "batch": 32, "ensemble": 3}
    settings |= {"scale": 0.01, "device": "cpu", "driver_episodes": 20, "data": "demonstrator"}
    return Config(**settings | changes)


def spread_out(task, seed, rows, low=0.1, high=0.9):
    """States whose things of one kind stand far apart in bearing, low to high of their reach away:
    (rows, S)."""
    rng = np.random.default_rng(seed)
    own = torch.tensor(rng.normal(0, 2, (rows, task.own_dim)), dtype=torch.float32)
    own[:, len(task.sensors) :] = 0  # gremlins at rest, buttons on
    if not task.lidars:
        return own
    places = []
    for lidar in task.lidars:
        first = rng.uniform(0, 2 * math.pi, (rows, 1))
        bearing = first + np.arange(lidar.count) * 2 * math.pi / lidar.count
        distance = rng.uniform(low, high, (rows, lidar.count)) * lidar.reach
        places.append(distance * np.exp(1j * bearing))
    return join(own, torch.tensor(np.concatenate(places, 1), dtype=torch.cfloat), task)


def things(state, task, name):
    """Where the things of a lidar stand: state (..., S) -> complex (..., count)."""
    return split(state, task)[1][..., task.things(name)]


def empty_scene(task, rows=1):
    """States of an agent at rest, its heading 0, that sees nothing at all: (rows, S)."""
    own = torch.zeros(rows, task.own_dim)
    own[:, 4] = -0.5  # the compass says (-0.5 sin yaw, -0.5 cos yaw)
    reach = task.lidars[0].reach
    return join(own, torch.full((rows, len(task.kinds)), reach + 0j), task)


# ==== 0. Tasks, states and the simulator ==========================================================


@pytest.mark.parametrize("name", ["PointGoal2", "CarButton1", "PointPush1", "CarCircle2"])
def test_a_navigation_task_is_laid_out_as_in_the_simulator(name):
    task = TASKS[name]
    env = proco.make_env(name)
    env.reset(seed=0)
    world = env.unwrapped.task
    assert env.observation_space.shape == (task.obs_dim,)
    assert env.action_space.shape == (task.act_dim,)
    assert world.num_steps == task.steps
    close(world.model.opt.timestep * world.sim_conf.frameskip_binom_n, task.dt)
    starts = {}
    start = 0
    for field, space in world.obs_info.obs_space_dict.spaces.items():
        starts[field] = start
        start += math.prod(space.shape)
    velocity, gyro, compass = (starts[key] for key in ("velocimeter", "gyro", "magnetometer"))
    assert task.sensors == (velocity, velocity + 1, gyro + 2, compass, compass + 1)
    lidars = {field: at for field, at in starts.items() if "lidar" in field}
    assert {f"{lidar.name}_lidar": lidar.start for lidar in task.lidars} == lidars
    assert {lidar.reach for lidar in task.lidars} == {world.lidar_conf.max_dist}


@pytest.mark.parametrize("name", ["AntVelocity", "HopperVelocity", "SwimmerVelocity"])
def test_a_robot_that_runs_is_laid_out_as_in_the_simulator(name):
    task = TASKS[name]
    env = proco.make_env(name)
    assert env.observation_space.shape == (task.obs_dim,) == (task.state_dim,)
    assert env.action_space.shape == (task.act_dim,)
    assert env.spec.max_episode_steps == task.steps


def bins_of(**values):
    """Sixteen bins from b3=0.5 and the like."""
    out = torch.zeros(16)
    for name, value in values.items():
        out[int(name[1:])] = value
    return out


THIRTY = {"b0": 4 / 9, "b1": 2 / 3, "b2": 2 / 9}  # 1 m at 30 degrees, a third through bin 1


@pytest.mark.parametrize(
    "bins, found",
    [
        (bins_of(), []),
        (bins_of(**THIRTY), [(1, 30)]),
        # and 2.4 m at 200 degrees, eight ninths through bin 8
        (bins_of(**THIRTY, b7=0.2 / 9, b8=0.2, b9=1.6 / 9), [(1, 30), (2.4, 200)]),
        # on the seam: 350 degrees is five ninths through bin 15, 5 degrees two ninths through bin 0
        (bins_of(b14=2 / 9, b15=0.5, b0=2.5 / 9), [(1.5, 350)]),
        (bins_of(b15=0.7, b0=0.9, b1=0.2), [(0.3, 5)]),
        # at an edge two bins hold the same
        (bins_of(b3=0.5, b4=0.5), [(1.5, 90)]),
    ],
)
def test_locate_on_hand_computed_lidars(bins, found):
    z = locate(bins, 3.0, 3)
    expected = torch.full((3,), 3.0 + 0j)  # what is not seen
    for n, (distance, bearing) in enumerate(found):
        expected[n] = distance * complex(np.exp(1j * math.radians(bearing)))
    close(z, expected, atol=2e-4)
    batch = torch.stack([0 * bins, bins]).view(2, 1, 16)
    assert torch.equal(locate(batch, 3.0, 3)[1, 0], z)


@pytest.mark.parametrize("name", ["PointPush2", "CarGoal1"])
def test_decode_draws_the_simulators_own_lidar(name):
    task = TASKS[name]
    env = proco.make_env(name)
    env.reset(seed=4)
    world = env.unwrapped.task
    rng = np.random.default_rng(0)
    for _ in range(20):
        places = [rng.uniform(-2, 2, (lidar.count, 3)) for lidar in task.lidars]
        z = np.concatenate([seen_from(world, xyz) for xyz in places])
        state = join(torch.zeros(task.own_dim), torch.tensor(z, dtype=torch.cfloat), task)
        obs = decode(state, task)
        for lidar, xyz in zip(task.lidars, places):
            drawn = obs[lidar.start : lidar.start + 16].numpy()
            close(drawn, world._obs_lidar_pseudo(xyz), atol=1e-5)


@pytest.mark.parametrize("name", WITH_LIDARS)
def test_encode_undoes_decode_where_things_stand_apart(name):
    task = TASKS[name]
    state = spread_out(task, 2, 40)
    again = encode(decode(state, task), task)
    close(again, state, atol=2e-3)
    assert torch.equal(encode(decode(state.view(8, 5, -1), task), task).view(40, -1), again)


@pytest.mark.parametrize("name", ["AntVelocity", "DoubleIntegrator"])
def test_without_lidars_the_state_is_the_observation(name):
    task = TASKS[name]
    obs = torch.randn(3, 4, task.obs_dim)
    assert torch.equal(encode(obs, task), obs)
    assert torch.equal(decode(obs, task), obs)


def test_a_goal_never_seen_is_guessed_where_the_other_things_are():
    task = TASKS["PointGoal1"]
    obs = decode(empty_scene(task), task)
    close(things(encode(obs, task), task, "goal"), torch.tensor(3.0 + 0j))
    obs[0, 28 + 4] = 2 / 3  # a hazard 1 m to the left
    obs[0, 28 + 3] = 2 / 3
    goal = things(encode(obs, task), task, "goal")[0, 0]
    close(goal, 3j, atol=1e-4)


def seen_from(world, positions):
    """Where the agent of a simulator sees positions (N, 3) in its own plane: complex (N,), m."""
    ground = np.atleast_2d(np.array(positions)) * [1, 1, 0]
    ego = (ground - world.agent.pos) @ world.agent.mat
    return ego[:, 0] + 1j * ego[:, 1]


def episode(name, seed, steps, choose=None):
    """Drives a simulator -> (world, obs, state with its memory) of each step.

    choose(world) -> action; without it all forces are drawn from -1, 0 and 1 at each tenth step."""
    env = proco.make_env(name)
    obs, _ = env.reset(seed=seed)
    world = env.unwrapped.task
    rng = np.random.default_rng(seed)
    state = None
    action = None
    for step in range(steps):
        state = encode(obs, TASKS[name], state)
        yield world, obs, state
        if choose or step % 10 == 0:
            action = choose(world) if choose else rng.choice([-1.0, 0.0, 1.0], 2)
        obs, *_ = env.step(action)


def steer(place):
    """A Car's action that turns its front, which is body -y, to a place and drives there."""
    bearing = np.angle(place / -1j)
    if abs(bearing) < 0.3:
        return np.array([1.0, 1.0])
    return np.array([1.0, -1.0]) if bearing > 0 else np.array([-1.0, 1.0])


def approach(world):
    return steer(seen_from(world, world.goal.pos)[0])


def flee(world):
    return steer(-seen_from(world, world.goal.pos)[0])


@pytest.mark.parametrize("name, error", [("PointGoal1", 5e-4), ("CarGoal1", 2e-3)])
def test_things_at_rest_move_by_the_agents_own_motion(name, error):
    """Held against the true positions of hazards; the error is that of a step, in m."""
    task = TASKS[name]
    wrong = []
    moved = []
    before = after = None
    seen = later = np.zeros(8)
    for world, _, state in episode(name, 7, 300):
        before = after
        after = split(state, task)[0]
        seen = later
        later = seen_from(world, world.hazards.pos)
        if before is not None:
            spin, way = proco.own_motion(before, after, task)
            there = (seen - complex(way)) * complex(spin)
            wrong.append(np.abs(there - later).max())
            moved.append(np.abs(seen - later).max())
    assert np.square(wrong).mean() < error**2
    assert np.mean(moved) > 10 * np.mean(wrong)


def test_the_velocity_of_the_gremlins_is_found_along_an_episode():
    wrong = []
    before = 0
    for world, _, state in episode("CarButton1", 1, 120):
        positions = np.array(world.gremlins.pos)
        velocity = (positions - before).mean(0) / 0.04 @ world.agent.mat
        before = positions
        wrong.append(np.linalg.norm(state[5:7].numpy() - velocity[:2]))
    assert np.mean(wrong[40:]) < 0.15  # of 0.35 m/s; it is 0 at first, and lags behind later


def test_buttons_that_are_off_stay_where_they_were():
    """A press makes the lidar dark for ten observations, in which the Car drives on."""
    task = TASKS["CarButton1"]
    dark = 0
    right = 0
    for world, obs, state in episode("CarButton1", 1, 85, approach):
        true = seen_from(world, world.buttons.pos)
        found = things(state, task, "buttons").numpy()
        gap = np.abs(found[:, None] - true).min(1)
        off = bool(state[7] > 0.5)
        assert off != obs[24:40].any()
        if off:
            dark += 1
            # one that hid behind another was wrong before; the others stay right
            assert (gap < 0.03).sum() >= right >= 2
            assert decode(state, task)[24:40].max() == 0  # a predicate sees none
        else:
            right = (gap < 0.02).sum()
    assert dark == 10


def test_a_goal_that_leaves_the_lidar_is_remembered():
    away = 0
    for world, obs, state in episode("CarButton1", 2, 160, flee):
        goal = seen_from(world, world.goal.pos)[0]
        if abs(goal) > 3:
            away += 1
            assert obs[40:56].max() == 0
            found = complex(things(state, TASKS["CarButton1"], "goal")[0])
            close(found, goal, atol=0.15)
    assert away > 30


def test_the_agent_knows_where_it_is_in_the_circle():
    """Compass and lidar together give the position in the world, where the walls of Circle are."""
    agent = Agent(TASKS["CarCircle1"], small())
    for world, _, state in episode("CarCircle1", 5, 60):
        place = agent.features(state)[-2:].tolist()
        close(place, world.agent.pos[:2].tolist(), atol=0.02)


def test_the_button_that_is_the_goal_is_not_feared():
    """Networks see it as one that is out of sight."""
    task = TASKS["PointButton1"]
    own, z = split(spread_out(task, 3, 5), task)
    z[:, task.things("goal")[0]] = z[:, 1]
    seen = torch.cat([own, torch.view_as_real(z).flatten(1)], -1)
    z[:, 1] = 3.0
    unseen = torch.cat([own, torch.view_as_real(z).flatten(1)], -1)
    agent = Agent(task, small())
    assert torch.equal(agent.features(seen), agent.features(unseen))


def on_device(task, obs, following, episode, action=None):
    """What to_device makes of observations (B, O) twice, episodes (B,) and actions (B, A)."""
    flat = dict.fromkeys(["rewards", "costs", "terminals", "timeouts"], np.zeros(len(obs)))
    arrays = {"observations": obs, "next_observations": following, "episode": np.array(episode)}
    arrays["actions"] = np.zeros((len(obs), task.act_dim)) if action is None else np.array(action)
    return proco.to_device(flat | arrays, task, load_cost(task.name), "cpu")


def test_memory_lasts_for_an_episode():
    task = TASKS["PointButton1"]
    obs = decode(spread_out(task, 5, 12), task)
    data = on_device(task, obs[:-1], obs[1:], np.repeat([0, 1, 2], [5, 1, 5]))
    last = None
    for t in range(11):
        last = encode(obs[t], task, None if t in (0, 5, 6) else last)
        close(data["state"][t], last, atol=1e-5)
        close(data["next_state"][t], encode(obs[t + 1], task, last), atol=1e-5)


def test_each_step_of_d_knows_how_far_it_ends_from_danger():
    task = TASKS["PointGoal1"]
    obs = decode(spread_out(task, 8, 51), task)
    data = on_device(task, obs[:-1], obs[1:], np.repeat(range(5), 10))
    true = (things(data["next_state"], task, "hazards").abs().amin(-1) - 0.2).clamp(0, 1)
    assert (data["distance"] - true).abs().max() < 0.006
    assert 0 < true.median() < 1


def test_a_robot_falls_in_the_simulator_where_its_healthy_range_ends():
    task = TASKS["HopperVelocity"]
    env = proco.make_env("HopperVelocity")
    rng = np.random.default_rng(0)
    for seed in range(5):
        env.reset(seed=seed)
        terminated = False
        while not terminated:
            obs, _, _, terminated, _, _ = env.step(rng.uniform(-1, 1, 3))
            assert bool(proco.ended(encode(obs, task), task)) == terminated


def test_the_closed_form_is_what_full_braking_in_the_environment_finds():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1.2, 1.1, 400)
    v = rng.uniform(-1, 2, 400)
    env = proco.DoubleIntegrator()
    env.reset(seed=0)
    true = []
    for env.x, env.v in zip(x, v):
        hit = env.x >= 1
        while env.v > 0:
            hit |= env.step([-1])[2] > 0
        true.append(bool(hit))
    found = proco.double_integrator_infeasible(x, v)
    assert found.tolist() == true
    assert ((x + np.maximum(v, 0) ** 2 / 2 >= 1) == found).mean() > 0.93  # continuous time


# ==== 1. Data =====================================================================================


def test_decisions_are_stretches_within_an_episode():
    state = torch.arange(14.0).view(7, 2)
    data = {"state": state, "next_state": state + 2}
    data["action"] = torch.arange(7.0)[:, None] / 10
    data["reward"] = torch.tensor([1.0, 2, 4, 8, 16, 32, 64])
    data["done"] = torch.tensor([0.0, 0, 0, 1, 0, 0, 0])
    data["episode"] = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    data["cost"] = torch.tensor([0.0, 3, 0, 0, 0, 0, 1])
    data["distance"] = torch.tensor([0.5, 0.4, 0.03, 0.5, 0.5, 0.5, 0.5])
    out = proco.decisions(data, DI, 0.5, 0.1)
    assert out["state"][:, 0].tolist() == [0, 2, 8]
    assert out["next_state"][:, 0].tolist() == [6, 8, 14]
    close(out["action"][:, 0], [0.1, 0.2, 0.5])
    assert out["reward"].tolist() == [1 + 1 + 1, 2 + 2 + 2, 16 + 16 + 16]
    assert out["done"].tolist() == [0, 1, 0]
    assert out["cost"].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    # without a margin what was recorded counts
    assert proco.decisions(data, DI, 0.5)["cost"].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_actions_are_saturated_on_the_way_in():
    """A Point's thrust acts as clip(a / 0.05, -1, 1), its turn is not clamped."""
    task = TASKS["PointCircle1"]
    actions = [[1, 1], [-0.3, 0.5], [0.05, -1], [0.025, -0.2], [0, 0], [-0.01, 0]]
    data = on_device(task, np.zeros((6, 28)), np.zeros((6, 28)), [0, 0, 1, 1, 2, 2], actions)
    true = [[1, 1], [-1, 0.5], [1, -1], [0.5, -0.2], [0, 0], [-0.2, 0]]
    close(data["action"].numpy(), np.array(true))
    assert data["held_out"].nonzero()[:, 0].tolist() == [4, 5]  # the last of three episodes


# ==== 2. Dynamics =================================================================================


def fresh_model(task, changes=0.1, **settings):
    """A model with random weights, whose own fields change by about so much a step."""
    torch.manual_seed(0)
    model = Dynamics(task, small(**settings)).requires_grad_(False)
    model.mean = torch.zeros(task.own_dim)
    model.change = torch.full((task.own_dim,), changes)
    model.low = torch.full((task.own_dim,), -99.0)
    model.high = torch.full((task.own_dim,), 99.0)
    return model


@pytest.mark.parametrize("name", ["PointButton1", "CarGoal2", "SwimmerVelocity"])
def test_several_steps_at_once_are_that_many_single_steps(name):
    task = TASKS[name]
    model = fresh_model(task, 0.1)
    model.elites = torch.tensor([2, 0])
    state = spread_out(task, 1, 20, low=0.3, high=0.7)
    action = 2 * torch.rand(20, task.act_dim, generator=gen()) - 1
    at_once = model.step(state, action, 5)
    assert at_once.shape == (2, 20, task.state_dim)
    for place, member in enumerate(model.elites):
        single = state
        for _ in range(5):
            single = model.step(single, action, 1, member[None])[0]
        close(at_once[place], single, atol=1e-4)
    assert not torch.allclose(at_once[0], at_once[1], atol=0.01)
    close(model.best(state, action, 5), at_once[0], atol=1e-5)
    assert not torch.allclose(at_once[0], state, atol=0.05)


def test_a_model_in_which_nothing_changes_drives_straight_on():
    """1 m/s ahead for five steps of 0.04 s: things come 20 cm nearer; gremlins go their own way."""
    task = TASKS["CarButton1"]
    model = fresh_model(task, 0.0)
    own, z = split(spread_out(task, 6, 7, high=0.7), task)
    own[:, 3:5] = torch.tensor([0.3, 0.4])  # of the compass
    own[:, :2] = torch.tensor([1.0, 0.0])
    own[:, 5:7] = torch.tensor([0.0, 0.5])
    state = join(own, z, task)
    z = split(state, task)[1]
    there = model.best(state, torch.zeros(7, 2), 5)
    moved = z - 0.2
    moved[:, task.things("gremlins")] += 0.1j
    close(there, join(own, moved, task), atol=1e-5)


def test_what_no_lidar_shows_stays_out_of_sight_but_a_goal_is_remembered():
    task = TASKS["PointGoal1"]
    state = empty_scene(task)
    state[:, 0] = 1.0  # m/s ahead
    there = fresh_model(task, 0.0).best(state, torch.zeros(1, 2), 5)
    assert torch.equal(things(there, task, "hazards"), things(state, task, "hazards"))
    close(things(there, task, "goal")[0, 0], 2.9)


def test_own_fields_stay_within_the_models_range():
    model = fresh_model(DI, 1.0)
    model.low = torch.tensor([-0.1, -0.2])
    model.high = torch.tensor([0.3, 0.4])
    state = model.best(torch.zeros(50, 2), torch.linspace(-1, 1, 50)[:, None], 100)
    assert (state == state.clamp(model.low, model.high)).all()


def test_disagreement_is_in_usual_changes_and_of_the_worst_field():
    model = fresh_model(DI)
    model.change = torch.tensor([0.5, 2.0])
    apart = torch.randn(1, 3, 2).repeat(2, 1, 1)
    assert model.disagreement(apart).abs().max() < 1e-6
    apart[1, 0, 0] += 1.0  # two changes of x, so one to either side of the mean
    apart[1, 1, 1] += 1.0  # half a change of v
    apart[1, 2] += 1.0
    close(model.disagreement(apart), [1, 0.25, 1], atol=1e-5)


def test_what_jumps_is_what_moves_faster_than_anything_can():
    """The goal of PointGoal1, the first of its three kinds: 5 cm a step is the limit."""
    task = TASKS["PointGoal1"]
    own = torch.zeros(5, task.own_dim)
    z = torch.full((5, len(task.kinds)), 2.0, dtype=torch.cfloat)
    there = z.clone()
    z[:, 0] = torch.tensor([0.3, 0.3, 0.3, 3.0, 1.0])  # at 3 m it is out of sight
    there[:, 0] = torch.tensor([0.26, 0.2, 1.5, 1.0, 1.09j])
    jump = proco.jumped(join(own, z, task), join(own, there, task), task)
    assert jump[:, 0].tolist() == [False, True, True, False, True]
    assert not jump[:, 1:].any()
    jump = proco.jumped(join(own, z, task), join(own, there, task), task, steps=3)
    assert jump[:, 0].tolist() == [False, False, True, False, False]


def test_what_was_reached_is_told_from_what_jumps_anywhere():
    """A goal is redrawn at 0.3 m ahead and 0.4 m behind; gremlins jump as an episode begins, which
    is far from the agent."""
    task = TASKS["PointButton1"]
    goal = torch.cat([torch.linspace(0.3, 2.3, 1000), -torch.linspace(0.4, 2.4, 1000)])
    reached = goal.abs() < torch.where(goal > 0, 0.34, 0.44)
    own, z = split(spread_out(task, 9, 2000), task)
    z[:, 4] = goal * complex(np.exp(0.2j))
    state = join(own, z, task)
    own, z = split(state, task)
    z[reached, 4] = 1.5 + 0j
    far = z[:, task.things("gremlins")].abs().amin(-1) > 1
    settling = far.nonzero()[::9, 0]
    z[settling, -4:] *= 1.1
    closest = proco.redrawn_within(state, join(own, z, task), task)
    assert closest.shape == (4, 16)
    close(closest[1], [0.29] * 8 + [0.39] + [0.29] * 7, atol=1e-4)
    assert closest[[0, 2, 3]].max() == 0
    model = fresh_model(task)
    model.closest = closest
    scene = empty_scene(task, 4)
    for row, place in enumerate((0.28, 0.3, -0.38, -0.4)):
        scene[row, 16:18] = torch.tensor([place, 0.01 * np.sign(place)])
    assert model.foreseen(scene).tolist() == [False, True, False, True]


def test_a_model_learnt_in_the_simulator_foresees_what_costs_depend_on():
    task = TASKS["PointGoal1"]
    rng = np.random.default_rng(0)
    actions = []

    def wander(world):
        held = len(actions) % 10 > 0
        actions.append(actions[-1] if held else torch.tensor(rng.choice([-1.0, 0.0, 1.0], 2)))
        return actions[-1].numpy()

    rows = {"state": [], "next_state": [], "action": []}
    for seed in range(30):
        states = [state for *_, state in episode("PointGoal1", seed, 101, wander)]
        rows["state"] += states[:-1]
        rows["next_state"] += states[1:]
        rows["action"] += actions[-101:-1]
    data = {key: torch.stack(values).float() for key, values in rows.items()}
    data["episode"] = torch.arange(3000) // 100
    data["held_out"] = data["episode"] >= 27
    torch.manual_seed(0)
    cfg = small(hidden=128, model_epochs=20, scale=1.0)
    model = proco.train_dynamics(data, task, cfg, gen(2))
    report = proco.dynamics_report(model, data)
    for name, r2 in (("goal", 0.95), ("hazards", 0.95), ("sensors", 0.8)):
        assert report[name]["r2"] > r2
    one, _, ten, _ = report["hazards"]["error"]
    assert one < 0.003  # m
    assert ten < 0.4 * report["hazards"]["nothing_changes"][2]


class Exact(Dynamics):
    """The double integrator itself in the place of a learnt model."""

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.elites = torch.arange(1)

    def step(self, state, action, steps=1, members=None):
        state = state.clone()
        for _ in range(steps):
            state[:, 1] = (state[:, 1] + 0.1 * action[:, 0]).clamp(-2, 2)
            state[:, 0] += 0.1 * state[:, 1]
        return state.expand(1 if members is None else len(members), *state.shape)


# ==== 3. Cost =====================================================================================


@pytest.mark.parametrize(
    "body, why",
    [
        ("return next_obs[..., 0]", "0. or 1."),
        ("return next_obs[..., 3] > 1", "0. or 1."),  # sums of these are no numbers
        ("return obs[..., 99]", "IndexError"),
        ("return (next_obs[..., 3] > 1).float()", None),
    ],
)
def test_a_predicate_from_a_file_is_used_or_refused_with_a_reason(body, why, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"def cost(obs, action, next_obs, margin=0.0):\n    {body}\n")
    if why is None:
        obs = torch.zeros(2, 72)
        obs[1, 3] = 1.5
        assert proco.load_cost("CarGoal1", path)(obs, None, obs).tolist() == [0, 1]
    else:
        with pytest.raises(proco.CostError, match=why):
            proco.load_cost("CarGoal1", path)


def test_the_conservative_cost_is_the_worst_elites_with_its_margin():
    following = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.97, 0.93], [0.5, 0.5, 1.2]])  # (E, B)
    following = torch.stack([following, 0 * following], -1)
    agent = newborn(margin=0.05)
    cost = proco.conservative_cost(agent, torch.zeros(3, 2), torch.zeros(3, 1), following)
    assert cost.tolist() == [0, 1, 1]
    agent.margin = 0.0
    cost = proco.conservative_cost(agent, torch.zeros(3, 2), torch.zeros(3, 1), following)
    assert cost.tolist() == [0, 0, 1]


def test_a_predicate_sees_batches_of_one_shape_and_the_simulators_action():
    """Three elites, four states of a Car, whose wheels saturate at 0.02."""
    task = TASKS["CarGoal1"]
    calls = []

    def spy(obs, action, next_obs, margin):
        calls.append((obs, action, next_obs, margin))
        return torch.zeros(obs.shape[:-1])

    agent = Agent(task, small(), None, spy, 0.07)
    state = spread_out(task, 0, 4)
    action = torch.tensor([1.0, -0.5]).expand(4, 2)
    proco.conservative_cost(agent, state, action, spread_out(task, 1, 12).view(3, 4, -1))
    obs, action, next_obs, margin = calls[0]
    assert obs.shape == next_obs.shape == (3, 4, 72)
    assert action.shape == (3, 4, 2)
    close(action[2, 3], [0.02, -0.01])
    assert margin == 0.07
    assert torch.equal(obs[1], decode(state, task))


class Optimist(Exact):
    """Sees the wall farther away than it is, by up to `off`."""

    off = 0.0

    def step(self, state, action, steps=1, members=None):
        out = super().step(state, action, steps, members).clone()
        out[..., 0] -= self.off * torch.linspace(0, 1, out.shape[1])
        return out


def test_the_margin_covers_the_models_error():
    x = torch.linspace(0.55, 0.95, 200)
    state = torch.stack([x, 0 * x], -1)
    cost = proco.load_cost("DoubleIntegrator")
    data = {"state": state, "next_state": state, "action": torch.zeros(200, 1)}
    data |= {"distance": 1 - x, "held_out": torch.ones(200, dtype=torch.bool)}
    model = Optimist(DI, small())
    assert proco.model_margin(model, cost, data) < 0.006  # the bisection's own error
    model.off = 0.08
    close(proco.model_margin(model, cost, data), 0.99 * 0.08, atol=0.006)
    data["distance"] = data["distance"] + 1  # nothing is near danger
    assert proco.model_margin(model, cost, data) == 0.05


def test_the_dynamics_loss_is_beta_nll():
    """Where the network says mean 0 and log-variance s, each field counts exp(s/2) (e^2/exp(s)+s)
    of its error e in usual changes."""
    model = Dynamics(DI, small(ensemble=1))
    for weight in model.net.parameters():
        weight.data.zero_()
    model.change = torch.tensor([0.5, 2.0])
    own = torch.zeros(1, 2)
    loss, error = proco.dynamics_loss(model, own, torch.zeros(1, 1), torch.tensor([[1.0, 1.0]]))
    spread = -12 + math.log1p(math.exp(14 - math.log1p(math.exp(2))))
    parts = [math.exp(spread / 2) * (e**2 / math.exp(spread) + spread) for e in (2.0, 0.5)]
    close(loss.detach(), [sum(parts) / 2])
    close(error.detach(), [(2 + 0.5) / 2])


def test_an_update_moves_its_own_networks_alone_at_a_share_of_the_rate():
    mine = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    other = torch.nn.Parameter(torch.tensor(3.0))
    proco.descend(proco.adam([mine], 1e-2), (other * mine.square()).sum(), 0.5)
    close(mine.detach(), [1 - 0.005, -2 + 0.005])  # Adam's first step is the rate
    assert other.grad is None


def test_distances_to_danger_are_those_to_the_wall_rounded_up():
    x = torch.tensor([0.0, 0.5, 0.7001, 0.999, 1.0, 1.2, -3.0])
    state = torch.stack([x, torch.zeros(7)], -1)
    cost = proco.load_cost("DoubleIntegrator")
    distance = proco.danger_distance(cost, DI, state, torch.zeros(7, 1), state)
    wanted = torch.tensor([1, 0.5, 77 / 256, 1 / 256, 0, 0, 1])
    assert torch.equal(distance, wanted)


# ==== 4. Counterfactual roll-outs =================================================================


class Formula(torch.nn.Module):
    """A network that is a formula for each output, of the columns of its input."""

    def __init__(self, formulas, members):
        super().__init__()
        self.formulas = formulas
        self.members = members

    def forward(self, x, members=slice(None)):
        columns = x.unbind(-1)
        out = torch.stack([formula(*columns) + 0 * columns[0] for formula in self.formulas], -1)
        count = len(range(self.members)[members])
        return out.expand(count, *out.shape)


def nothing(*columns):
    return 0.0


OUTPUTS = {"actor": ["actor"], "clone": ["clone"], "q_r": ["q_r"], "q_r_slow": ["q_r_slow"]}
OUTPUTS |= {"q_s": ["q_f", "q_c"], "v_s": ["v_f", "v_c"]}


def give(agent, **formulas):
    """Puts formulas of x, v and, for Q, the action a in the place of an agent's networks."""
    for network, outputs in OUTPUTS.items():
        if any(output in formulas for output in outputs):
            columns = [formulas.get(output, nothing) for output in outputs]
            setattr(agent, network, Formula(columns, 2 if network.startswith("q") else 1))


def newborn(task=SINGLE, model=None, margin=0.0, **changes):
    """An agent that knows how the double integrator moves, and fears, likes and does nothing."""
    cost = proco.load_cost("DoubleIntegrator")
    torch.manual_seed(3)
    cfg = small(**changes)
    agent = Agent(task, cfg, model or Exact(task, cfg), cost, margin)
    everything = [output for outputs in OUTPUTS.values() for output in outputs]
    give(agent, **dict.fromkeys(everything, nothing))
    return agent


def places(count=100, low=-1.0, high=0.95):
    rng = np.random.default_rng(1)
    x = rng.uniform(low, high, count)
    v = rng.uniform(-0.5, 2, count)
    return torch.tensor(np.stack([x, v], -1), dtype=torch.float32)


def test_roll_outs_follow_the_model_and_are_labelled_by_the_predicate():
    """Each row is one action held for three steps, each judged, and ends where they lead."""
    agent = newborn(DI, margin=0.05, horizon=15)
    rows = proco.roll_out(agent, places(), gen())
    assert set(rows) == {"state", "action", "next_state", "cost", "done"}
    assert 200 < len(rows["state"]) <= 100 * 15 / 3
    state = rows["state"]
    for step in range(3):
        state = agent.model.best(state, rows["action"])
        assert torch.equal(rows["cost"][:, step], (state[:, 0] + 0.05 >= 1).float())
    close(state, rows["next_state"])
    assert 0.05 < rows["cost"].mean() < 0.8
    assert rows["action"].abs().max() <= 1
    assert not rows["done"].any()


def test_roll_outs_repeat_themselves_under_the_same_generator():
    agent = newborn(horizon=10)
    one = proco.roll_out(agent, places(), gen())
    two = proco.roll_out(agent, places(), gen())
    other = proco.roll_out(agent, places(), gen(1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["action"][:100], other["action"][:100])


def test_roll_outs_linger_after_their_first_violation():
    agent = newborn(horizon=30)
    inside = torch.tensor([[50.0, 0.0]]).repeat(20, 1)
    rows = proco.roll_out(agent, inside, gen())
    assert len(rows["cost"]) == 20 * (proco.LINGER + 1)
    assert rows["cost"].all()
    outside = proco.roll_out(agent, -inside, gen())
    assert len(outside["cost"]) == 20 * 30
    assert not outside["cost"].any()


class Unsure(Exact):
    """Two elites, which differ by 1 m beyond x = 0.3."""

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.elites = torch.arange(2)
        self.limit = torch.tensor(0.4)

    def step(self, state, action, steps=1, members=None):
        one = super().step(state, action, steps)[0]
        other = one + torch.tensor([1.0, 0.0]) * (one[:, :1] > 0.3)
        return torch.stack([one, other])


def test_roll_outs_are_cut_where_the_members_differ():
    agent = newborn(model=Unsure(SINGLE, small()), horizon=12)
    rows = proco.roll_out(agent, places(), gen())
    assert rows["next_state"][:, 0].max() <= 0.3
    assert rows["next_state"][:, 0].max() > 0.2


class Goal(Exact):
    """Something is redrawn beyond x = edge."""

    edge = 0.5

    def foreseen(self, state):
        return state[..., 0] < self.edge


def test_roll_outs_are_cut_where_something_is_redrawn():
    agent = newborn(model=Goal(SINGLE, small()), horizon=12)
    rows = proco.roll_out(agent, places(), gen())
    assert 0.4 < rows["next_state"][:, 0].max() < 0.5


def test_what_has_ended_violates_nothing_and_goes_no_farther():
    """An episode ends at x = 0.9, a tenth before the wall; decisions last three steps."""
    task = dataclasses.replace(DI, healthy=((0, -math.inf, 0.9),))
    agent = newborn(task, horizon=15)
    rows = proco.roll_out(agent, places(), gen())
    first = agent.model.best(rows["state"], rows["action"])[:, 0]
    second = agent.model.best(rows["state"], rows["action"], 2)[:, 0]
    third = rows["next_state"][:, 0]
    over = torch.stack([first, second, third]).amax(0) > 0.9
    assert torch.equal(rows["done"], over.float())
    assert rows["state"][over, 0].max() < 0.96  # starts may be there, no later decision begins
    assert rows["cost"][:, 0].equal((first >= 1).float())  # the step that ends it may violate
    assert rows["cost"][:, 1].equal(((second >= 1) & (first <= 0.9)).float())
    assert (third >= 1).sum() > rows["cost"].sum() > 0


def test_half_of_the_roll_outs_follows_the_filtered_policy_and_half_holds_actions():
    agent = newborn()
    held = torch.linspace(-0.9, 1.9, 100)[:, None]
    give(agent, actor=lambda x, v: math.atanh(0.8), q_f=lambda x, v, a: 1.0 * (a > 0.5))
    action = proco.behave(agent, places(), held, torch.full((100, 1), 0.25))
    close(action[:50, 0], [0.25] * 50)  # the nearest feasible candidate, 0, and noise
    assert torch.equal(action[50:], held[50:].clamp(max=1))


def row_of(starts, states, fields):
    """Of which row each start is, told by some fields: (B,). Each is of one."""
    same = (starts[:, None, fields] == states[:, fields]).all(-1)
    assert same.any(-1).all()
    return same.float().argmax(-1)


def test_every_second_start_is_recorded():
    model = fresh_model(DI)
    model.low = torch.tensor([5.0, 5.0])
    model.high = torch.tensor([9.0, 9.0])
    states = torch.stack([torch.arange(100.0) / 100, torch.arange(100.0)], -1)
    before = states.clone()
    starts = proco.draw_starts(states, model, 4000, gen())
    assert starts.shape == (4000, 2)
    assert torch.equal(states, before)
    row_of(starts[1::2], states, [0, 1])
    for part in (starts[::2], starts[1::2]):  # of all rows alike
        counts = torch.bincount(row_of(part, states, [1]), minlength=100)
        close(counts.float(), [20] * 100, atol=20)
    displaced = starts[::2, 0]  # drawn anew, from 5 to 9
    assert 5 <= displaced.min() < 5.1
    assert 8.9 < displaced.max() <= 9


def test_displaced_starts_are_the_same_scene_from_beside():
    task = TASKS["PointGoal1"]
    own, z = split(spread_out(task, 9, 200), task)
    z[:, 5] = 3.0  # the last of the hazards is out of sight
    state = join(own, z, task)
    starts = proco.draw_starts(state, fresh_model(task), 400, gen())
    own, z = split(state[row_of(starts[::2], state, [3, 4])], task)  # the compass stays
    moved_own, moved = split(starts[::2], task)
    share = moved_own[:, :3] / own[:, :3].roll(1, 0)  # of another row's motion
    close(share, share[:, :1].expand(-1, 3), atol=1e-4)
    assert 0 <= share.min() < 0.1
    assert 0.9 < share.max() <= 1
    shift = moved[:, :1] - z[:, :1]  # there is one goal: it tells the shift
    assert 0.4 < shift.abs().max() <= 0.5 + 1e-5
    assert torch.view_as_real(shift).std(0).min() > 0.1
    scene = join(own, torch.where(z.abs() < 2.999, z + shift, z), task)
    close(split(scene, task)[1], moved, atol=1e-5)


def test_without_lidars_what_is_limited_is_drawn_anew_over_the_models_range():
    task = TASKS["AntVelocity"]
    model = fresh_model(task)
    model.low[13] = 0.0
    state = torch.randn(1000, 27)
    out = proco.draw_starts(state, model, 2000, gen())[::2]
    row_of(out, state, [field for field in range(27) if field not in (13, 14)])
    spread = [99 / math.sqrt(12), 198 / math.sqrt(12)]  # of uniform numbers
    close(out[:, 13:15].std(0), spread, rtol=0.05)


# ==== 5. Feasibility ==============================================================================


def rows_of(x, action, **changes):
    """Rows as update draws them, of which nothing happens and the next state is the same."""
    rows = {"x": x, "action": action, "next_x": x, "cost": torch.zeros(len(x), 1)}
    rows |= {"driver": action, "trust": torch.ones(len(x))}
    return rows | {"done": torch.zeros(len(x))} | changes


@pytest.mark.parametrize(
    "cost, done, q_f, q_c",
    [
        ([0, 0, 1, 1], 0, 0.9**2, 0.1 * (0.9**2 + 0.9**3) + 0.9**4 * 0.3),
        ([0, 0, 0, 0], 0, 0.9**4 * 0.6, 0.9**4 * 0.3),
        ([0, 0, 0, 0], 1, 0, 0),
        ([0, 0, 0, 1], 1, 0.9**3, 0.1 * 0.9**3),
    ],
)
def test_a_violation_within_a_decision_is_discounted_by_its_step(cost, done, q_f, q_c):
    agent = newborn(gamma_f=0.9)
    rows = rows_of(torch.zeros(8, 2), torch.zeros(8, 1), next_x=torch.ones(8, 2))
    rows["cost"] = torch.tensor([cost]).repeat(8, 1).float()
    rows["done"] = torch.full((8,), float(done))
    # the next state (x = 1) is worth .6 and .3, V says so, and Q(s, a) what it should
    give(agent, v_f=lambda x, v: 0.6, v_c=lambda x, v: 0.3)
    give(agent, q_f=lambda x, v, a: 0.6 * x + q_f * (1 - x), q_c=lambda x, v, a: 0.3 * x)
    wrong = proco.feasibility_loss(agent, rows)
    give(
        agent,
        q_f=lambda x, v, a: 0.6 * x + q_f * (1 - x),
        q_c=lambda x, v, a: 0.3 * x + q_c * (1 - x),
    )
    close(proco.feasibility_loss(agent, rows), 0, atol=1e-9)
    close(wrong, q_c**2, atol=1e-6)  # 2 twins, mean of 2 values


class Table(torch.nn.Module):
    """A network that is a table: a value for each sign of each of two inputs, to be learnt."""

    def __init__(self, members):
        super().__init__()
        self.values = torch.nn.Parameter(torch.full((members, 2, 2, 2), 0.5))

    def forward(self, x):
        return self.values[:, (x[:, 0] > 0).long(), (x[:, -1] > 0).long()]


def test_the_feasibility_values_settle_at_their_closed_form():
    """An edge (x = -1) and a trap (x = 1); decisions of two steps, gamma_f = 0.8.

    At the edge thrust ends the episode, though its last state looks like the trap; without it the
    next two steps lead into the trap, where each step costs."""
    agent = newborn(gamma_f=0.8)
    agent.q_s = Table(2)
    agent.v_s = Table(1)
    x = torch.tensor([[-1.0, 0], [-1, 0], [1, 0], [1, 0], [-1, 0]])
    rows = rows_of(x, torch.tensor([[1.0], [-1], [1], [-1], [1]]))
    rows["next_x"] = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [-1, 0]])
    rows["done"] = torch.tensor([1.0, 0, 0, 0, 1])
    rows["cost"] = torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1], [0, 0]])
    optimiser = torch.optim.Adam([*agent.q_s.parameters(), *agent.v_s.parameters()], lr=0.02)
    for _ in range(600):
        optimiser.zero_grad()
        proco.feasibility_loss(agent, rows).backward()
        optimiser.step()
    v_f, v_c = agent.v_s(x[1:3])[0].T.tolist()
    close(v_f, [0, 1], atol=0.01)
    close(v_c, [0, 1], atol=0.01)
    q_f, q_c = agent.danger(x, rows["action"])[:4].T.tolist()
    close(q_f, [0, 0.8**2, 1, 1], atol=0.01)
    close(q_c, [0, 0.8**2, 1, 1], atol=0.01)


def test_v_is_the_least_of_q_over_the_actors_action_and_the_corners():
    agent = newborn()
    give(agent, actor=lambda x, v: math.atanh(0.5), v_f=lambda x, v: 0.25)
    rows = rows_of(torch.zeros(4, 2), torch.zeros(4, 1), done=torch.ones(4))
    q_loss = 0.5**2 + 1  # at a = 0 Q is .5 and 1, and after an end it should be 0
    give(agent, q_f=lambda x, v, a: 0.5 + 0.25 * a, q_c=lambda x, v, a: 1 - a)
    close(proco.feasibility_loss(agent, rows), q_loss)  # at a corner
    give(agent, q_f=lambda x, v, a: (a - 0.5) ** 2 + 0.25, q_c=lambda x, v, a: 1 - a)
    close(proco.feasibility_loss(agent, rows), q_loss)  # at the actor's


def test_danger_is_the_graver_of_the_twins():
    agent = Agent(DI, small())
    x = torch.randn(60, 2)
    action = torch.zeros(60, 1)
    one, other = agent.q_s(torch.cat([x, action], -1)).detach()
    close(agent.danger(x, action).detach(), torch.where(one > other, one, other))
    assert (one > other).any()
    assert (one < other).any()


# ==== 6. Policy ===================================================================================


def table_of(method, count):
    """An agent, and tables D, with actions 0.5, and D_cf, with -0.5, as update draws from them."""
    agent = newborn(method=method)
    give(agent, clone=lambda x, v: math.atanh(0.1))
    d = rows_of(torch.randn(count, 2), torch.full((count, 1), 0.5), reward=torch.zeros(count))
    d = {key: d[key] for key in ("x", "next_x", "action", "cost", "done", "reward")}
    cf = {"state": d["x"], "next_state": d["next_x"], "action": -d["action"]}
    return agent, d, cf | {"cost": d["cost"], "done": d["done"]}


@pytest.mark.parametrize("method", ["td3bc-lag", "proco"])
def test_an_update_sees_d_and_with_proco_as_many_rows_of_d_cf(method, monkeypatch):
    """Whom the actor clones, how much it is trusted, and what the safety critics see."""
    agent, d, cf = table_of(method, 99)
    agent.actor = proco.Mlp(2, 8, 1)
    agent.v_s = proco.Mlp(2, 8, 2)
    seen = {}

    def actor_loss(agent, rows):
        seen["actor"] = rows
        return agent.propose(rows["x"]).sum(), None

    def feasibility_loss(agent, rows):
        seen["safety"] = rows
        return agent.v_s(rows["x"]).sum()

    monkeypatch.setattr(proco, "actor_loss", actor_loss)
    monkeypatch.setattr(proco, "feasibility_loss", feasibility_loss)
    nets = {"actor": agent.actor, "safety": agent.v_s}
    optimisers = {name: proco.adam(net.parameters(), 1e-3) for name, net in nets.items()}
    proco.update(agent, optimisers, d, cf if method == "proco" else None, gen())
    made_up = 32 if method == "proco" else 0
    rows = seen["actor"]
    close(rows["action"][:, 0], [0.5] * 32 + [-0.5] * made_up)
    close(rows["driver"][:, 0], [0.5] * 32 + [0.1] * made_up)
    assert rows["trust"].tolist() == [1] * 32 + [0.5] * made_up
    driven = 16 if made_up else 32  # half as many as made up
    close(seen["safety"]["action"][:, 0], [0.5] * driven + [-0.5] * made_up)


def push(method, data=None, lam=1.0, **formulas):
    """Which way a step of descent on the actor's loss moves its action: > 0 is up.

    data: what drivers do; else what the actor does already."""
    agent = newborn(method=method)
    agent.actor = proco.Mlp(2, 32, 1)
    give(agent, **formulas)
    agent.log_lam.fill_(math.log(lam))
    x = torch.randn(64, 2, generator=gen())
    proposal = torch.tanh(agent.actor(x)[0]).detach()
    rows = rows_of(x, proposal if data is None else torch.full((64, 1), data))
    loss, _ = proco.actor_loss(agent, rows)
    loss.backward()
    return -float(agent.actor.biases[-1].grad.sum())


def up(x, v, a):
    return a + 3


def down(x, v, a):
    return 3 - a


def feared(x, v, a):
    return 0.8 + 0.3 * a  # the agent's eps is 0.4


def costly(x, v, a):
    return 0.3 * a


def lost(x, v):
    return 1.0


@pytest.mark.parametrize(
    "method, sign, known",
    [
        ("bc", 1, {"data": 0.9}),  # all are pulled towards the driver
        ("td3bc", 1, {"data": 0.9}),
        ("td3bc-lag", -1, {"data": -0.9}),
        ("cpq", -1, {"data": -0.9}),
        ("fisor", 1, {"data": 0.9}),
        ("td3bc", 1, {"q_r": up}),  # these climb the reward
        ("td3bc-lag", 1, {"q_r": up}),
        ("td3bc-lag", -1, {"q_r": down}),
        ("cpq", 1, {"q_r": up}),
        ("bc", 0, {"q_r": up}),
        ("td3bc", 1, {"q_r": up, "q_f": feared, "v_f": lost}),  # this one knows no danger
        ("td3bc-lag", -1, {"q_f": feared}),
        ("td3bc-lag", -1, {"q_f": feared, "q_r": up, "lam": 100.0}),  # whatever it earns
        ("td3bc-lag", -1, {"q_c": costly, "q_r": up, "v_f": lost}),  # the way back
        ("td3bc-lag", 1, {"q_c": costly, "q_r": up}),  # elsewhere Q_c says nothing
        ("cpq", 0, {"q_c": feared, "q_r": up}),
        ("cpq", 1, {"q_c": feared, "data": 0.9}),  # cloning goes on
    ],
)
def test_the_actor_is_pushed_the_right_way(method, sign, known):
    assert np.sign(push(method, **known)) == sign


def test_the_lagrangian_pushes_the_harder_the_higher_lambda():
    gentle = push("td3bc-lag", q_f=feared, lam=5.0)
    close(push("td3bc-lag", q_f=feared, lam=10.0), 2 * gentle)


def test_the_lagrangians_loss_by_hand():
    """A feasible row that breaks the constraint by .2, an infeasible row, and one that satisfies
    the constraint by far, which pays for no other."""
    agent = newborn(eps=0.5)
    agent.log_lam.fill_(math.log(2))
    give(agent, q_r=lambda x, v, a: 3.0, v_f=lambda x, v: 0.4 + 0.5 * x)
    give(agent, q_f=lambda x, v, a: 0.7 - 0.6 * v, q_c=lambda x, v, a: 0.25)
    x = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    rows = rows_of(x, torch.full((3, 1), 0.5))
    loss, violation = proco.actor_loss(agent, rows)
    td3bc = -3 / 3 + 2 * 0.5**2
    close(loss, (td3bc + 2 * 0.2 + 20 * 0.25 + td3bc) / 3)
    close(violation, 0.1)  # of the feasible rows


def test_fisors_loss_by_hand():
    """Q_r = 2 a: the driver's .5 is worth 1 more than the actor's 0; |Q_r| of the actor is 2."""
    agent = newborn(method="fisor", eps=0.5)
    give(agent, q_r=lambda x, v, a: 2 + 2 * a, v_f=lambda x, v: 0.9 * x, v_c=lambda x, v: 0.3)
    give(agent, q_f=lambda x, v, a: 0.1, q_c=lambda x, v, a: 0.4)
    x = torch.tensor([[0.0, 0], [1, 0]])
    rows = rows_of(x, torch.full((2, 1), 0.5))
    forth = math.exp(3 * 1 / 2) * 0.5**2
    back = math.exp(20 * (0.3 - 0.4)) * 0.5**2
    close(proco.actor_loss(agent, rows)[0], (forth + back) / 2, rtol=1e-5)
    # what the driver did may be infeasible
    give(agent, q_f=lambda x, v, a: 0.6, q_c=lambda x, v, a: 0.4)
    close(proco.actor_loss(agent, rows)[0], back / 2, rtol=1e-5)


def test_cpqs_loss_by_hand():
    """The limit of Q_c is 0.1: above it a row is only cloned, below it climbs the reward."""
    agent = newborn(method="cpq", bc_weight=3.0)
    give(agent, q_r=lambda x, v, a: 4.0, q_c=lambda x, v, a: 0.05 + 0.1 * x)
    rows = rows_of(torch.tensor([[0.0, 0], [1, 0]]), torch.full((2, 1), 0.5))
    clone = 2 * 3 * 0.5**2
    close(proco.actor_loss(agent, rows)[0], (-4 / 4 + clone + clone) / 2)


def test_counterfactual_rows_are_cloned_at_half_the_weight():
    """Loss of rows of D whose driver is .5 away, and of as many of D_cf whose clone is 1 away."""
    agent = newborn(method="bc")
    give(agent, clone=lambda x, v: 9.0)
    d = rows_of(torch.zeros(4, 2), torch.full((4, 1), 0.5))
    cf = {"state": torch.zeros(4, 2), "next_state": torch.zeros(4, 2)}
    cf |= {key: d[key] for key in ("action", "cost", "done")}
    loss, _ = proco.actor_loss(agent, proco.with_counterfactuals(agent, d, cf))
    close(loss, (0.5**2 + 0.5 * 1) / 2)


@pytest.mark.parametrize(
    "method, done, q_c, target",
    [
        ("td3bc", 0.0, 0.5, 0.5 + 0.9 * 2),
        ("td3bc", 1.0, 0.5, 0.5),  # nothing follows an end
        ("cpq", 0.0, 0.0, 0.5 + 0.9 * 2),
        ("cpq", 0.0, 0.5, 0.5),  # nor, for CPQ, a dangerous action
    ],
)
def test_the_reward_critics_target(method, done, q_c, target):
    """r + gamma^k times what the slow critics say (2), for a decision of three steps."""
    agent = newborn(DI, method=method, gamma=0.9 ** (1 / 3))
    give(agent, q_r_slow=lambda x, v, a: 2.0, q_c=lambda x, v, a: q_c)
    rows = rows_of(torch.zeros(16, 2), torch.zeros(16, 1), done=torch.full((16,), done))
    rows |= {"reward": torch.full((16,), 0.5), "anew": torch.zeros(16)}
    give(agent, q_r=lambda x, v, a: target)
    close(proco.reward_critic_loss(agent, rows, gen()), 0, atol=1e-6)
    give(agent, q_r=lambda x, v, a: target - 0.2)
    close(proco.reward_critic_loss(agent, rows, gen()), 2 * 0.2**2)


def test_what_reaching_a_goal_is_worth_is_averaged_over_such_decisions():
    agent = newborn()
    rows = rows_of(torch.zeros(4, 2), torch.zeros(4, 1), done=torch.ones(4))
    rows |= {"reward": torch.tensor([1.0, 2, 4, 100]), "anew": torch.tensor([1.0, 1, 1, 0])}
    proco.reward_critic_loss(agent, rows, gen())
    close(agent.reached, 0.01 * 7 / 3)
    for _ in range(1000):
        proco.reward_critic_loss(agent, rows, gen())
    close(agent.reached, 7 / 3, rtol=1e-3)


@pytest.mark.parametrize("q_c, expected", [(0.0, 0.25), (0.5, 0.125), (1.0, 0.0), (2.0, 0.0)])
def test_cpqs_penalty_raises_the_cost_of_actions_nobody_takes(q_c, expected):
    """Of [-1, 1] a quarter is farther than 1 from the driver's -.5."""
    agent = newborn(method="cpq")
    give(agent, q_c=lambda x, v, a: q_c)
    rows = rows_of(torch.zeros(8000, 2), torch.full((8000, 1), -0.5))
    penalty = float(proco.cpq_penalty(agent, rows, gen()))
    close(penalty, 0.1 * expected, atol=0.002)


@pytest.fixture
def multiplier(monkeypatch):
    """lambda after some updates at a given mean violation of the constraint."""
    agent, d, _ = table_of("td3bc-lag", 32)
    agent.actor = proco.Mlp(2, 8, 1)
    optimisers = {"actor": proco.adam(agent.actor.parameters(), 1e-3)}

    def after(violation, steps, begin=10.0):
        def actor_loss(agent, rows):
            return agent.propose(rows["x"]).sum(), torch.tensor(violation)

        monkeypatch.setattr(proco, "actor_loss", actor_loss)
        agent.log_lam.fill_(math.log(begin))
        for _ in range(steps):
            proco.update(agent, optimisers, d, None, gen())
        return float(agent.log_lam.exp())

    return after


def test_the_multiplier_rises_while_the_constraint_is_broken_and_is_bounded(multiplier):
    close(multiplier(0.023, 2), 10 * math.exp(2 * 0.3 * 0.02))
    close(multiplier(0.0, 2), 10 * math.exp(-2 * 0.3 * 0.003))
    close(multiplier(1.0, 100, 80.0), 100)
    close(multiplier(0.0, 200, 0.11), 0.1)


# ==== 7. Acting ===================================================================================


def test_candidates_are_the_proposal_the_grid_and_the_clone():
    agent = newborn()
    give(agent, actor=lambda x, v: torch.atanh(x), clone=lambda x, v: math.atanh(0.25))
    out = agent.candidates(torch.tensor([[0.5, 0], [-0.5, 0]]))
    close(out[:, 0, 0], [0.5, -1, 0, 1, 0.25])
    close(out[:, 1, 0], [-0.5, -1, 0, 1, 0.25])


def test_no_candidate_lets_go_of_wheels_that_are_always_at_full_force():
    """A Car's are four; a Point's nine, as its turn is not clamped; of Ant one number changes."""
    proposal = torch.full((1, 2), 0.1)
    car = proco.around(proposal, TASKS["CarGoal1"])[1:, 0].tolist()
    assert sorted(car) == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert len(proco.around(proposal, TASKS["PointGoal1"])) == 1 + 9
    ant = proco.around(torch.full((1, 8), 0.8), TASKS["AntVelocity"])[1:, 0]
    assert len(ant) == 16
    assert ((ant - 0.8).abs() > 1e-6).sum(-1).eq(1).all()
    assert ant.max() == 1  # within the box
    close(ant.min(), 0.3)


def test_the_filter_takes_the_nearest_feasible_candidate():
    agent = newborn(eps=0.5)
    give(agent, actor=lambda x, v: math.atanh(0.2), clone=lambda x, v: math.atanh(-0.7))
    x = torch.zeros(1, 2)
    close(agent.filter(x), 0.2)  # all are feasible
    give(agent, q_f=lambda x, v, a: 1.0 * (a > 0.1))
    assert float(agent.filter(x)) == 0
    give(agent, q_f=lambda x, v, a: 1.0 * (a > -0.5))
    close(agent.filter(x), -0.7)
    give(agent, q_f=lambda x, v, a: 1.0, q_c=lambda x, v, a: (a + 0.5) ** 2)
    close(agent.filter(x), -0.7)  # none is: the least Q_c


def closed_form(x, v):
    """V_f, 0 or 1."""
    return torch.as_tensor(proco.double_integrator_infeasible(x.numpy(), v.numpy())).float()


def test_a_plan_takes_what_earns_most_and_never_what_is_doomed():
    """Full speed ahead while there is room, and a stop close to the wall."""
    agent = newborn()
    give(agent, q_r=lambda x, v, a: x, v_f=closed_form)
    state = torch.tensor([[-1.0, 0.0], [-5.0, 1.5], [0.5, 0.0]])
    for step in range(80):
        state = agent.model.best(state, proco.plan(agent, state))
        assert (state[:, 0] < 1).all()
        if step == 4:
            close(state[:2, 1], [0.5, 2.0])
    assert (state[:, 0] > 0.8).all()


@pytest.mark.parametrize("solid, action", [(False, 1), (True, -1)])
def test_a_plan_does_not_press_on_through_what_is_solid(solid, action):
    """It has run into a thing 30 cm thick; on through it is shorter than back, if it gives way."""

    def cost(obs, action, next_obs, margin):
        x = next_obs[..., 0]
        core = (x > 1.1) & (x < 1.2) if solid else torch.zeros_like(x)
        return 1.0 * (core if margin < 0 else (x > 1) & (x < 1.3))

    agent = newborn()
    give(agent)
    agent.cost = cost
    assert proco.plan(agent, torch.tensor([[1.01, 0.3]])).tolist() == [[action]]


@pytest.mark.parametrize("wall, action", [(True, -1), (False, 1)])
def test_a_plan_prices_danger_behind_a_goal_too(wall, action):
    """All plans reach the goal at once, at 1 m/s, half a metre before the wall; drivers go on."""
    agent = newborn(DI, Goal(DI, small()))
    give(agent, clone=lambda x, v: 9.0)
    if not wall:
        agent.cost = nowhere
    close(proco.plan(agent, torch.tensor([[0.3, 1.0]])), [[action]])


def nowhere(obs, action, next_obs, margin):
    return torch.zeros(obs.shape[:-1])


def test_where_nothing_is_feasible_a_plan_does_the_least_harm():
    agent = newborn(DI)
    give(agent, q_r=lambda x, v, a: x, q_f=lambda x, v, a: 1.0, v_f=lambda x, v: 1.0)
    assert proco.plan(agent, torch.tensor([[1.3, 0.0]])).tolist() == [[-1]]


@pytest.mark.parametrize("reached, action", [(0.0, -1), (9.0, 1)])
def test_a_plan_ends_at_a_goal_and_earns_what_that_is_worth(reached, action):
    """Behind the goal Q_r promises what nobody knows; before it, it likes to stay away."""
    agent = newborn(DI, Goal(DI, small()))
    agent.reached.fill_(reached)
    agent.cost = nowhere
    give(agent, q_r=lambda x, v, a: torch.where(x < 0.5, -x, 1e6))
    assert proco.plan(agent, torch.tensor([[0.3, 0.0]])).tolist() == [[action]]


def test_a_plan_takes_buttons_that_are_off_for_on():
    """Beside a wrong button it makes no difference to it whether buttons are off."""
    task = TASKS["PointButton1"]
    cost = proco.load_cost("PointButton1")
    agent = Agent(task, small(), fresh_model(task), cost, 0.02)
    state = spread_out(task, 5, 30)
    state[:, task.own_dim : task.own_dim + 2] = torch.tensor([0.15, 0.0])
    dark = state.clone()
    dark[:, task.own_dim - 1] = 1
    action = torch.zeros(30, 2)
    assert proco.judge(cost, task, state, action, state, 0.02).all()
    assert not proco.judge(cost, task, dark, action, dark, 0.02).all()
    close(proco.plan(agent, dark), proco.plan(agent, state))


def test_a_plan_does_not_leave_the_clone_where_nothing_is_to_be_won():
    agent = newborn(DI)
    give(agent, clone=lambda x, v: math.atanh(-0.6), actor=lambda x, v: math.atanh(-0.6))
    state = torch.tensor([[-9.0, 0.0], [-9.0, 0.5]])
    close(proco.plan(agent, state).flatten(), [-0.6, -0.6])
    give(agent, q_r=lambda x, v, a: x)
    agent.q_scale.fill_(1e9)  # a value is worth what it is beside the mean |Q_r|
    close(proco.plan(agent, state).flatten(), [-0.6, -0.6])
    agent.q_scale.fill_(1.0)
    assert proco.plan(agent, state).flatten().tolist() == [1, 1]


def test_of_clamped_forces_a_plan_heeds_the_clones_sign():
    action = torch.tensor([[0.1, -0.2], [-0.3, 0.0]])
    assert proco.in_full(action, TASKS["CarGoal1"]).tolist() == [[1, -1], [-1, 1]]
    close(proco.in_full(action[:1], TASKS["PointGoal1"])[0], [1, -0.2])


def test_ways_of_acting():
    names = ["clone", "actor", "filter", "plan"]
    assert proco.ways(TASKS["CarGoal1"], small(method="proco-cpq")) == names
    assert proco.ways(TASKS["AntVelocity"], small()) == ["clone", "filter", "actor"]
    assert proco.ways(TASKS["CarGoal1"], small(method="fisor")) == names[1:3]
    assert proco.ways(TASKS["CarGoal1"], small(method="td3bc-lag")) == ["actor"]
    with pytest.raises(proco.ProcoError, match="clone, filter, actor"):
        newborn(DI).start([0], "plan")


def test_a_decision_is_held_for_as_long_as_in_training():
    agent = newborn(DI)
    give(agent, actor=lambda x, v: x)
    policy = agent.start([0, 1], "actor")
    shown = np.linspace(0, 0.8, 9)
    done = [policy.act(np.array([[x, 0], [-x, 0]]))[:, 0].tolist() for x in shown]
    held = np.tanh(shown[[0, 0, 0, 3, 3, 3, 6, 6, 6]])
    close(np.array(done), np.stack([held, -held], 1), atol=1e-6)


def test_a_decision_is_revised_where_q_f_vetoes_it():
    """The first of two episodes comes near the wall a step later; the second does not."""
    agent = newborn(DI, eps=0.5)
    give(agent, actor=lambda x, v: math.atanh(0.5), q_f=lambda x, v, a: 1.0 * (x + a > 1))
    policy = agent.start([0, 1], "filter")
    assert policy.act(np.zeros((2, 2))).tolist() == [[0.5], [0.5]]
    assert policy.act(np.array([[0.7, 0], [0.3, 0]])).tolist() == [[0], [0.5]]
    bare = agent.start([0, 1], "actor")
    bare.act(np.zeros((2, 2)))
    assert bare.act(np.array([[0.7, 0], [0.3, 0]])).tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize("name, full", [("CarGoal1", [0.02, 0.02]), ("PointGoal1", [0.05, 1])])
def test_actions_are_saturated_on_the_way_out(name, full):
    task = TASKS[name]
    agent = Agent(task, small())
    torch.nn.init.constant_(agent.actor.biases[-1], 50)
    obs = decode(spread_out(task, 0, 3), task).numpy()
    action = agent.start([0, 1, 2], "actor").act(obs)
    close(action, np.array([full] * 3))


def test_a_policy_remembers_where_buttons_are_while_they_are_off():
    task = TASKS["CarButton1"]
    own, z = split(spread_out(task, 4, 2), task)
    own[:] = empty_scene(task)[0, :8]  # at rest
    state = join(own, z, task)
    lit = decode(state, task)
    dark = lit.clone()
    dark[:, 24:40] = 0
    policy = Agent(task, small()).start([0, 1], "clone")
    policy.act(lit.numpy())
    policy.act(dark.numpy())
    kept = things(policy.last, task, "buttons")
    close(kept, things(state, task, "buttons"), atol=2e-3)


# ==== 8. Training =================================================================================


def prepared(cfg, task=DI):
    """A Training on demonstrated data whose model is learnt, and the data."""
    arrays, _ = proco.load_data(proco.find_data(cfg)[1], task)
    cost = proco.load_cost(cfg.task)
    data = proco.to_device(arrays, task, cost, "cpu")
    return proco.begin_training(cfg, task, data, cost), data


def test_every_method_trains_its_actor_as_often_and_at_the_same_rates(monkeypatch, tmp_path):
    """Counted at the optimisers, for clone, actor and critics of all eight methods."""
    lengths = {"clone_updates": 10, "feasibility_updates": 30, "updates": 20}
    rates = {}
    for method in proco.METHODS:
        cfg = small(method=method, scale=1.0, model_epochs=1, rollouts=60, **lengths)
        training, data = prepared(cfg)
        rates[method] = {name: [] for name in training.optimisers}
        for name, optimiser in training.optimisers.items():
            watch(optimiser, rates[method][name], monkeypatch)
        proco.train(training, data, {}, tmp_path / "training.pt")
    for mine in rates.values():
        assert mine["actor"] == rates["bc"]["actor"]
        assert mine["clone"] == rates["bc"]["clone"]
        if "q_r" in mine:
            assert len(mine["q_r"]) == 25  # from the safety critics' first update on
            assert mine["q_r"][15:] == mine["actor"]
        if "safety" in mine:
            assert mine["safety"] == rates["proco"]["safety"]
    assert len(rates["bc"]["clone"]) == 10
    assert len(rates["cpq"]["safety"]) == 50
    # every second update of the last 20, in the second half of all, where the rate falls to nothing
    close(rates["bc"]["actor"], 3e-4 * np.arange(20, 0, -2) / 25)


def watch(optimiser, rates, monkeypatch):
    """Notes the learning rate of each step of an optimiser."""
    step = optimiser.step

    def noted(*args):
        rates.append(optimiser.param_groups[0]["lr"])
        return step(*args)

    monkeypatch.setattr(optimiser, "step", noted)


@pytest.mark.parametrize(
    "scale, overlap", [(0.35, 0.75), pytest.param(1.0, 0.9, marks=SLOW)], ids=["short", "longer"]
)
def test_the_double_integrators_infeasible_set_is_found_without_a_violation_in_the_data(
    scale, overlap, tmp_path
):
    cfg = small(scale=scale, driver_episodes=100, batch=256, hidden=64, ensemble=7)
    training, data = prepared(cfg)
    assert data["cost"].max() == 0
    proco.train(training, data, {}, tmp_path / "training.pt")
    x, v = np.meshgrid(np.linspace(-1, 0.995, 100), np.linspace(-0.5, 2, 100))
    true = proco.double_integrator_infeasible(x.ravel(), v.ravel())
    grid = torch.tensor(np.stack([x.ravel(), v.ravel()], -1), dtype=torch.float32)
    found = training.agent.feasibility(grid) > training.agent.eps
    assert (true & found).sum() / (true | found).sum() > overlap


# ==== The simulator is the stock one ==============================================================

STOCK_ROLL = """
env = safety_gymnasium.make(f"Safety{sys.argv[1]}-v0")
rows = [env.reset(seed=3)[0].tolist()]
for action in json.loads(sys.argv[2]):
    obs, reward, cost, *_ = env.step(np.array(action))
    rows.append([*obs.tolist(), float(reward), float(cost)])
print(json.dumps(rows))
"""


def roll(name, actions):
    """The first observation, then observation, reward and cost of each step, as lists."""
    env = proco.make_env(name)
    rows = [env.reset(seed=3)[0].tolist()]
    for action in actions:
        obs, reward, cost, *_ = env.step(action)
        rows.append([*obs.tolist(), float(reward), float(cost)])
    return rows


@pytest.mark.parametrize("name", ["CarButton1", "PointGoal2", "CarPush2"])
def test_simulator_equals_stock(name):
    rng = np.random.default_rng(0)
    actions = np.repeat(rng.uniform(-1, 1, (10, 2)), 15, axis=0)
    code = STOCK_SIMULATOR + STOCK_ROLL
    command = [sys.executable, "-W", "ignore", "-c", code, name, json.dumps(actions.tolist())]
    stock = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = json.loads(stock.stdout.splitlines()[-1])
    assert roll(name, actions) == expected  # to the last bit


def test_reset_repeats_itself():
    env = proco.make_env("CarButton1")
    first, _ = env.reset(seed=5)
    env.step(np.ones(2))
    other, _ = env.reset(seed=6)
    again, _ = env.reset(seed=5)
    # a first reset builds a world, the others rebuild it: the stock accelerometer differs by 2e-16
    assert np.allclose(first, again, rtol=0, atol=1e-12)
    assert not np.allclose(first, other)


# ==== The demonstrator ============================================================================


def drive(name, env, seed):
    """One episode of the demonstrator: its observations, actions, rewards and costs, as arrays."""
    obs, _ = env.reset(seed=seed)
    act = proco.make_demonstrator(proco.get_task(name), env, np.random.default_rng(seed))
    rows = []
    over = False
    while not over:
        action = act(obs)
        obs, reward, cost, terminal, timeout, _ = env.step(action)
        rows.append((obs, action, reward, cost))
        over = terminal or timeout
    return [np.array(column) for column in zip(*rows)]


@pytest.mark.parametrize(
    "name, least", [("PointCircle2", 30), ("CarCircle1", 10), ("PointGoal1", 15), ("CarGoal1", 15)]
)
def test_demonstrator_is_safe_and_earns(name, least):
    _, actions, rewards, costs = drive(name, proco.make_env(name), 0)
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1
    assert rewards.sum() > least
    assert costs.sum() == 0


def test_demonstrators_differ():
    _, first, _, _ = drive("PointCircle1", proco.make_env("PointCircle1"), 0)
    _, second, _, _ = drive("PointCircle1", proco.make_env("PointCircle1"), 1)
    assert np.abs(first - second).mean() > 0.1


def test_double_integrator_stops_before_the_wall():
    for seed in range(20):
        states, actions, rewards, _ = drive(
            "DoubleIntegrator", proco.DoubleIntegrator(far=6.0), seed
        )
        assert states[:, 0].max() < 1
        assert rewards.sum() > 0
        assert np.abs(actions).max() <= 1


# ==== Language models: what a predicate may say and do ============================================

LLM_TASK = "PointGoal1"  # 60 observations, the hazards' lidar at 28:44
GOOD = """def cost(obs, action, next_obs, margin=0.0):
    d = 3 * (1 - next_obs[..., 28:44].amax(-1))
    return (d <= 0.2 + margin).float()
"""


def within(lines, before=""):
    """GOOD with these lines put into its function, and with something before it."""
    head, rest = GOOD.split("\n", 1)
    more = "".join(f"    {line}\n" for line in lines.split("\n"))
    return f"{before}\n{head}\n{more}{rest}"


REFUSED_LINES = {
    "import": "import os\nos.system('true')",
    "from import": "from os import system\nsystem('true')",
    "numpy": "import numpy as np\nx = np.abs(obs)",
    "alias of torch": "import torch as t\nx = t.load('x')",
    "__import__": "__import__('os').system('true')",
    "subclasses": "x = ().__class__.__base__.__subclasses__()",
    "dunder attribute": "x = obs.__class__",
    "getattr": "x = getattr(obs, 1)",
    "eval": "eval(1)",
    "open": "open(1, 2)",
    "globals": "x = globals()",
    "builtins": "x = __builtins__",
    "own builtins": "__builtins__ = 1",
    "torch.save": "torch.save(obs, 1)",
    "torch.load": "x = torch.load(1)",
    "hub": "torch.hub.load(1, 2)",
    "ops": "torch.ops.load_library(1)",
    "torch renamed": "t = torch\nt.save(obs, 1)",
    "torch in brackets": "(torch).save(obs, 1)",
    "torch.os": "torch.os.system(1)",
    "storage": "obs.untyped_storage().fill_(0)",
    "to numpy": "x = obs.numpy()",
    "to file": "obs.tofile(1)",
    "class": "class A: pass",
    "lambda": "f = lambda: 1",
    "while": "while True: pass",
    "comprehension": "x = [i for i in range(3)]",
    "write item": "next_obs[..., 0] = 0",
    "write method": "next_obs.add_(1)",
    "write in place": "d = 0\nd += 1",
    "write out": "torch.add(obs, 1, out=next_obs)",
    "write attribute": "obs.data = next_obs",
    "delete": "del obs",
    "global": "global n\nn = 1",
    "with": "with torch.no_grad(): pass",
    "random": "d = torch.rand(3)",
    "random method": "d = obs.bernoulli()",
    "seed": "torch.manual_seed(0)",
    "threads": "torch.set_num_threads(1)",
    "string": "x = 'a'",
    "f-string": "x = f'{obs}'",
    "try": "try: pass\nexcept: pass",
    "walrus": "x = (y := 1)",
    "star": "x = torch.stack([*obs])",
    "double star": "x = torch.abs(**obs)",
    "yield": "yield 1",
    "assert": "assert True",
    "undefined": "x = y",
    "misspelt": "x = torch.wehre(obs)",
}
REFUSED_TEXTS = {
    "decorator": "@torch.jit.script\n" + GOOD,
    "import": "import os\nX = os.name\n" + GOOD,
    "call": "float(1)\n" + GOOD,
    "torch": "X = torch.zeros(3)\n" + GOOD,
    "loop": "for i in range(3): X = i\n" + GOOD,
    "prose": "I am sorry, but I can't write that.",
    "prose at the end": GOOD + "\nHope this helps!",
    "empty": "",
    "null": "\0",
    "surrogate": "X = '\ud800'\n" + GOOD,
    "deep": "x = " + "-" * 9000 + "1",
    "brackets": "(" * 9000,
    "long": GOOD + "#" * 30_000,
    "no cost": GOOD.replace("def cost", "def price"),
    "two costs": GOOD + GOOD,
    "other arguments": GOOD.replace("action, ", ""),
    "no margin": GOOD.replace("margin=0.0", "margin"),
    "margin is computed": GOOD.replace("margin=0.0", "margin=float(1)"),
}
REFUSED_RETURNS = {
    "not 0 or 1": "d",
    "nan": "d * math.inf * 0",
    "bool": "d <= 0.2 + margin",
    "long": "(d <= 0.2 + margin).long()",
    "nothing": "None",
    "a number": "0.0",
    "wrong shape": "(d <= 0.2 + margin).float().unsqueeze(-1)",
    "one for all": "(d <= 0.2 + margin).float().amax()",
    "only for batches": "(next_obs[:, 28] > 0.9 - margin).float()",
    "mixes rows": "(d <= d.mean() + margin).float()",
    "not monotone": "(d <= 0.2 - margin).float()",
    "all safe": "torch.zeros_like(d)",
    "all unsafe": "torch.ones_like(d)",
    "raises": "obs[..., 999]",
    "recursion": "cost(obs, action, next_obs)",
}


def refused(check, *job):
    """The sentence with which something is refused."""
    with pytest.raises(CostError) as caught:
        check(*job)
    sentence = str(caught.value)
    assert len(sentence) < 400 and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", REFUSED_LINES)
def test_lines_that_no_predicate_needs_are_refused(name):
    refused(write.check_syntax, within(REFUSED_LINES[name]))


@pytest.mark.parametrize("name", REFUSED_TEXTS)
def test_texts_that_are_no_predicate_are_refused(name):
    refused(write.check_syntax, REFUSED_TEXTS[name])


@pytest.mark.parametrize("name", REFUSED_RETURNS)
def test_what_is_no_cost_is_refused(name):
    text = GOOD.replace("(d <= 0.2 + margin).float()", REFUSED_RETURNS[name])
    refused(write.check_behaviour, write.check_syntax(text), LLM_TASK)


def test_a_predicate_that_fails_says_how():
    assert "out of bounds" in refused(write.check_behaviour, within("x = obs[..., 999]"), LLM_TASK)


@pytest.mark.parametrize(
    "line, why",
    [
        ("for i in range(999999999999): x = i", "does not finish"),
        ("x = 9 ** 9 ** 9", "does not finish"),  # one operation, which no signal interrupts
        ("x = torch.zeros(99999, 99999) + 1", "memory"),
    ],
)
def test_a_child_process_ends_what_has_no_end(line, why, monkeypatch):
    monkeypatch.setattr(write, "SECONDS", 2)
    start = time.monotonic()
    assert why in refused(write.check, within(line), LLM_TASK)
    assert time.monotonic() - start < 30


def test_a_child_process_says_what_is_said_here(tmp_path, monkeypatch):
    """Wherever it starts, and also with what torch imports only when it is first used."""
    monkeypatch.chdir(tmp_path)
    text = within("limit = torch.tensor(0.2)").replace("0.2 +", "limit +")
    assert write.check(text, LLM_TASK)[1] == write.check_behaviour(GOOD, LLM_TASK)
    assert list(tmp_path.iterdir()) == []


def test_what_a_plain_predicate_needs_is_allowed():
    text = '''"""Hazards, by their lidar; with torch."""
import torch, math
CORNERS = ((0.1, 0.1), (-0.1, 0.1))
RADIUS: float = 0.2 + 0.0 * math.sqrt(2)

def distance(bins: torch.Tensor, reach: float = 3.0) -> torch.Tensor:
    """Of the nearest."""
    value = bins.max(dim=-1).values  # in [0, 1]
    return reach * (1 - value)

def cost(obs, action, next_obs, margin=0.0):
    bins = next_obs[..., 28:44]
    i = torch.argmax(bins, dim=-1, keepdim=True)
    around = torch.cat([torch.gather(bins, -1, (i - 1) % 16), torch.roll(bins, 1, -1)], dim=-1)
    angle = torch.atan2(around[..., 1], around[..., 0]) + torch.arange(16, device=obs.device)[0]
    xy = torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1)
    unsafe = torch.zeros(next_obs.shape[:-1], dtype=torch.bool, device=next_obs.device)
    for x, y in CORNERS:
        unsafe = unsafe | (torch.linalg.norm(xy * 0 + x * y * 0, dim=-1) < -1)
    if bins.shape[-1] == 16:
        unsafe = unsafe | (distance(bins) <= RADIUS + margin)
    return torch.where(unsafe, torch.ones_like(angle), torch.zeros_like(angle)).to(obs.dtype)
'''
    code = write.check_syntax(text)
    assert "import" not in code and "Tensor" not in code and "# in [0, 1]" in code
    assert "RADIUS = 0.2" in code and "def distance(bins, reach = 3.0):" in code
    same = write.check_behaviour(GOOD, LLM_TASK)
    assert write.check_behaviour(code, LLM_TASK) == same


def test_recorded_safe_steps_may_hardly_be_called_unsafe():
    steps = write.plausible(LLM_TASK)
    safe = load_cost(LLM_TASK)(*steps) == 0
    data = [x[safe].numpy() for x in steps]
    assert "0.00% of recorded" in write.check_behaviour(GOOD, LLM_TASK, tensors(data))
    shy = GOOD.replace("0.2 +", "0.9 +")
    assert "recorded" in refused(write.check_behaviour, shy, LLM_TASK, tensors(data))


def tensors(arrays):
    return [torch.as_tensor(x) for x in arrays]


# ==== Language models: what they and their servers answer =========================================

FENCE = "```"
TYPED = "obs: Tensor, action: Tensor, next_obs: 'Tensor', margin: float = 0.0) -> torch.Tensor"


def fenced(code, tag="python", fence=FENCE):
    return f"{fence}{tag}\n{code}{fence}\n"


def thinking(thought, answer):
    return f"<think>\n{thought}\n</think>\n\n{answer}"


REPLIES = {  # each holds GOOD, with a habit of some model
    "plain": "Here it is.\n\n" + fenced(GOOD) + "\nIt flags hazards.",
    "no fence": GOOD,
    "no closing fence": "Here:\n\n```python\n" + GOOD,
    "tilde": fenced(GOOD, fence="~~~"),
    "four backticks": fenced(GOOD, fence="````"),
    "odd tag": fenced(GOOD, 'Python3 title="cost.py"'),
    "in a list": "1. So:\n" + "".join(f"   {line}\n" for line in fenced(GOOD).splitlines()),
    "two blocks": fenced("LIMIT = 0.2\n") + "and\n" + fenced(GOOD.replace("0.2", "LIMIT")),
    "better one last": fenced(GOOD.replace("amax", "wrong")) + "Better:\n" + fenced(GOOD),
    "usage last": fenced(GOOD) + "Use it so:\n" + fenced("x = cost(a, b, c)\n"),
    "tests last": fenced(GOOD) + "Test:\n" + fenced("import os\ndef cost_test():\n    return 1\n"),
    "draft in thought": thinking(fenced("def cost(x):\n    pass\n"), fenced(GOOD)),
    "fence in thought": thinking("It has to start with ```python.", fenced(GOOD)),
    "open fence in thought": thinking("```python\ndef cost(x):\nhmm", fenced(GOOD)),
    "half a thought": "Hazards.\n</think>\n\n" + fenced(GOOD),
    "carriage returns": fenced(GOOD).replace("\n", "\r\n"),
    "byte order mark": "\ufeff" + fenced(GOOD),
    "hard blanks": fenced(GOOD.replace("    return", "\u00a0   return")),
    "imports": fenced("import torch\nimport math\nimport numpy as np\n\n" + GOOD),
    "annotations": fenced(
        "from torch import Tensor\n" + GOOD.replace("obs, action, next_obs, margin=0.0)", TYPED)
    ),
    "not ASCII": "d ≥ 0 \U0001f600\n" + fenced('"""d ≥ 0"""\n' + GOOD),
}


class Endpoint(BaseHTTPRequestHandler):
    """A chat-completions server that gives the answers it was given and keeps what it was asked."""

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), question))
        status, fields, pieces = self.server.answers.pop(0)
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that waits no longer
            for piece in pieces:
                self.wfile.write(piece)
                time.sleep(0.1 if len(pieces) > 1 else 0)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """The server; nothing of the user's is read, and predicates are tried in this process."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "dsrl"))
    monkeypatch.setattr(proco, "CACHE", tmp_path / "cache")
    for name in ("PROCO_LLM_URL", "PROCO_LLM_MODEL", "PROCO_LLM_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(write, "check_in_child", write.check_behaviour)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.asked = []
    server.answers = []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def raw(body, status=200, **fields):
    """An answer of the endpoint: (status, header fields, pieces of the body)."""
    body = body if isinstance(body, bytes) else body.encode()
    fields = {name.replace("_", "-"): value for name, value in fields.items()}
    return status, {"Content-Length": str(len(body))} | fields, [body]


def answer(content, finish="stop", **more):
    """A chat completion as most servers send it."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return raw(json.dumps({"choices": [choice], **more}))


def error(status, message, **fields):
    return raw(json.dumps({"error": {"message": message, "type": "x"}}), status, **fields)


def events(*pieces):
    """A reply as server-sent events."""
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    lines = [": busy", *(f"data: {json.dumps(chunk)}" for chunk in chunks), "data: [DONE]"]
    return "\n\n".join(lines) + "\n\n"


@pytest.fixture
def ask_once(endpoint, tmp_path):
    """Has the endpoint give its answers -> the text of the file that was written."""

    def ask(*answers, url=None, key=None):
        endpoint.answers = list(answers)
        out = tmp_path / "out"
        path = write.write_cost(LLM_TASK, url or endpoint.url, "m", key, len(answers), out)
        assert [file.name for file in out.iterdir()] == [f"{LLM_TASK}.py"]
        return path.read_text(encoding="utf-8")

    return ask


@pytest.mark.parametrize("name", REPLIES)
def test_habits_of_models(name, ask_once, tmp_path):
    text = ask_once(answer(REPLIES[name]))
    assert "import" not in text and "d <= " in text
    steps = write.plausible(LLM_TASK)
    mine = load_cost(LLM_TASK, tmp_path / "out" / f"{LLM_TASK}.py")
    assert torch.equal(mine(*steps, 0.1), load_cost(LLM_TASK)(*steps, 0.1))


DONE = 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
REFUSAL = {"content": None, "refusal": "I won't"}
PARTS = [{"type": "thinking", "thinking": []}, {"type": "text", "text": fenced(GOOD)}, "Bye."]
WHOLE = answer(fenced(GOOD))[2][0]


@pytest.mark.parametrize(
    "body",
    [
        answer(PARTS),
        raw(json.dumps({"choices": [{"text": fenced(GOOD)}]})),
        raw(events(fenced(GOOD)[:20], fenced(GOOD)[20:]), Content_Type="text/event-stream"),
        raw(gzip.compress(WHOLE), Content_Encoding="gzip"),
        raw(b"\xef\xbb\xbf\n\n  " + WHOLE),
        (200, {}, [WHOLE[:50], WHOLE[50:]]),  # no length: the end is where the connection ends
    ],
    ids=["parts", "text", "events", "gzip", "blanks", "no length"],
)
def test_habits_of_servers(body, ask_once):
    assert GOOD in ask_once(body)


@pytest.mark.parametrize(
    "body, why",
    [
        (answer("```python\n" + GOOD[:60], "length", usage={"completion_tokens": 77}), "77 tokens"),
        (answer(None, "length", usage=None), "cut off"),
        (answer(""), "empty"),
        (answer(None), "empty"),
        (answer("<think>\n" + fenced(GOOD)), "no function cost"),
        (answer("I can't do that."), "no function cost"),
        (answer("```python\n" + GOOD[:60], "MAX_TOKENS"), "cut off"),
        (raw(events(fenced(GOOD)[:20], "")[: -len(DONE)]), "cut off"),
        (answer(None, "content_filter"), "declines: content_filter"),
        (raw(json.dumps({"choices": [{"message": REFUSAL}]})), "declines: I won't"),
        (answer(fenced(within("import os\nos.abort()"))), "imports"),
        (answer(fenced(GOOD.replace("+ margin", "- margin"))), "wider margin"),
    ],
)
def test_a_refused_reply_is_asked_again_with_the_reason(body, why, endpoint, ask_once, capsys):
    assert GOOD in ask_once(body, answer(fenced(GOOD)))
    first, second = (question["messages"] for _, _, question in endpoint.asked)
    assert first == [{"role": "user", "content": write.prompt(LLM_TASK)}]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert why in second[2]["content"] and why in capsys.readouterr().out
    assert second[1]["content"]  # some servers refuse an empty message


def test_no_reply_passes(endpoint, tmp_path):
    (tmp_path / f"{LLM_TASK}.py").write_text("before")
    endpoint.answers = [answer("no code")] * 2
    job = (LLM_TASK, endpoint.url, "m", None, 2, tmp_path)
    assert "none of 2 replies" in refused(write.write_cost, *job)
    assert [file.read_text() for file in tmp_path.glob("*")] == ["before"]


DRIP = (200, {"Content-Length": "99"}, [b" "] * 99)
LOCKED = {"detail": [{"msg": "who are you?"}]}


@pytest.mark.parametrize(
    "body, why",
    [
        (error(404, 'model "m" not found'), 'status 404: model "m" not found'),
        (error(400, "maximum context length is 2048"), "maximum context length is 2048"),
        (raw('{"error": "out of memory"}', 500), "out of memory"),
        (raw('[{"error": {"message": "no quota"}}]', 403), "no quota"),
        (raw(json.dumps(LOCKED), 401), "who are you"),
        (error(401, "the key very-secret is wrong"), r"the key \*\*\* is wrong"),
        (raw('{"error": {"message": "overloaded"}}'), "answers: overloaded"),
        (raw("<h1>Bad gateway</h1>", 502), "status 502: <h1>"),
        (raw("", 500), "status 500: nothing more"),
        (raw("", 308, Location="https://there/v1"), "points to https://there/v1"),
        (error(503, "loading", Retry_After="600"), "status 503: loading"),
        (raw("<!doctype html><title>Open WebUI</title>"), "no chat completion: <!doctype html>"),
        (raw('{"choices": []}'), "no chat completion"),
        (raw('{"choices": [{"message": {"content": 7}}]}'), "no chat completion"),
        (raw("[]"), "no chat completion"),
        (raw('{"Authorization": "Bearer very-secret"}'), r"completion: .*Bearer \*\*\*"),
        (raw(""), "no chat completion: nothing"),
        ((200, {"Content-Length": "5000"}, [b'{"choices":']), "breaks off"),
        (raw(b"\x1f\x8b broken", Content_Encoding="gzip"), "breaks off or is damaged"),
        (DRIP, "more than 1 s"),
    ],
)
def test_errors_of_servers(body, why, endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write, "ANSWER_TIME", 1)
    endpoint.answers = [body]
    with pytest.raises(ProcoError, match=why) as caught:
        write.write_cost(LLM_TASK, endpoint.url, "m", "very-secret", 3, tmp_path / "out")
    assert "\n" not in str(caught.value) and len(endpoint.asked) == 1
    assert "secret" not in str(caught.value) + capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == []


def test_a_busy_server_is_asked_again_for_a_minute(endpoint, ask_once, monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(write.time, "sleep", waits.append)
    busy = error(429, "slow down", Retry_After="7")
    odd = error(503, "loading", Retry_After="Wed, 21 Oct 2026 07:28:00 GMT")
    assert GOOD in ask_once(odd, busy, odd, answer(fenced(GOOD)))
    waits = [wait for wait in waits if wait >= 1]  # subprocess waits, too, but for less
    assert waits == [1, 7, 14]
    endpoint.answers = [odd] * 20
    with pytest.raises(ProcoError, match="loading"):
        write.write_cost(LLM_TASK, endpoint.url, "m", out_dir=tmp_path)
    assert 3 < len(endpoint.answers) < 20


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions", "/chat/completions/", " \n"])
def test_forms_of_the_url_and_the_key(tail, endpoint, ask_once):
    text = ask_once(answer(fenced(GOOD)), url=endpoint.url + tail, key=" very-secret\r\n")
    ((path, fields, question),) = endpoint.asked
    assert path == "/v1/chat/completions" and question["stream"] is False
    assert fields["Authorization"] == "Bearer very-secret"
    assert "secret" not in text + json.dumps(question)


def test_a_key_is_not_replaced_by_a_netrc_and_a_password_is_not_shown(
    endpoint, ask_once, tmp_path, monkeypatch
):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password hidden\n")
    monkeypatch.setenv("NETRC", str(netrc))
    url = endpoint.url.replace("//", "//me:hidden@") + "/chat/completions?api-version=1"
    ask_once(answer(fenced(GOOD)), url=url, key="very-secret")
    ((path, fields, _),) = endpoint.asked
    assert path == "/v1/chat/completions?api-version=1"
    assert fields["Authorization"] == "Bearer very-secret"
    assert write.endpoint(url)[1] == f"{endpoint.url}/chat/completions"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "nonsense", "http://", "http://[::1"])
@pytest.mark.parametrize("key", ["very-secret", "very\nsecret", "very-sécret€"])
def test_nobody_is_there(url, key, endpoint, tmp_path):
    with pytest.raises(ProcoError, match="no language model answers") as caught:
        write.write_cost(LLM_TASK, url, "m", key, out_dir=tmp_path)
    assert "secret" not in str(caught.value)


def test_the_command_writes_a_file_that_says_where_it_comes_from(endpoint, tmp_path, capsys):
    out = tmp_path / "out"
    endpoint.answers = [answer(REPLIES["not ASCII"])]
    job = ["--task", LLM_TASK, "--url", endpoint.url, "--model", "m\nimport os", "--out", str(out)]
    assert write.main(job) == 0
    head = (out / f"{LLM_TASK}.py").read_text(encoding="utf-8").splitlines()[:5]
    assert all(line.startswith("# ") for line in head) and head[1] == "# model:  m?import os"
    assert write.prompt_hash(LLM_TASK) in head[3]
    assert f"python -m llm_costs.write --task {LLM_TASK} --show-prompt" in head[4]
    assert "no recorded steps" in capsys.readouterr().out
    (out / f"{LLM_TASK}.py").write_text("reviewed")
    endpoint.answers = [answer(REPLIES["not ASCII"])]
    assert write.main(job) == 0
    assert (out / f"{LLM_TASK}.py.former").read_text() == "reviewed"
    assert f"{LLM_TASK}.py.former now" in capsys.readouterr().out
    assert write.main(["--task", LLM_TASK, "--show-prompt"]) == 0
    shown = capsys.readouterr().out
    assert hashlib.sha256(shown.encode()).hexdigest()[:16] == write.prompt_hash(LLM_TASK)


def test_the_command_says_in_one_sentence_what_is_wrong(endpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    base = ["--task", LLM_TASK, "--url", endpoint.url, "--model", "m"]
    for job, why in (
        (["--task", LLM_TASK], "--url and --model"),
        ([*base, "--task", "PointGaol1"], "PointGoal1"),
        ([*base, "--data", str(tmp_path / "none.hdf5")], "none.hdf5"),
        ([*base, "--out", str(tmp_path / "file" / "below")], "--out"),
    ):
        assert write.main(job) == 2
        said = capsys.readouterr().err
        assert said.startswith("llm_costs.write: ") and why in said and said.count("\n") == 1
    assert endpoint.asked == []  # all of that is found before anybody is asked

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "ask", interrupted)
    assert write.main([*base, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.strip() == "llm_costs.write: stopped; nothing was written"


def test_recorded_steps_are_those_that_are_named_or_the_newest(endpoint, tmp_path, capsys):
    task = get_task("DoubleIntegrator")
    folder = proco.CACHE / "demonstrator"
    folder.mkdir(parents=True)
    fields = {name: np.zeros(120, np.float32) for name in ("rewards", "costs", "terminals")}
    fields["timeouts"] = (np.arange(120) % 30 == 29).astype(np.float32)
    fields["actions"] = np.zeros((120, task.act_dim), np.float32)
    for name, x in (("DoubleIntegrator-v2-1.hdf5", -1.0), ("other.hdf5", -2.0)):
        fields["observations"] = np.full((120, task.obs_dim), x, np.float32)
        fields["next_observations"] = fields["observations"]
        with h5py.File(folder / name, "w") as file:
            for key, values in fields.items():
                file[key] = values
    obs, action, next_obs = write.recorded_steps("DoubleIntegrator")
    assert (obs == -1).all() and action.shape == (120, 1) and (next_obs == -1).all()
    assert "DoubleIntegrator-v2-1.hdf5" in capsys.readouterr().out
    (folder / "DoubleIntegrator-v2-2.hdf5").write_text("newer, but no HDF5")
    obs, *_ = write.recorded_steps("DoubleIntegrator")
    assert (obs == -1).all() and "passed over" in capsys.readouterr().out
    named = write.recorded_steps("DoubleIntegrator", folder / "other.hdf5")
    assert (named[0] == -2).all() and write.recorded_steps("PointGoal1") is None


# ==== Language models: the cached predicates ======================================================


@pytest.mark.parametrize("name", proco.TASKS)
def test_cached_predicates(name):
    """Each passes what a reply must pass, and was written from the prompt of today."""
    text = (Path(write.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert re.search(r"^# prompt: (\w{16}) ", text, re.MULTILINE)[1] == write.prompt_hash(name)
    assert re.search(r"^# day:    \d{4}-\d\d-\d\d$", text, re.MULTILINE) and "# model:  " in text
    assert f"python -m llm_costs.write --task {name} --show-prompt" in text
    assert write.check_syntax(text) == text
    write.check_behaviour(text, name)


def test_prompts_tell_facts():
    for name, task in proco.TASKS.items():
        text = write.prompt(name)
        assert "{" not in text and f"(..., {task.obs_dim})" in text and name in text
        assert ("lidar" in text) == bool(task.lidars)
        assert ("Gremlins" in text) == ("Button" in name)
        assert ("Vases" in text) == ("Goal2" in name)
    assert "24 to 39: the circle lidar" in write.prompt("CarCircle2")
    assert "12 to 27: the circle lidar" in write.prompt("PointCircle2")
    with pytest.raises(ProcoError):
        write.prompt("PointFly1")


def scene(task, yaw=0.0, **things):
    """An observation in which each named lidar sees things at (distance m, bearing degrees)."""
    obs = torch.zeros(get_task(task).obs_dim)
    if get_task(task).lidars:
        obs[9] = -0.5 * math.sin(yaw)
        obs[10] = -0.5 * math.cos(yaw)
    for lidar in get_task(task).lidars:
        for distance, bearing in things.get(lidar.name, ()):
            i, rest = divmod(bearing % 360, 22.5)
            value = max(0.0, 1 - distance / lidar.reach)
            share = rest / 22.5
            for k, seen in ((i, 1.0), (i + 1, share), (i - 1, 1 - share)):
                place = lidar.start + int(k) % 16
                obs[place] = max(obs[place], seen * value)
    return obs


TURN = math.radians(60)


@pytest.mark.parametrize(
    "task, obs, unsafe_from",  # the margin from which the scene counts as unsafe
    [
        ("PointGoal1", {"hazards": [(0.19, 100)]}, 0),
        ("CarGoal1", {"hazards": [(0.23, 100), (1, 3)]}, 0.03),
        ("PointGoal1", {"goal": [(0.1, 0)], "vases": [(0.1, 0)]}, 2.8),
        ("CarPush1", {"hazards": [(0.33, 7)]}, 0.03),
        ("PointCircle1", {"circle": [(1.1, 180)]}, 0.025),
        ("PointCircle1", {"circle": [(1.1, 180)], "yaw": math.pi / 2}, 1.125),
        ("CarCircle2", {"circle": [(1.1, 30)], "yaw": TURN}, 0.025),
        ("CarCircle1", {"circle": [(1.13, 9)], "yaw": -math.radians(9)}, 0),
        ("CarCircle1", {}, 0),
        ("PointPush2", {"pillars": [(0.40, 0)]}, 0.048),  # before the nose
        ("PointPush2", {"pillars": [(0.40, 90)]}, 0.098),
        ("CarPush2", {"pillars": [(0.40, 270)]}, 0.023),  # before the front bumper
        ("CarGoal2", {"vases": [(0.29, 270)]}, 0),
        ("PointButton1", {"buttons": [(0.15, 90), (1, 0)], "goal": [(1, 0)]}, 0),
        ("PointButton1", {"buttons": [(0.15, 90), (1, 0)], "goal": [(0.15, 90)]}, 0.748),
        ("CarButton2", {"gremlins": [(0.3, 270)]}, 0),
    ],
)
def test_hand_computed_distances(task, obs, unsafe_from):
    cost = load_cost(task)
    obs = scene(task, **obs)
    action = torch.zeros(2)
    if unsafe_from:
        assert cost(obs, action, obs, unsafe_from - 2e-3) == 0
    assert cost(obs, action, obs, unsafe_from + 2e-3) == 1


def test_buttons_are_off_while_their_lidar_is_dark():
    cost = load_cost("CarButton1")
    on = scene("CarButton1", buttons=[(0.1, 90)], goal=[(2, 0)])
    off = scene("CarButton1", goal=[(2, 0)])
    pairs = [(on, on), (off, on), (on, off), (off, off)]
    assert [cost(obs, torch.zeros(2), next_obs) for obs, next_obs in pairs] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "name, i, limit",
    [
        ("HalfCheetahVelocity", 8, 3.2096),
        ("HopperVelocity", 5, 0.7402),
        ("SwimmerVelocity", 3, 0.2282),
        ("Walker2dVelocity", 8, 2.3415),
    ],
)
def test_speed_is_the_mean_over_the_step(name, i, limit):
    task = get_task(name)
    cost = load_cost(name)
    action = torch.zeros(task.act_dim)
    forward = torch.zeros(task.obs_dim)
    forward[i] = 1.0
    faster = (limit + 0.1) * forward
    assert cost(faster, action, (limit - 0.08) * forward) == 1
    assert cost(faster, action, (limit - 0.12) * forward) == 0
    assert cost(faster, action, (limit - 0.12) * forward, 0.02) == 1
    assert cost(-faster, action, -faster) == 0


def test_an_ant_may_not_run_too_fast_in_any_direction():
    cost = load_cost("AntVelocity")
    obs = torch.zeros(8, 27)
    angle = torch.arange(8) * (math.pi / 4)
    obs[:, 13] = 2.62 * torch.cos(angle)
    obs[:, 14] = 2.62 * torch.sin(angle)
    action = torch.zeros(8, 8)
    assert not cost(obs, action, obs).any() and cost(obs, action, 1.01 * obs).all()


# ==== Language models: how right the predicates are ===============================================


def stand(env, _):
    """A step of a double integrator that stays far from the wall."""
    env.t = getattr(env, "t", 0) + 1
    return np.array([-3, 0], np.float32), 0.0, 0.0, False, env.t >= 100, {}


def test_scores_count_neighbours_and_warnings():
    flags = np.zeros(20, bool)
    flags[10] = True
    assert np.flatnonzero(score.near(flags, 2)).tolist() == [8, 9, 10, 11, 12]
    unsafe = np.array([1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1], bool)
    wide = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1], bool)
    assert score.warning(wide, unsafe) == [1, 4, 0]
    assert score.warning(np.ones(11, bool), unsafe) == [4, 7, 10]


def test_the_wall_is_told_without_a_mistake():
    name, states, unsafe, *shares, early, lost = score.score("DoubleIntegrator", 1000, 0)
    assert (name, states, lost) == ("DoubleIntegrator", "1000", "0") and unsafe != "0.0%"
    assert shares[:4] == ["1.000"] * 4 and int(early) >= 0


@pytest.mark.parametrize("name", ["PointGoal1", "CarPush1"])
def test_hazards_are_told_nearly_without_a_mistake(name):
    shares = score.score(name, 1500, 1)[3:7]
    assert all(float(share) > 0.95 for share in shares)


def test_the_score_command(capsys):
    assert score.main(["DoubleIntegrator", "--states", "300"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in table} == {13} and "DoubleIntegrator" in table[2]
    assert score.main(["DoubleIntegrator", "CarGaol1"]) == 2
    said = capsys.readouterr()
    assert "CarGoal1" in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_score_without_a_bar_ends_and_shares_of_nothing_are_no_numbers(monkeypatch):
    monkeypatch.setattr(score, "tqdm", functools.partial(score.tqdm, disable=True))
    monkeypatch.setattr(proco.DoubleIntegrator, "step", stand)
    assert score.score("DoubleIntegrator", 100, 0)[2:6] == ["0.0%", "-", "-", "-"]


@pytest.mark.parametrize("name", ["write", "score"])
def test_commands_elsewhere_say_where_to_run_them(name, tmp_path):
    script = Path(write.__file__).with_name(f"{name}.py")
    command = [sys.executable, "-I", script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "in the repository's folder" in done.stderr
    assert done.stderr.count("\n") == 1


# ==== Data ========================================================================================


def recorded(lengths=(100,) * 6, unsafe=()):
    """Episodes of the double integrator under random actions, {key: (B, .)} as DSRL's files."""
    rng = np.random.default_rng(0)
    parts = []
    for n, length in enumerate(lengths):
        start = rng.uniform((-6, -0.3), (-4, 0.3))
        action = rng.normal(0, 0.4, length).clip(-1, 1)
        v = (start[1] + 0.1 * action.cumsum()).clip(-2, 2)
        x = start[0] + 0.1 * v.cumsum()
        after = np.stack([x, v], -1)
        before = np.concatenate([start[None], after[:-1]])
        cost = np.zeros(length)
        cost[5:6] = n in unsafe
        last = np.arange(length) == length - 1
        parts.append((before, after, action[:, None], 0.1 * v, cost, 0 * cost, last))
    columns = map(np.concatenate, zip(*parts))
    return {key: column.astype(np.float32) for key, column in zip(proco.KEYS, columns)}


def write_hdf5(path, arrays, **how):
    """A file of such arrays; those that are None are left out."""
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            if value is not None:
                file.create_dataset(key, data=value, **how)
    return path


def at(array, index, value):
    """A copy of an array with another value there."""
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    "change, episodes",
    [
        (lambda d: {}, 6),
        (lambda d: {key: value[:560] for key, value in d.items()}, 5),  # the last one is cut
        (lambda d: {key: value.astype("f8") for key, value in d.items()}, 6),
        (lambda d: {"costs": d["costs"].astype("i8"), "terminals": d["terminals"] > 0}, 6),
        (lambda d: {"next_observations": d["next_observations"].astype("f2")}, 6),
        (lambda d: {"actions": at(d["actions"], 7, 1.0005)}, 6),
        (lambda d: {"terminals": d["timeouts"]}, 6),
        (lambda d: {"terminals": d["timeouts"], "timeouts": d["terminals"]}, 6),
        (lambda d: {"costs": at(d["costs"], [105, 205], 3)}, 4),
        (lambda d: {"rewards": 0 * d["rewards"]}, 6),
        (lambda d: {"more": d["rewards"][:5]}, 6),
        (lambda d: recorded([100, 3, 57, 1, 20, 8, 100]), 7),
    ],
)
def test_data_sets_that_can_be_learnt_from(change, episodes, tmp_path):
    arrays = recorded()
    path = write_hdf5(tmp_path / "data.hdf5", arrays | change(arrays))
    arrays, facts = proco.load_data(path, get_task("DoubleIntegrator"))
    assert facts["episodes"] == episodes == len(np.unique(arrays["episode"]))
    assert len(arrays["rewards"]) == facts["rows"]
    assert arrays["actions"].dtype == np.float32


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: {"next_observations": None}, "next_observations"),
        (lambda d: {"timeouts": None}, "timeouts"),
        (lambda d: {"costs": None}, "costs"),
        (lambda d: {"costs": np.full(600, b"none")}, "costs"),
        (lambda d: {"rewards": d["rewards"][:, None]}, "rewards"),
        (lambda d: {"rewards": d["rewards"][:-1]}, "599"),
        (lambda d: {"observations": np.pad(d["observations"], ((0, 0), (0, 2)))}, "observations"),
        (lambda d: {"observations": d["observations"][:-1]}, "observations"),
        (lambda d: {"observations": at(d["observations"], 250, np.nan)}, "observations"),
        (lambda d: {"rewards": at(d["rewards"], 103, np.nan)}, "rewards"),
        (lambda d: {"actions": at(d["actions"], 7, 1.05)}, "actions"),
        (lambda d: {"costs": at(d["costs"], [105, 110], [1, -1])}, "costs"),
        (lambda d: {"costs": at(d["costs"], 7, np.nan)}, "costs"),
        (lambda d: {"costs": np.ones(600)}, "--max-episode-cost"),
        (lambda d: {"terminals": 255 * d["timeouts"]}, "not in [0, 1]"),
        (lambda d: {"costs": h5py.Empty("f4")}, "costs"),
        (lambda d: {"timeouts": d["terminals"]}, "0 of 0 episodes"),
        (lambda d: {key: value[:0] for key, value in d.items()}, "too few"),
        (lambda d: recorded([2] * 60), "16 steps"),
        (lambda d: recorded([400]), "2 episodes"),
    ],
)
def test_data_sets_that_can_not_be_learnt_from(change, words, tmp_path):
    arrays = recorded()
    path = write_hdf5(tmp_path / "data.hdf5", arrays | change(arrays))
    with pytest.raises(ProcoError) as failure:
        proco.load_data(path, get_task("DoubleIntegrator"))
    text = str(failure.value)
    assert words in text
    assert str(path) in text
    assert "\n" not in text


def test_a_few_violations_can_be_allowed(tmp_path):
    path = write_hdf5(tmp_path / "data.hdf5", recorded(unsafe=(0, 3)))
    task = get_task("DoubleIntegrator")
    assert proco.load_data(path, task)[1]["episodes"] == 4
    assert proco.load_data(path, task, 1)[1]["unsafe_share"] == pytest.approx(2 / 600)


def test_what_is_no_file_of_data(tmp_path, monkeypatch, capsys):
    argv = flags(quick(tmp_path / "out"))
    path = write_hdf5(tmp_path / "data.hdf5", recorded(), compression="gzip", chunks=True)
    with h5py.File(path) as file:
        offset = file["observations"].id.get_chunk_info(0).byte_offset
    content = path.read_bytes()
    damaged = tmp_path / "damaged.hdf5"
    damaged.write_bytes(content[: offset + 10] + bytes(40) + content[offset + 50 :])
    is_refused(capsys, [*argv, "--data", str(damaged)], "damaged")
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(content[:-500])
    is_refused(capsys, [*argv, "--data", str(cut)], "cut.hdf5", "cut off, damaged or no HDF5")
    is_refused(capsys, [*argv, "--data", str(tmp_path)], str(tmp_path), "Is a directory")
    is_refused(capsys, [*argv, "--data", "nix.hdf5"], "nix.hdf5", "No such file")
    with h5py.File(path, "a") as file:
        del file["observations"]
        file["observations/state"] = np.zeros((600, 2))
    is_refused(capsys, [*argv, "--data", str(path)], "observations", "no array of numbers")

    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # as root nothing is forbidden
    with pytest.raises(ProcoError, match="Permission denied"):
        proco.load_data(cut, get_task("DoubleIntegrator"))


def test_the_demonstrator_writes_dsrls_format_once():
    path = proco.demonstrate("DoubleIntegrator", 5)
    assert path.parent == proco.CACHE / "demonstrator"
    with h5py.File(path) as file:
        shapes = {key: file[key].shape for key in file}
        assert all(file[key].dtype == np.float32 for key in file)
        assert file["timeouts"][:].sum() == 5
    narrow = dict.fromkeys(("rewards", "costs", "terminals", "timeouts"), (500,))
    wide = dict.fromkeys(("observations", "next_observations"), (500, 2))
    assert shapes == narrow | wide | {"actions": (500, 1)}
    assert proco.load_data(path, get_task("DoubleIntegrator"))[1]["episodes"] == 5
    before = path.stat().st_mtime_ns
    assert proco.demonstrate("DoubleIntegrator", 5).stat().st_mtime_ns == before


def test_where_data_come_from(monkeypatch, capsys):
    urls = {"PointGoal1": f"{NOBODY}/a.hdf5", "PointPush1": f"{NOBODY}/b.hdf5"}
    monkeypatch.setattr(proco, "dsrl_infos", lambda: {"DATASET_URLS": urls})
    monkeypatch.setattr(proco, "demonstrate", lambda task, episodes: (task, episodes))
    source, made = proco.find_data(Config(task="PointGoal1"))
    assert (source, made) == ("demonstrator", ("PointGoal1", 50))
    assert "demonstrator makes the data" in capsys.readouterr().err  # loudly
    proco.find_data(Config(task="PointGoal1", data="demonstrator", eval_seed=49))
    assert "layouts that the data show" in capsys.readouterr().err
    assert proco.find_data(quick("out", data="~/x.hdf5"))[1] == Path("~/x.hdf5").expanduser()
    for cfg in (Config(task="PointPush1"), Config(task="PointGoal1", data="dsrl")):
        with pytest.raises(ProcoError, match="ConnectionError"):
            proco.find_data(cfg)
    monkeypatch.setattr(proco, "dsrl_infos", dict)
    with pytest.raises(ProcoError, match="dsrl is not installed"):
        proco.find_data(Config(task="PointGoal1", data="dsrl"))
    monkeypatch.setattr(proco, "dsrl_infos", lambda: {"DATASET_URLS": urls})
    with pytest.raises(ProcoError, match="DSRL has none of DoubleIntegrator"):
        proco.find_data(Config(task="DoubleIntegrator", data="dsrl"))


# ==== Downloads, from a server on this machine ====================================================


class Handler(BaseHTTPRequestHandler):
    """Serves server.body, at most server.cut bytes at a time."""

    def do_GET(self):  # the name that http.server looks for
        server = self.server
        server.requests += 1
        time.sleep(server.delay)
        start = 0
        if "Range" in self.headers and server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(server.status or (206 if start else 200))
        self.send_header("Content-Length", str(len(server.body) - start + server.lie))
        self.end_headers()
        piece = server.body[start : start + server.cut]
        server.sent += len(piece)
        self.wfile.write(piece)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The server, with a file that has the name of DSRL's for PointGoal1."""
    file = {"observations": np.random.default_rng(0).normal(size=(20_000, 8))}
    body = write_hdf5(tmp_path / "original.hdf5", file).read_bytes()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body = body
        server.cut = len(body)
        server.ranges = True
        server.lie = server.status = server.requests = server.sent = server.delay = 0
        server.url = f"http://127.0.0.1:{server.server_port}/data"
        server.file = "SafetyPointGoal1Gymnasium-v0-100-2022.hdf5"
        urls = {"DATASET_URLS": {"PointGoal1": f"{server.url}/{server.file}"}}
        monkeypatch.setattr(proco, "dsrl_infos", lambda: urls)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def no_download(server, folder, *words):
    """fetch_dsrl says one sentence with these words, and leaves nothing that looks like data."""
    with pytest.raises(ProcoError) as failure:
        proco.fetch_dsrl("PointGoal1", folder, server.url)
    for word in (*words, "--data", server.file):
        assert word in str(failure.value)
    assert "\n" not in str(failure.value)
    assert not list(folder.glob("*.hdf5"))


def test_a_file_arrives_whole_and_only_once(server, tmp_path):
    path = proco.fetch_dsrl("PointGoal1", tmp_path / "new" / "folder", server.url)
    assert path.read_bytes() == server.body
    names = {file.name for file in path.parent.iterdir()}
    assert names <= {server.file, f"{server.file}.lock"}
    assert proco.fetch_dsrl("PointGoal1", path.parent, server.url) == path
    assert server.requests == 1


def test_a_download_that_is_cut_goes_on(server, tmp_path):
    server.cut = len(server.body) // 3 + 1
    path = proco.fetch_dsrl("PointGoal1", tmp_path, server.url)
    assert path.read_bytes() == server.body
    assert server.sent < 1.2 * len(server.body)  # a piece of 64 KiB is lost with each cut


def test_a_later_run_goes_on_with_a_download(server, tmp_path):
    server.cut = len(server.body) // 10
    no_download(server, tmp_path / "cache")
    server.cut = len(server.body)
    path = proco.fetch_dsrl("PointGoal1", tmp_path / "cache", server.url)
    assert path.read_bytes() == server.body
    assert server.sent < 1.5 * len(server.body)


def test_of_two_downloads_at_once_one_waits(server, tmp_path, capsys):
    server.delay = 0.3  # s
    with ThreadPoolExecutor(2) as pool:
        fetch = functools.partial(proco.fetch_dsrl, cache_dir=tmp_path, base_url=server.url)
        first, second = pool.map(fetch, ["PointGoal1"] * 2)
    assert first == second
    assert first.read_bytes() == server.body
    assert server.requests == 1
    assert "waiting for another process" in capsys.readouterr().out
    first.unlink()
    (tmp_path / f"{server.file}.part").mkdir()
    with pytest.raises(IsADirectoryError):  # the command line says it in one sentence
        fetch("PointGoal1")


def test_a_server_without_ranges_is_given_up_if_it_always_cuts(server, tmp_path):
    server.ranges = False
    server.cut = len(server.body) // 2
    no_download(server, tmp_path / "cache")
    assert server.requests == 5
    server.cut = len(server.body)
    path = proco.fetch_dsrl("PointGoal1", tmp_path / "cache", server.url)
    assert path.read_bytes() == server.body


def test_what_is_no_recording_is_refused(server, tmp_path):
    whole = server.body
    for server.body in (b"<!DOCTYPE html>Please log in" * 1000, b"", whole[:-5000]):
        no_download(server, tmp_path / "cache", "no HDF5")
    server.body = whole
    server.lie = 1000  # bytes that never come
    no_download(server, tmp_path / "short", "ConnectionError")
    server.status = 404
    no_download(server, tmp_path / "new", ": 404")


def test_a_file_that_is_there_is_never_replaced(server, tmp_path):
    """Half of one, and a folder that has its name: who reads it says what is wrong."""
    half = tmp_path / "half" / server.file
    half.parent.mkdir()
    half.write_bytes(server.body[:-5000])
    folder = tmp_path / "folder" / server.file
    folder.mkdir(parents=True)
    before = snapshot(tmp_path)
    for path, why in ((half, "it is cut off, damaged or no HDF5; delete it"), (folder, "Is a dir")):
        assert proco.fetch_dsrl("PointGoal1", path.parent, server.url) == path
        with pytest.raises(ProcoError, match=why):
            proco.load_data(path, get_task("PointGoal1"))
    assert snapshot(tmp_path) == before
    assert server.requests == 0


def test_dsrls_own_host_is_asked_where_the_mirror_fails(server, tmp_path):
    path = proco.fetch_dsrl("PointGoal1", tmp_path)  # the mirror is nobody
    assert path.read_bytes() == server.body


def test_downloads_that_can_not_begin(server, tmp_path):
    server.url = NOBODY
    no_download(server, tmp_path / "cache", "ConnectionError")
    with pytest.raises(ProcoError, match="none of DoubleIntegrator"):
        proco.fetch_dsrl("DoubleIntegrator", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ProcoError, match="DSRL_DATASET_DIR"):
        proco.fetch_dsrl("PointGoal1", tmp_path / "file" / "cache", server.url)


# ==== A run, and what it leaves ===================================================================


@pytest.fixture(scope="session")
def trained(tmp_path_factory, home):
    """The Config of a finished run with PROCO."""
    cfg = quick(tmp_path_factory.mktemp("trained"), "proco", margin=0.0)
    proco.run(cfg)
    return cfg


def unexpected(*_, **__):
    raise AssertionError("this must not be called")


def not_json(constant):
    raise AssertionError(f"{constant} is no JSON")


def read_results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"), parse_constant=not_json)


def test_a_run_leaves_what_it_promises(trained):
    folder = trained.folder
    files = {path.name for path in folder.iterdir()}
    tables = {"episodes.csv", "metrics.csv"}
    assert files == tables | {"results.json", "checkpoint.pt", "report.png"}
    results = read_results(folder)
    keys = {"task", "method", "seed", "settings", "identity", "data", "dynamics", "margin"}
    assert keys | {"timing", "versions", "eval", "acting", "warnings"} <= set(results)
    assert results["settings"] == dataclasses.asdict(trained)
    assert results["device"] in ("cpu", "cuda")
    assert set(results["identity"]["data"]) == {"source", "rows", "hash"}
    assert list(results["acting"]) == ["clone", "filter", "actor"]
    with open(folder / "episodes.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["acting", "seed", "return", "cost", "length"]
    for way, found in results["acting"].items():
        mine = [row for row in rows if row["acting"] == way]
        assert [int(row["seed"]) for row in mine] == [40_000, 40_001, 40_002]
        assert np.mean([float(row["cost"]) for row in mine]) == found["cost_mean"]
        free = np.mean([float(row["cost"]) == 0 for row in mine])
        assert free == found["zero_cost_share"]
        assert found["episodes"] == 3
    score = results["acting"]["actor"]
    assert results["eval"] == score | {"acting": "actor"}


def test_results_are_json_even_where_nothing_ever_changes(tmp_path):
    arrays = recorded([60, 60])
    for key in ("observations", "next_observations", "actions", "rewards"):
        arrays[key][:] = 0
    path = write_hdf5(tmp_path / "still.hdf5", arrays)
    cfg = quick(tmp_path, "proco", data=str(path))
    proco.run(cfg)
    assert read_results(cfg.folder)["dynamics"]["sensors"]["r2"] is None


def test_a_finished_run_can_be_loaded_and_driven(trained, capsys):
    agent = proco.load_run(trained.folder)
    v_f = agent.feasibility([[-3.0, 0.0], [0.9, 2.0]])
    assert v_f.shape == (2,)
    assert ((v_f >= 0) & (v_f <= 1)).all()
    assert agent.eps == trained.eps
    env = proco.make_env(trained.task)
    policy = agent.start([0])
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        action = policy.act(obs[None])
        assert action.shape == (1, 1)
        obs, *_ = env.step(action[0])
    with pytest.raises(ProcoError, match="clone, filter, actor"):
        agent.start([0], "plan")
    again = ["--eval-episodes", "2", "--eval-seed", "7", "--acting", "actor"]
    before = snapshot(Path(trained.out))
    assert proco.main(["--evaluate", str(trained.folder), *again]) == 0
    assert "of 2 episodes" in capsys.readouterr().out
    assert snapshot(Path(trained.out)) == before


def test_evaluating_refuses_what_it_would_ignore(trained, capsys):
    argv = ["--evaluate", str(trained.folder), "--hidden", "8"]
    is_refused(capsys, argv, "--hidden")
    is_refused(capsys, ["--evaluate", "nix"], "nix", "No such file")


def test_a_predicate_may_move_but_not_change(tmp_path, capsys):
    first = tmp_path / "first.py"
    text = (proco.HERE / "llm_costs" / "DoubleIntegrator.py").read_text("utf-8")
    first.write_text(text, "utf-8")
    cfg = quick(tmp_path, cost=str(first))
    proco.run(cfg)
    moved = first.rename(tmp_path / "moved.py")
    argv = ["--evaluate", str(cfg.folder), "--eval-episodes", "1"]
    is_refused(capsys, argv, "first.py", "--cost FILE")
    assert proco.main([*argv, "--cost", str(moved)]) == 0
    moved.write_text(text + "\n", "utf-8")
    is_refused(capsys, [*argv, "--cost", str(moved)], "another predicate")


RECORDED = [name for name in proco.TASKS if "Push" in name or "Velocity" in name]


@pytest.mark.parametrize("name", RECORDED)
def test_every_task_that_needs_recordings_goes_from_a_file_to_scores(name, tmp_path, monkeypatch):
    """Four short episodes of random driving, and one short episode in each way of acting."""
    task = get_task(name)
    make = functools.partial(proco.import_simulator().make, task.make, max_episode_steps=40)
    monkeypatch.setattr(task, "make", make)
    columns = {key: [] for key in proco.KEYS}
    for seed in range(4):
        env = proco.make_env(name)
        rng = np.random.default_rng(seed)
        obs, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = rng.uniform(-0.3, 0.3, task.act_dim)
            following, reward, cost, *ends, _ = env.step(action)
            for key, value in zip(proco.KEYS, (obs, following, action, reward, cost, *ends)):
                columns[key].append(value)
            obs = following
            over = any(ends)
    file = write_hdf5(tmp_path / "data.hdf5", {key: np.array(x) for key, x in columns.items()})
    changes = {"task": name, "data": str(file), "max_episode_cost": 99.0, "eval_episodes": 1}
    results = proco.run(quick(tmp_path, "proco", scale=0.002, **changes))
    ways = ["clone", "actor", "filter", "plan"] if task.lidars else ["clone", "filter", "actor"]
    assert list(results["acting"]) == ways
    assert results["data"]["episodes"] == 4
    for row in results["acting"].values():
        assert math.isfinite(row["return_mean"])
        assert row["cost_mean"] <= 40


def test_same_seed_same_run_and_caller_left_alone(trained, tmp_path):
    import matplotlib

    backend = matplotlib.get_backend()
    threads = torch.get_num_threads()
    matplotlib.use("svg")
    drawn = torch.get_rng_state()
    again = dataclasses.replace(trained, out=str(tmp_path))
    proco.run(again)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert matplotlib.get_backend() == "svg"
    assert torch.get_num_threads() == threads
    matplotlib.use(backend)
    same_run(trained.folder, again.folder)


def test_the_picture_of_a_task_with_lidars_shows_how_it_was_driven(tmp_path):
    agent = Agent(TASKS["PointGoal1"], small())
    episode = {"seed": 3, "path": (0j, 0.1j, 0.2j, 0.3j) * 50}
    driven = {"clone": [episode | {"unsafe": (False, False, True, True) * 50}]}
    driven["plan"] = [episode | {"unsafe": (False,) * 200}]
    proco.draw_report(tmp_path / "report.png", agent, driven)
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_a_picture_that_fails_is_a_warning(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("no canvas")

    monkeypatch.setattr(proco, "draw_report", broken)
    results = proco.run(quick(tmp_path))
    assert results["eval"]["episodes"] == 3
    assert any("no canvas" in text for text in proco.WARNINGS)


# ==== Whose results they are ======================================================================


def test_a_finished_run_is_not_replaced_without_a_word(tmp_path, capsys):
    proco.run(quick(tmp_path))
    assert "replaces" not in capsys.readouterr().err
    proco.run(quick(tmp_path, hidden=8))
    assert "this run replaces" in capsys.readouterr().err


def test_a_run_may_be_driven_in_each_way_whatever_it_was_told(tmp_path, capsys):
    cfg = quick(tmp_path, "proco", acting="clone")
    assert proco.run(cfg)["eval"]["acting"] == "clone"
    capsys.readouterr()
    for path in (cfg.folder, *(cfg.folder / name for name in ("checkpoint.pt", "results.json"))):
        assert proco.main(["--evaluate", str(path)]) == 0
        said = capsys.readouterr().out
        assert all(way in said for way in ("cloned policy", "actor", "actor + filter"))
    assert proco.main(["--evaluate", str(cfg.folder), "--resume"]) == 2


def test_a_predicate_that_does_not_fit_the_recorded_costs_is_warned_of(tmp_path, capsys):
    path = tmp_path / "cost.py"
    path.write_text(
        "def cost(obs, action, next_obs, margin=0.0):\n    return 0 * obs[..., 0] + 1\n"
    )
    proco.run(quick(tmp_path, "proco", cost=path))
    assert "calls 100% of the steps unsafe" in capsys.readouterr().err
    path.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(proco.CostError, match="SystemExit"):
        proco.load_cost("DoubleIntegrator", path)


def test_a_task_of_ones_own_with_a_slip_is_refused():
    for slip in ({"settings": {"updatez": 3}}, {"sensors": (0, 5)}, {"repeat": 0}):
        with pytest.raises(ProcoError, match="the task DoubleIntegrator has"):
            dataclasses.replace(DI, **slip)


def test_too_little_memory_is_said_in_one_sentence(capsys):
    def work():
        torch.empty(10**15)

    assert proco.serve("proco", work) == 2
    assert "too little memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="size"):  # what is a bug stays one
        proco.serve("proco", lambda: torch.zeros(2) @ torch.zeros(3))


def test_results_of_other_settings_are_never_taken(trained, capsys):
    before = snapshot(Path(trained.out))
    other = flags(dataclasses.replace(trained, margin=0.3))
    is_refused(capsys, [*other, "--resume"], str(trained.folder), "margin 0.0, now 0.3")
    rest = [flag for flag in other if not flag.startswith(("--method", "--seed", "--task"))]
    argv = ["--compare", "proco", "--tasks", trained.task, *rest]
    is_refused(capsys, argv, "margin 0.0, now 0.3", program=main, name="test_proco")
    assert snapshot(Path(trained.out)) == before
    assert proco.run(trained, resume=True)["margin"] == 0.0
    assert snapshot(Path(trained.out)) == before


def test_results_of_other_data_or_predicates_are_never_taken(tmp_path, capsys):
    path = write_hdf5(tmp_path / "data.hdf5", recorded())
    cost = tmp_path / "cost.py"
    text = (proco.HERE / "llm_costs" / "DoubleIntegrator.py").read_text("utf-8")
    cost.write_text("\ufeff" + text, "utf-8")  # with the mark that some editors put there
    cfg = quick(tmp_path / "out", "td3bc", data=str(path), cost=str(cost))
    proco.run(cfg)
    before = snapshot(tmp_path / "out")
    again = [*flags(cfg), "--resume"]
    rest = [flag for flag in again[:-1] if not flag.startswith(("--method", "--seed", "--task"))]
    compared = ["--compare", "td3bc", "--tasks", cfg.task, *rest]
    write_hdf5(path, recorded([100] * 5))
    is_refused(capsys, again, "data", "'rows': 600", "'rows': 500")
    is_refused(capsys, compared, "'rows': 600", "'rows': 500", program=main, name="test_proco")
    write_hdf5(path, recorded())
    cost.write_text(text + "# as before, but who knows\n", "utf-8")
    is_refused(capsys, again, "predicate")
    is_refused(capsys, compared, "predicate", program=main, name="test_proco")
    with pytest.raises(ProcoError, match="predicate"):
        proco.load_run(cfg.folder)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["", "{", '{"task": "of an older version"}', "[]"])
def test_results_that_can_not_be_read(tmp_path, capsys, text):
    cfg = quick(tmp_path)
    folder = cfg.folder
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text)
    is_refused(capsys, [*flags(cfg), "--resume"], "results.json")
    for name in ("training.pt", "checkpoint.pt"):
        (folder / "results.json").unlink(missing_ok=True)
        (folder / name).write_text(text)
        is_refused(capsys, [*flags(cfg), "--resume"], name)
        (folder / name).unlink()


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["evaluate", "update"])
def test_a_stopped_run_changes_nothing_finished_and_goes_on(tmp_path, stage):
    first = quick(tmp_path)
    second = quick(tmp_path, hidden=8)
    proco.run(first)
    folder = first.folder
    before = snapshot(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proco, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            proco.run(second)
    after = snapshot(tmp_path)
    assert after.pop(folder / "training.pt")
    assert after == before
    assert proco.run(first, resume=True)["settings"]["hidden"] == 16
    assert proco.run(second, resume=True)["settings"]["hidden"] == 8  # as the program has said
    assert not (folder / "training.pt").exists()
    (folder / "training.pt").touch()
    proco.run(second)
    assert "this run replaces" in json.loads((folder / "results.json").read_text())["warnings"][0]


def test_what_is_driven_again_is_not_trained_again(tmp_path, monkeypatch):
    """Nor is it mistaken for another run that was stopped in the same folder."""
    cfg = quick(tmp_path)
    proco.run(cfg)
    learnt = weights(cfg.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proco, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            proco.run(quick(tmp_path, hidden=8))
    monkeypatch.setattr(proco, "update", unexpected)
    more = dataclasses.replace(cfg, eval_episodes=5)
    results = proco.run(more, resume=True)
    assert results["eval"]["episodes"] == 5
    assert "this run replaces" in results["warnings"][-1]  # what was stopped is not lost unsaid
    again = weights(cfg.folder)
    assert all(torch.equal(learnt[name], again[name]) for name in learnt)
    monkeypatch.setattr(proco, "evaluate", unexpected)
    elsewhere = dataclasses.replace(more, out=f"{tmp_path}/../{tmp_path.name}", device="cpu")
    assert proco.run(elsewhere, resume=True)["eval"]["episodes"] == 5  # the same folder


def test_a_folder_is_for_one_process_at_a_time(tmp_path, capsys):
    cfg = quick(tmp_path)
    cfg.folder.mkdir(parents=True)
    with proco.FileLock(f"{cfg.folder}.lock"):
        is_refused(capsys, flags(cfg), "another process works in", "--out")
    assert proco.main(flags(cfg)) == 0


def test_a_run_ends_with_the_predicate_it_began_with(tmp_path, monkeypatch):
    file = tmp_path / "cost.py"
    file.write_bytes((proco.HERE / "llm_costs" / "DoubleIntegrator.py").read_bytes())
    before = proco.load_cost("DoubleIntegrator", file)
    train = proco.train

    def train_while_somebody_edits(*arguments):
        file.write_text("this is no Python")
        train(*arguments)

    monkeypatch.setattr(proco, "train", train_while_somebody_edits)
    results = proco.run(quick(tmp_path, "td3bc", cost=str(file)))
    assert results["identity"]["predicate"] == before.digest


def test_what_was_warned_of_is_still_known_after_a_stop(tmp_path, monkeypatch):
    cfg = quick(tmp_path)
    train = proco.train
    with monkeypatch.context() as patch:
        patch.setattr(proco, "train", lambda *rest: proco.warn("odd") or train(*rest))
        patch.setattr(proco, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            proco.run(cfg)
    now = proco.versions()
    monkeypatch.setattr(proco, "versions", lambda: now | {"torch": "9", "gymnasium": "8"})
    results = proco.run(cfg, resume=True)
    assert results["warnings"][0] == "odd"
    assert "begun with" in results["warnings"][1]
    assert results["versions"] == now | {"gymnasium": "8"}  # trained there, driven here


class Gymnast(proco.DoubleIntegrator):
    """An environment that answers as gymnasium's do, without a cost."""

    def step(self, action):
        obs, reward, _, *rest = super().step(action)
        return obs, reward, *rest


class Wide(proco.DoubleIntegrator):
    """One that answers with an observation of another size."""

    def step(self, action):
        _, *rest = super().step(action)
        return np.zeros(3, np.float32), *rest


@pytest.mark.parametrize("make", [Gymnast, Wide])
def test_an_environment_is_tried_before_training(make, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_task("DoubleIntegrator"), "make", make)
    is_refused(capsys, flags(quick(tmp_path)), "6 values, the first an observation (2,)")


def test_only_the_simulators_own_tasks_are_demonstrated(monkeypatch):
    task = proco.Task("CartGoal", proco.DoubleIntegrator, 2, 1, 100, 0.1, (0, 1))
    monkeypatch.setitem(proco.TASKS, "CartGoal", dataclasses.replace(task, make=Gymnast))
    with pytest.raises(ProcoError, match="no recordings"):
        proco.find_data(Config(task="CartGoal"))


# ==== Stopping, full disks, closed pipes ==========================================================

STOPPABLE = {
    "clone_updates": 5,
    "feasibility_updates": 600,
    "updates": 600,
    "batch": 16,
    "scale": 1,
    "model_epochs": 2,
    "eval_episodes": 8,
    "rollouts": 120,
}


def stop(argv, marker, sign):
    """Starts proco.py and sends it a signal when marker appears on stderr -> exit code, and what it
    said then. Returns when no process holds stderr any more: neither it nor a child of it."""
    command = [sys.executable, "proco.py", *argv]
    more = {"cwd": proco.HERE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    # tests that run in the background of a script inherit that Ctrl-C is ignored
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, start_new_session=True, **more)
    signal.signal(signal.SIGINT, heeded)
    said = b""
    while marker not in said:
        piece = os.read(process.stderr.fileno(), 65_536)
        assert piece, said
        said += piece
    if sign == signal.SIGINT:
        os.killpg(process.pid, sign)  # Ctrl-C goes to all processes of a terminal
    else:
        os.kill(process.pid, sign)
    said += process.communicate(timeout=20)[1]
    assert b"Traceback" not in said
    return process.returncode, said.decode().splitlines()[-1]


def test_a_run_that_is_stopped_again_and_again_equals_one_that_never_was(tmp_path):
    cfg = quick(tmp_path / "stopped", "proco", **STOPPABLE)
    argv = flags(cfg)
    code, words = stop(argv, b"2 dynamics", signal.SIGINT)
    assert (code, "--resume goes on" in words) == (130, True)
    assert not list(cfg.folder.iterdir())
    code, words = stop(argv, b"1001/1205", signal.SIGTERM)
    assert (code, "--resume goes on" in words) == (130, True)
    code, _ = stop([*argv, "--resume"], b"9 evaluation", signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, words = stop([*argv, "--resume"], b"9 evaluation", signal.SIGINT)
    assert (code, "--resume goes on" in words) == (130, True)
    assert proco.main([*argv, "--resume"]) == 0
    never = dataclasses.replace(cfg, out=str(tmp_path / "never"))
    proco.run(never)
    same_run(cfg.folder, never.folder)


def test_stopped_while_it_draws_a_run_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(proco, "draw_report", interrupt)
    cfg = quick(tmp_path)
    assert proco.main(flags(cfg)) == 0
    assert read_results(cfg.folder)["eval"]["episodes"] == 3


def test_nobody_reads_what_it_prints(tmp_path):
    command = [sys.executable, "proco.py", *flags(quick(tmp_path))]
    more = {"cwd": proco.HERE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **more)
    process.stdout.close()  # as head does
    said = process.stderr.read().decode()
    assert process.wait() == 130
    assert "Traceback" not in said
    assert "proco: stopped" in said.splitlines()[-1]


def test_a_reader_that_leaves_after_all_is_done(tmp_path):
    cfg = quick(tmp_path)
    proco.run(cfg)
    before = snapshot(tmp_path)
    code = f"""
import os, sys
import proco
finish = proco.finish
def finish_without_a_reader(*arguments):
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    return finish(*arguments)
proco.finish = finish_without_a_reader
sys.exit(proco.main({flags(cfg)!r}))
"""
    done = python(code)
    assert done.returncode == 130
    assert "--resume goes on" in done.stderr.splitlines()[-1]
    assert snapshot(tmp_path).keys() == before.keys()


def test_no_errors_to_write_to_and_a_full_disk_for_words(tmp_path):
    argv = flags(quick(tmp_path))
    code = f"import proco, sys; sys.exit(proco.main({argv!r}))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = f'exec "{sys.executable}" -c "$CODE" 2>&-'
    environment |= {"CODE": code}
    drive = functools.partial(subprocess.run, shell=True, env=environment, cwd=proco.HERE)
    assert drive(command, check=False).returncode == 0
    if Path("/dev/full").exists():
        command = f'exec "{sys.executable}" -u -c "$CODE" > /dev/full'
        done = drive(command, check=False, capture_output=True, text=True)
        assert done.returncode == 2
        assert "No space left" in done.stderr.splitlines()[-1]


@contextlib.contextmanager
def small_files(size):
    """No file may grow beyond size bytes: writing more fails as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    cfg = quick(tmp_path, **STOPPABLE)
    update = proco.update
    with contextlib.ExitStack() as full:

        def update_on_a_full_disk(*arguments):
            full.pop_all().close()
            full.enter_context(small_files(100))
            return update(*arguments)

        monkeypatch.setattr(proco, "update", update_on_a_full_disk)
        is_refused(capsys, flags(cfg), "training.pt", "File too large")
    assert [path.name for path in cfg.folder.iterdir()] == ["training.pt"]
    assert proco.load_kept(cfg.folder / "training.pt")["step"] == 1
    monkeypatch.undo()
    assert proco.run(cfg, resume=True)["eval"]["episodes"] == 8


def test_a_full_disk_for_the_demonstrator(tmp_path):
    argv = flags(quick(tmp_path, driver_episodes=20))
    code = f"""
import resource, sys
import proco
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
sys.exit(proco.main({argv!r}))
"""
    done = python(code, PROCO_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# ==== The command line, and proco.py as a library =================================================


@pytest.mark.parametrize(
    "words, why",
    [
        ("--seed 18446744073709551616", "--seed"),
        ("--seed -1", "--seed"),
        ("--eps 2", "--eps"),
        ("--scale nan", "--scale"),
        ("--scale 0", "--scale"),
        ("--gamma-f 1", "--gamma-f"),
        ("--margin -0.5", "--margin"),
        ("--evaluate=", "--evaluate"),
        ("--batch 0", "--batch"),
        ("--eval-episodes 0", "--eval-episodes"),
        ("--eval-seed 4294967296", "--eval-seed"),
        ("--max-episode-cost -1", "--max-episode-cost"),
        ("--driver-episodes 1", "--driver-episodes"),
        ("--task DubleIntegrator", "DoubleIntegrator"),
        ("--task CarHover9", "there is no task 'CarHover9'"),
        ("--method porco", "there is no method 'porco'"),
        ("--acting plan", "acts by actor"),
        ("--device tpu", "'tpu'"),
        ("--cost nix.py", "--cost"),
        ("--out /dev/null/x", "--out"),
        ("--task PointGoal1 --data driver --out /dev/null/x", "--out"),
    ],
)
def test_bad_words_are_refused_before_anything_is_done(words, why, tmp_path, monkeypatch, capsys):
    for name in ("collect_episode", "train_dynamics", "train"):
        monkeypatch.setattr(proco, name, unexpected)
    is_refused(capsys, [*flags(quick(tmp_path)), *words.split()], why)


@pytest.mark.parametrize("words", ["--seed 1.5", "--batch x", "--nonsense", "--task"])
def test_words_that_argparse_refuses(words, capsys):
    with pytest.raises(SystemExit) as left:
        proco.main(words.split())
    assert left.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_cache_that_can_not_be_written_is_said_before_driving(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(proco, "CACHE", tmp_path / "file" / "cache")
    monkeypatch.setattr(proco, "in_parallel", unexpected)
    is_refused(capsys, flags(quick(tmp_path, driver_episodes=6)), "PROCO_CACHE", "Not a directory")


def test_a_loss_that_is_no_number_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    def broken(agent, rows):
        return agent.propose(rows["x"]).sum() * math.nan, None

    monkeypatch.setattr(proco, "actor_loss", broken)
    is_refused(capsys, flags(quick(tmp_path, "td3bc")), "no longer finite")


def test_help_lists_every_setting_by_step(capsys):
    with pytest.raises(SystemExit) as left:
        proco.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    position = text.index("\nrun:")
    for field in dataclasses.fields(Config):
        group = text.index(f"\n{field.metadata['group']}:")
        flag = text.index(f"--{field.name.replace('_', '-')} ", group)
        assert position <= group < flag
        position = group  # groups come in the order of the steps
    assert "--resume" in text
    assert "--evaluate" in text


def test_flags_become_settings():
    argv = ["--task", "PointGoal1", "--eps=0.3", "--horizon", "0", "--resume"]
    given = vars(proco.parser().parse_args(argv))
    assert given.pop("resume")
    assert given == {"task": "PointGoal1", "eps": 0.3, "horizon": 0}
    assert Config(**given).eps == 0.3
    assert Config(task="HopperVelocity").gamma_f == 0.9  # the task's own


def test_importing_does_nothing(tmp_path):
    code = """
import socket, sys
socket.socket.connect = socket.getaddrinfo = None
before = set(sys.modules)
import proco
for name in ("safety_gymnasium", "mujoco", "gymnasium", "dsrl", "matplotlib", "test_proco"):
    assert name not in sys.modules, name
assert not any(name.startswith("llm_costs") for name in sys.modules)
"""
    more = {"HOME": str(tmp_path), "PROCO_CACHE": str(tmp_path / "cache")}
    done = python(code, **more, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_script_without_a_guard_and_a_notebooks_backend(tmp_path):
    code = f"""
import proco
results = proco.run(proco.Config(**{QUICK | {"method": "bc", "out": str(tmp_path)}}))
print("cost", results["eval"]["cost_mean"])
"""
    done = python(code, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    results = read_results(quick(tmp_path).folder)
    assert done.stdout.splitlines()[-1] == f"cost {results['eval']['cost_mean']}"


# ==== A fork: an algorithm of one's own (the README's has a task, a cost and data) ================


def test_an_algorithm_of_ones_own(tmp_path, monkeypatch):
    def pushed_back(agent, rows):  # from D and D_cf: the actor learns to brake, and nothing else
        return (agent.propose(rows["x"]) + 1).square().mean(), None

    monkeypatch.setattr(proco, "actor_loss", pushed_back)
    cfg = quick(tmp_path, "proco", updates=30_000)
    proco.run(cfg)
    agent = proco.load_run(cfg.folder)
    action = agent.propose(agent.features(torch.zeros(1, 2)))
    clone = agent.imitate(agent.features(torch.zeros(1, 2)))
    assert action < clone - 0.1


# ==== --compare and --bench =======================================================================


def compare_argv(out, methods="bc,td3bc", *more):
    rest = [flag for flag in flags(quick(out)) if not flag.startswith(("--method", "--seed"))]
    return ["--compare", methods, "--seeds", "2", *rest, *more]


def test_a_comparison_trains_what_is_missing_and_reads_the_rest(tmp_path, monkeypatch, capsys):
    assert main(compare_argv(tmp_path)) == 0
    said = capsys.readouterr().out
    text = (tmp_path / "compare.md").read_text("utf-8")
    assert text in said
    assert "| DoubleIntegrator | td3bc | actor |" in text  # the ways of acting
    assert (tmp_path / "compare.png").stat().st_size > 5000
    table = (tmp_path / "compare.csv").read_text("utf-8")
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["method"] for row in rows] == ["bc", "td3bc"]
    assert [row["acting"] for row in rows] == ["actor", "actor"]
    costs = []
    for seed in (0, 1):
        folder = quick(tmp_path, seed=seed).folder
        costs.append(read_results(folder)["eval"]["cost_mean"])
    assert float(rows[0]["cost"]) == pytest.approx(np.mean(costs))
    assert float(rows[0]["cost_low"]) <= float(rows[0]["cost"]) <= float(rows[0]["cost_high"])
    assert rows[0]["normalized_return"] == ""  # DSRL has none for this task
    assert rows[0]["cost_difference"] == ""

    folder = quick(tmp_path, "td3bc", seed=1).folder
    (folder / "results.json").unlink()  # as if it had been stopped just before
    (folder / "checkpoint.pt").unlink()
    before = snapshot(tmp_path / "DoubleIntegrator" / "bc")
    begun = []
    begin = proco.begin_training
    monkeypatch.setattr(
        proco, "begin_training", lambda cfg, *rest: begun.append(cfg) or begin(cfg, *rest)
    )
    assert main(compare_argv(tmp_path)) == 0
    assert [(cfg.method, cfg.seed) for cfg in begun] == [("td3bc", 1)]
    assert snapshot(tmp_path / "DoubleIntegrator" / "bc") == before
    assert (tmp_path / "compare.csv").read_text("utf-8") == table


@pytest.mark.parametrize(
    "words, why",
    [
        (["--tasks", "PointGoal1"], "--compare METHODS"),
        (["--seeds", "3"], "--compare METHODS"),
        (["--bench", "--compare", "bc"], "do not go together"),
        (["--compare", "bc", "--tasks", "PointGoal1", "--task", "CarGoal1"], "not both"),
        (["--compare", "bc", "--tasks", "DoubleIntegrator,PointGaol1"], "PointGoal1"),
    ],
)
def test_words_that_would_be_ignored_are_refused(words, why, capsys):
    assert main(words) == 2
    assert why in capsys.readouterr().err


def test_a_comparison_reads_only_files_that_belong_together(tmp_path, capsys):
    argv = compare_argv(tmp_path, "bc", "--seeds", "1")
    assert main(argv) == 0
    file = quick(tmp_path).folder / "episodes.csv"
    text = file.read_text("utf-8")
    file.write_text(text.replace("\nactor,4", "\nactor,9"), "utf-8")
    assert main(argv) == 0  # seeds are names alone
    lines = text.splitlines()
    file.write_text("\n".join(lines[:-1]), "utf-8")
    is_refused(capsys, argv, "is not of the run", program=main, name="test_proco")
    file.unlink()
    is_refused(capsys, argv, "episodes.csv: [Errno 2]", program=main, name="test_proco")


def test_a_comparison_notices_data_that_change_meanwhile(tmp_path, capsys, monkeypatch):
    expected = {"data": {"rows": 7}}
    with pytest.raises(ProcoError, match="data has changed since"):
        finished_run(quick(tmp_path), expected)
    results = [proco.run(quick(tmp_path, seed=seed)) for seed in (0, 1)]
    results[1]["eval"]["acting"] = "filter"
    say_what_differs(results)
    assert "acting of bc actor, filter" in capsys.readouterr().err


@pytest.mark.parametrize(
    "methods, more, words",
    [
        ("bc,porco", [], "'porco'"),
        ("bc", ["--method", "proco"], "--method"),
        ("bc", ["--seed", "3"], "--seed"),
        ("bc", ["--seeds", "0"], "--seeds"),
        ("bc", ["--evaluate", "x"], "--evaluate"),
        ("bc", ["--data", "nix.hdf5"], "nix.hdf5"),
        ("bc", ["--out", "/dev/null/x"], "--out"),
        ("proco,bc", ["--acting", "filter"], "bc on DoubleIntegrator"),
    ],
)
def test_a_comparison_tries_all_before_it_trains(
    tmp_path, monkeypatch, capsys, methods, more, words
):
    monkeypatch.setattr(proco, "run", unexpected)
    argv = compare_argv(tmp_path, methods, *more)
    is_refused(capsys, argv, words, program=main, name="test_proco")


def test_a_comparison_that_is_stopped_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proco, "run", interrupt)
    assert main(compare_argv(tmp_path)) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_the_crossed_bootstrap():
    rng = np.random.default_rng(1)
    # Nothing varies, or only seeds (0 and 2): the mean of two draws is 0, 1 or 2, by 1/4, 1/2, 1/4.
    values = {"still": np.full((2, 50, 1), 7.0)}
    values["seeds"] = np.repeat([[[0.0]], [[2.0]]], 50, 1)
    means = crossed_bootstrap(values, rng)
    assert means["still"] == pytest.approx(7)
    found, counts = np.unique(means["seeds"][1:].round(6), return_counts=True)
    assert found.tolist() == [0, 1, 2]
    assert counts / RESAMPLES == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    # Only layouts vary: more seeds on the same layouts tell nothing new.
    layouts = np.repeat(rng.normal(size=(1, 100, 1)), 5, 0)
    means = crossed_bootstrap({"one": layouts[:1], "two": layouts[:1] + 3}, rng)
    many = crossed_bootstrap({"one": layouts}, rng)["one"][1:].std()
    assert means["one"][1:].std() == pytest.approx(layouts.std() / 10, rel=0.1)
    assert many == pytest.approx(layouts.std() / 10, rel=0.1)
    # Both methods see the same resamples: what sets them apart is certain.
    assert means["two"] - means["one"] == pytest.approx(3)


def test_a_comparison_of_tasks_ends_in_their_mean(tmp_path, monkeypatch):
    worth = {"DoubleIntegrator": 1.0, "PointGoal1": 3.0}

    def episodes(cfg, _):
        score = {"return_mean": 5.0, "cost_mean": 0.0, "zero_cost_share": 1.0}
        better = cfg.method == "td3bc"
        results = {"versions": {}, "device": "cpu", "method": cfg.method}
        results |= {"acting": {"actor": score}, "eval": {"acting": "actor"}}
        return np.full((4, 4), worth[cfg.task] + cfg.seed + better), results

    here = sys.modules[__name__]
    monkeypatch.setattr(here, "check_runs", lambda runs: {cfg.folder: {} for cfg in runs})
    monkeypatch.setattr(here, "finished_run", episodes)
    rows = compare(["bc", "td3bc"], list(worth), 2, {"out": str(tmp_path)})
    assert [row["task"] for row in rows[::2]] == [*worth, "all"]
    assert [row["return"] for row in rows] == [1.5, 2.5, 3.5, 4.5, 2.5, 3.5]
    assert (rows[0]["return_low"], rows[0]["return_high"]) == (1, 2)  # two seeds, drawn twice
    assert (rows[5]["cost_difference_low"], rows[5]["cost_difference_high"]) == (1, 1)
    text = (tmp_path / "compare.md").read_text("utf-8")
    assert "| DoubleIntegrator | bc | actor | 1.50 [1.00, 2.00] |" in text
    assert "| PointGoal1 | td3bc | actor | 5.00 | 0.00 | 1.00 |" in text


def test_the_benchmark_compares_equal_updates():
    ours, agent, twin, table = td3bc_pair(1000)
    sources = [(agent.actor, 0, twin.actor)]
    for n in range(2):
        sources += [(agent.q_r, n, twin.twins[n]), (agent.q_r_slow, n, twin.slow[n])]
    with torch.no_grad():
        for net, n, module in sources:
            for layer, weight, bias in zip(module[::2], net.weights, net.biases):
                layer.weight.copy_(weight[n])
                layer.bias.copy_(bias[n][:, 0])
    for work in (ours, twin.update):
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            work(table, generator)
    for net, n, module in sources:
        for layer, weight in zip(module[::2], net.weights):
            assert torch.allclose(layer.weight, weight[n], atol=1e-4)


def test_the_benchmark_drives_both_simulators(capsys):
    ratio = bench_driving(rounds=1, episodes=1, stock_episodes=1, method="bc")
    assert ratio > 0
    assert "times as fast" in capsys.readouterr().out


# ==== The files of this repository ================================================================

CHECKED = ("proco.py", "test_proco.py", "llm_costs/write.py", "llm_costs/score.py")


def header(name):
    """A file's inline script metadata (PEP 723), as a dict."""
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    block = (proco.HERE / name).read_text("utf-8").split("# ///")[1]
    lines = block.splitlines()[1:]
    return tomllib.loads("\n".join(line.removeprefix("#") for line in lines))


def packages(lines):
    """{package: versions} of lines such as numpy<2.3."""
    return dict(re.fullmatch(r"([\w-]+)(.*)", line.replace(" ", "")).groups() for line in lines)


def test_dependencies_are_the_same_everywhere():
    own = header("proco.py")
    judge = header("test_proco.py")
    listed = packages(own.pop("dependencies"))
    more = {"pytest": ">=7.0", "ruff": ">=0.17,<0.18"}
    assert packages(judge.pop("dependencies")) == listed | more
    assert own == judge  # Python's versions, and what uv overrides
    for_pip = []
    text = (proco.HERE / "requirements.txt").read_text("utf-8")
    for line in text.splitlines():
        requirement, _, marker = line.partition("#")[0].strip().partition(";")
        if requirement and ">=" not in marker:  # on Python 3.11, as in the headers
            for_pip.append(requirement)
    for_pip += re.search("--no-deps (.*)", text)[1].split()
    assert packages(for_pip) == listed | more


def test_layout_and_lint():
    pytest.importorskip("ruff")
    for words in (["format", "--check", "--line-length", "100"], ["check"]):
        command = [sys.executable, "-m", "ruff", *words, *CHECKED]
        done = subprocess.run(command, cwd=proco.HERE, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in CHECKED:
        lines = (proco.HERE / name).read_text("utf-8").splitlines()
        assert max(map(len, lines)) <= 100


# ==== The README ==================================================================================


def readme():
    return (proco.HERE / "README.md").read_text("utf-8")


def test_the_readme_is_short_and_names_what_there_is():
    assert len(readme().encode()) <= 8192
    table = readme().split("## From step to function")[1].split("##")[0]
    names = re.findall(r"`([\w.]+)`", table)
    assert len(names) > 20
    for name in names:
        found = proco
        for part in name.split("."):
            found = getattr(found, part)


def test_the_readmes_example_of_a_fork_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", readme(), re.DOTALL)[1]
    command = [sys.executable, "-c", code]
    surroundings = os.environ | {"PYTHONPATH": str(proco.HERE)}
    subprocess.run(command, cwd=tmp_path, env=surroundings, check=True, timeout=120)
    results = read_results(tmp_path / "runs/Cart/proco/seed0")
    assert results["data"]["source"] == "file"
    assert results["data"]["episodes"] == 20
    assert list(results["acting"]) == ["clone", "filter", "actor"]


if __name__ == "__main__":
    sys.exit(main())
