"""Tests of every step of proco.py, in its order, against closed forms, brute force, known numbers, real HDF5 files
and the real simulator; then of the command line and of whole runs.

    python -m pytest -q test_proco.py                          # three minutes on two cores
    PROCO_SLOW=1 python -m pytest -q test_proco.py -k full     # and the double integrator at full length
"""
import contextlib
import copy
import csv
import dataclasses
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

import proco
from llm_costs import fetch, results
from proco import CostError, ProcoError, TASKS, compile_cost, fetch_dsrl, get_task, load_cost, prompt, write_cost

torch.set_num_threads(1)
WITH_LIDARS = [name for name in TASKS if get_task(name).lidars]
DI = get_task("DoubleIntegrator")


def plausible(name):
    return proco.language.plausible(get_task(name))


def prompt_hash(name):
    return proco.language.prompt_hash(get_task(name))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def at_home_nowhere(cache, monkeypatch):
    """No test reads or writes the user's own cache, data or settings."""
    monkeypatch.setattr(proco, "CACHE", cache)
    monkeypatch.setenv("PROCO_CACHE", str(cache))
    monkeypatch.setenv("DSRL_DATASET_DIR", str(cache / "dsrl"))
    for name in ("PROCO_LLM_URL", "PROCO_LLM_MODEL", "PROCO_LLM_KEY"):
        monkeypatch.delenv(name, raising=False)
    download = fetch.download

    def near(url, path, notes):                 # nor anything from the network: DSRL's files have gigabytes
        if "//127.0.0.1" not in url:
            raise ProcoError("no test goes out")
        return download(url, path, notes)
    monkeypatch.setattr(fetch, "download", near)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def small(**changes):
    """Settings of a run on the double integrator that takes seconds."""
    return proco.Config(**dict(dict(task="DoubleIntegrator", hidden=32, batch=32, ensemble=3, scale=0.01, device="cpu",
                                    driver_episodes=20, eval_episodes=4, data="driver"), **changes))


# =====================================================================================================================
# The file, the tasks, and the state they are seen through
# =====================================================================================================================


def python(code, cwd, **environment):
    """Another Python that can import proco -> the finished process."""
    path = os.pathsep.join([str(Path(proco.__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, text=True, capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment})


def test_import_has_no_side_effects(tmp_path):
    heavy = "safety_gymnasium gymnasium mujoco matplotlib requests dsrl gym".split()
    done = python("import socket, sys\n"
                  "def no(*_): raise SystemExit('it opens a socket')\n"
                  "socket.socket.connect = socket.getaddrinfo = no\n"
                  f"import proco\nprint([name for name in {heavy} if name in sys.modules])", tmp_path,
                  HOME=str(tmp_path), PROCO_CACHE=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert list(tmp_path.iterdir()) == []


def test_no_line_is_bound_to_one_machine():
    assert not re.search(r"[\"'](/work|/tmp|/root|/home)\b", Path(proco.__file__).read_text())


@pytest.mark.parametrize("wrong, meant", [("PointGaol1", "PointGoal1"), ("carbutton1", "CarButton1"),
                                          ("AntVelocty", "AntVelocity"), ("DoubleIntegrater", "DoubleIntegrator")])
def test_unknown_task_names_the_nearest(wrong, meant):
    with pytest.raises(ProcoError, match=meant) as e:
        get_task(wrong)
    assert wrong in str(e.value) and "\n" not in str(e.value)


def test_unknown_task_like_nothing_still_names_some():
    with pytest.raises(ProcoError, match="DoubleIntegrator"):
        get_task("zzz")


@pytest.mark.parametrize("name, obs, act, state, dt, steps", [
    ("PointGoal1", 60, 2, 5 + 2 * (1 + 5 + 3), 0.02, 1000), ("CarGoal2", 72, 2, 23, 0.04, 1000),
    ("CarButton1", 88, 2, 5 + 2 * (4 + 1 + 5 + 4), 0.04, 1000),
    ("PointPush1", 76, 2, 5 + 2 * (1 + 5 + 4 + 1), 0.02, 1000), ("CarCircle1", 40, 2, 7, 0.04, 500),
    ("AntVelocity", 27, 8, 27, 0.05, 1000), ("DoubleIntegrator", 2, 1, 2, 0.1, 100)])
def test_sizes_and_clock(name, obs, act, state, dt, steps):
    task = get_task(name)
    assert (task.obs_dim, task.act_dim, task.state_dim, task.dt, task.steps) == (obs, act, state, dt, steps)
    raw = get_task(name, raw_obs=True)
    assert (raw.obs_dim, raw.state_dim, raw.lidars) == (obs, obs, ())


def bins_of(**values):
    """Sixteen bins from b3=0.5 and the like."""
    out = np.zeros(16, np.float32)
    for name, value in values.items():
        out[int(name[1:])] = value
    return out


@pytest.mark.parametrize("bins, found", [
    # 1 m at 30 degrees: bin 1, a third of the way through it
    (bins_of(b1=2 / 3, b2=2 / 9, b0=4 / 9), [(1, 30), None, None]),
    # and 2.4 m at 200 degrees: bin 8, eight ninths through
    (bins_of(b1=2 / 3, b2=2 / 9, b0=4 / 9, b8=.2, b9=.2 * 8 / 9, b7=.2 / 9), [(1, 30), (2.4, 200), None]),
    (bins_of(), [None, None, None]),
    # on the seam: 350 degrees is bin 15 (five ninths through), 5 degrees is bin 0 (two ninths through)
    (bins_of(b15=.5, b0=.5 * 5 / 9, b14=.5 * 4 / 9), [(1.5, 350), None, None]),
    (bins_of(b0=.9, b1=.9 * 2 / 9, b15=.9 * 7 / 9), [(0.3, 5), None, None]),
    (bins_of(b0=.5, b1=.0, b15=.5), [(1.5, 0), None, None])])                   # exactly between the two
def test_locate_on_hand_computed_lidars(bins, found):
    xy = proco.locate(bins, 3.0, 3)
    for (x, y), truth in zip(xy, found):
        distance, bearing = truth or (3, 0)
        a = math.radians(bearing)
        assert (x, y) == pytest.approx((distance * math.cos(a), distance * math.sin(a)), abs=2e-4)
    assert np.array_equal(proco.locate(np.stack([bins, bins])[:, None], np.full((2, 1), 3.0), 3)[1, 0], xy)


def spread_out(task, rng, rows=1):
    """States whose objects of one lidar see at least 60 degrees between them, nearest first: (rows, S)."""
    state = rng.normal(size=(rows, task.state_dim))
    for L in task.lidars:
        bearing = rng.uniform(0, 360, (rows, 1)) + np.arange(L.count) * 360 / L.count
        bearing = bearing + rng.uniform(-3, 3, (rows, L.count))
        distance = np.sort(rng.uniform(0.1, 0.9 * L.reach, (rows, L.count)))
        bearing = np.radians(rng.permuted(bearing, axis=1))
        xy = np.stack([distance * np.cos(bearing), distance * np.sin(bearing)], -1)
        state[:, L.at:L.at + 2 * L.count] = xy.reshape(rows, -1)
    return torch.tensor(state, dtype=torch.float32)


@pytest.mark.parametrize("name", ["PointGoal1", "CarButton2", "PointPush2", "CarCircle1"])
def test_decode_renders_the_simulators_lidar(name):
    """Against `scene`, which loops over objects and bins."""
    task, rng = get_task(name), np.random.default_rng(1)
    state = torch.tensor(rng.normal(0, 1.5, (20, task.state_dim)), dtype=torch.float32)         # objects anywhere
    for row, obs in zip(state, proco.decode(state, task)):
        lidars = {}
        for L in task.lidars:
            xy = row[L.at:L.at + 2 * L.count].view(-1, 2).double()
            lidars[L.name] = [(math.hypot(x, y), math.degrees(math.atan2(y, x))) for x, y in xy.tolist()]
        start = task.lidars[0].start
        assert torch.allclose(obs[start:], scene(name, lidars)[start:], atol=2e-5)
        assert torch.equal(obs[list(task.sensors)], row[:5]) and obs[:3].abs().sum() == 0


@pytest.mark.parametrize("name", WITH_LIDARS)
def test_encode_undoes_decode_where_objects_stand_apart(name):
    task = get_task(name)
    state = spread_out(task, np.random.default_rng(2), 40)
    again = torch.tensor(proco.encode(proco.decode(state, task), task))
    assert again.shape == (40, task.state_dim) and torch.allclose(again, state, atol=2e-3)


@pytest.mark.parametrize("task", [get_task("AntVelocity"), DI, get_task("CarGoal1", raw_obs=True)])
def test_without_lidars_the_state_is_the_observation(task):
    obs = np.random.default_rng(0).normal(size=(3, 4, task.obs_dim)).astype(np.float32)
    assert np.array_equal(proco.encode(obs, task), obs)
    assert np.array_equal(proco.decode(torch.tensor(obs), task), obs)


def test_decode_can_be_learnt_through_or_batched_at_will():
    task = get_task("PointGoal1")
    state = spread_out(task, np.random.default_rng(3), 6)
    assert torch.equal(proco.decode(state.view(2, 3, -1), task).view(6, -1), proco.decode(state, task))
    assert torch.equal(proco.decode(state[4], task), proco.decode(state, task)[4])


def test_nearest_first_sorts_each_lidar_and_nothing_else():
    task, rng = get_task("CarButton1"), np.random.default_rng(4)
    state = torch.tensor(rng.normal(size=(30, task.state_dim)), dtype=torch.float32)
    out = proco.nearest_first(state, task)
    assert torch.equal(out[:, :5], state[:, :5])
    for before, after in zip(state, out):
        for L in task.lidars:
            pairs = [tuple(p) for p in before[L.at:L.at + 2 * L.count].view(-1, 2).tolist()]
            assert [tuple(p) for p in after[L.at:L.at + 2 * L.count].view(-1, 2).tolist()] == sorted(
                pairs, key=lambda p: p[0] ** 2 + p[1] ** 2)


# =====================================================================================================================
# The simulator, and the double integrator
# =====================================================================================================================


@pytest.fixture(scope="session")
def simulator():
    return proco.import_simulator()


def nearest(world, name):
    """Distance of the nearest such object in the agent's own plane: a car rocks, and the plane with it."""
    ground = [np.append(np.array(position)[:2], 0) for position in np.atleast_2d(getattr(world, name).pos)]
    return min(np.hypot(*((position - world.agent.pos) @ world.agent.mat)[:2]) for position in ground)


@pytest.mark.parametrize("name", ["PointGoal1", "CarGoal2", "PointCircle1"])
def test_the_nearest_distance_is_exact_in_the_simulator(name, simulator):
    env, task, rng = proco.make_env(name), get_task(name), np.random.default_rng(0)
    obs, _ = env.reset(seed=3)
    for _ in range(40):
        obs, *_ = env.step(rng.uniform(-1, 1, 2))
        state = proco.encode(obs, task)
        for L in task.lidars:
            if L.name != "vases":                                   # they are knocked about while the scan is taken
                truth = min(nearest(env.unwrapped.task, L.name), L.reach)
                assert np.hypot(*state[L.at:L.at + 2]) == pytest.approx(truth, abs=1e-5)


def test_the_agent_knows_where_it_is_in_the_circle(simulator):
    """Compass and lidar together give the position in the world, where the walls of Circle are."""
    env, task, rng = proco.make_env("CarCircle1"), get_task("CarCircle1"), np.random.default_rng(1)
    agent, (obs, _) = proco.Agent(task, small()), env.reset(seed=5)
    for _ in range(60):
        obs, *_ = env.step(rng.uniform(0, 1, 2))
        where = agent.features(agent._state(obs[None]))[0, -2:]
        assert where.tolist() == pytest.approx(env.unwrapped.task.agent.pos[:2].tolist(), abs=0.02)


def test_a_reset_repeats_itself(simulator):
    env = proco.make_env("PointGoal1")
    first, second = (env.reset(seed=11)[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, env.reset(seed=12)[0])


def simulator_drives(make):
    """What a simulator shows and pays on several tasks, all numbers in a row: a drive from button to button in which
    everything is touched that can be, and random ones among all other kinds of things."""
    env, seen = make("PointButton2"), set()
    numbers = [env.reset(seed=8)[0]]
    for step in range(180):
        world = env.unwrapped.task
        ahead = (np.array(world.buttons.pos[step // 150]) - world.agent.pos) @ world.agent.mat
        bearing = np.arctan2(ahead[1], ahead[0])
        obs, reward, cost, _, _, info = env.step(np.array([abs(bearing) < 0.6, np.clip(3 * bearing, -1, 1)], float))
        numbers += [obs, [reward, cost]]
        seen |= {key for key, value in info.items() if value}
    assert seen == {"cost_gremlins", "cost_buttons", "cost_sum", "goal_met"}
    costs = set()
    for name in ("CarButton1", "CarGoal2", "PointPush2", "CarCircle2", "PointGoal1"):
        env, rng = make(name), np.random.default_rng(3)
        for seed in (1, 2):                                                     # a reset makes a new world
            numbers.append(env.reset(seed=seed)[0])
            for step in range(150):
                action = rng.uniform([0.5, -0.5], [1, 0.5]) if step % 15 == 0 else action      # forwards, into things
                obs, reward, cost, _, _, info = env.step(action)
                numbers += [obs, [reward, cost]]
                costs |= {key for key, value in info.items() if value}
    assert {"cost_hazards", "cost_out_of_boundary", "cost_pillars", "cost_vases_contact"} <= costs
    generator = env.unwrapped.task.random_generator
    for places in ([(-1, -1, 0, 0)], [(-1, -1, -0.2, -0.2), (0, 0, 1, 1)]):       # no task has several rectangles
        generator.set_random_seed(5)
        generator.set_placements_info(dict(here=(places, 0.1), there=(None, 0.3), thing=(places, 0.2)), (-1, -1, 1, 1), 0)
        for _ in range(100):                                                    # some of them need new attempts
            numbers += generator.build_layout().values()
    return np.concatenate(numbers)


def stock_simulator():
    """Safety-Gymnasium as it is installed. For a process of its own: it must not see ours."""
    original = dataclasses._get_field

    def get_field(cls, name, *rest):            # all it needs to be imported since Python 3.11
        if isinstance(getattr(cls, name, None), np.ndarray):
            setattr(cls, name, dataclasses.field(default_factory=getattr(cls, name).copy))
        return original(cls, name, *rest)
    dataclasses._get_field = get_field
    import safety_gymnasium
    return lambda name: safety_gymnasium.make(f"Safety{name}-v0")


def stock_drives(path):
    """Saves simulator_drives of the stock simulator."""
    np.save(path, simulator_drives(stock_simulator()))


def test_the_fast_simulator_is_the_stock_one_to_the_bit(simulator, tmp_path):
    """Layouts, resets, observations, rewards and costs; the stock one checks every observation, too."""
    work = f"import test_proco; test_proco.stock_drives({str(tmp_path / 'stock.npy')!r})"
    subprocess.run([sys.executable, "-c", work], check=True, cwd=Path(__file__).parent)
    fast, stock = simulator_drives(proco.make_env.__wrapped__), np.load(tmp_path / "stock.npy")
    assert len(fast) > 100_000 and np.array_equal(fast, stock)


def test_the_double_integrator_moves_as_its_formula_says():
    env = proco.DoubleIntegrator()
    for seed in range(5):
        (x, v), _ = env.reset(seed=seed)
        assert -3 <= x <= 0 and -0.5 <= v <= 0.5 and np.array_equal(env.reset(seed=seed)[0], np.float32([x, v]))
        rng, x, v = np.random.default_rng(seed), env.x, env.v
        for t in range(100):
            a = rng.uniform(-1, 3)                                  # beyond 1 it is clipped
            v = min(2, max(-2, v + min(1, a) * 0.1))
            obs, reward, cost, terminated, truncated, _ = env.step([a])
            assert reward == pytest.approx(v * 0.1) and not terminated and truncated == (t == 99)
            x += 0.1 * v
            assert obs == pytest.approx([x, v], abs=1e-5) and cost == (x >= 1)


def test_doomed_is_what_full_braking_in_the_environment_finds():
    rng, env = np.random.default_rng(0), proco.DoubleIntegrator()
    x, v = rng.uniform(-1.2, 1.1, 400), rng.uniform(-1, 2, 400)
    truth = []
    for env.x, env.v in zip(x, v):
        env.t, hit = 0, env.x >= 1
        while env.v > 0:
            hit |= env.step([-1])[2] > 0
        truth.append(hit)
    doomed = proco.double_integrator_doomed(x, v)
    assert np.array_equal(doomed, truth) and 0.2 < doomed.mean() < 0.8
    # and between the closed forms of continuous time and of one step less
    assert (x + np.maximum(v, 0) ** 2 / 2 >= 1)[doomed].all()
    assert doomed[(x + np.maximum(v, 0) ** 2 / 2 - 0.06 * np.maximum(v, 0) > 1.001)].all()


# =====================================================================================================================
# 1. Data
# =====================================================================================================================


def episodes_of(costs, length=10, task=DI):
    """Recorded episodes, one for each total cost, as in DSRL's files."""
    rows, rng = len(costs) * length, np.random.default_rng(0)
    obs = rng.normal(size=(rows, task.obs_dim)).astype(np.float32)
    out = dict(observations=obs, next_observations=obs + 1, actions=rng.uniform(-1, 1, (rows, task.act_dim)),
               rewards=np.arange(rows) * 1.0, costs=np.zeros(rows), terminals=np.zeros(rows), timeouts=np.zeros(rows))
    for n, cost in enumerate(costs):
        out["costs"][n * length:n * length + cost] = 1
        out["timeouts" if n % 2 else "terminals"][(n + 1) * length - 1] = 1
    return {key: value.astype(np.float32) for key, value in out.items()}


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


def test_only_whole_safe_episodes_are_kept(tmp_path):
    recorded = episodes_of([0, 3, 0, 1])
    tail = {key: value[:4] * (key not in ("terminals", "timeouts")) for key, value in recorded.items()}
    path = write_hdf5(tmp_path / "d.hdf5", {k: np.concatenate([recorded[k], tail[k]]) for k in recorded})
    data, facts = proco.load_data(path, DI)
    rows = np.r_[0:10, 20:30]
    for key in proco.KEYS:
        assert np.array_equal(data[key], recorded[key][rows]) and data[key].dtype == np.float32
    assert data["episode"].tolist() == [0] * 10 + [1] * 10
    assert (facts["episodes"], facts["transitions"], facts["unsafe_share"]) == (2, 20, 0)
    assert facts["return_mean"] == (sum(range(10)) + sum(range(20, 30))) / 2


@pytest.mark.parametrize("limit, episodes, unsafe", [(0, 2, 0), (1, 3, 1 / 30), (2.5, 3, 1 / 30), (3, 4, 4 / 40)])
def test_a_few_violations_can_be_allowed(limit, episodes, unsafe, tmp_path):
    path = write_hdf5(tmp_path / "d.hdf5", episodes_of([0, 3, 0, 1]))
    facts = proco.load_data(path, DI, limit)[1]
    assert facts["episodes"] == episodes and facts["unsafe_share"] == pytest.approx(unsafe)


def changed(**changes):
    return lambda path: write_hdf5(path, {**episodes_of([0, 0]), **changes})


def cut_off(path):
    write_hdf5(path, episodes_of([0] * 50))
    path.write_bytes(path.read_bytes()[:3000])


def without(key):
    return lambda path: write_hdf5(path, {k: v for k, v in episodes_of([0]).items() if k != key})


NAN = np.full((20, 2), np.nan, np.float32)
BAD = dict(missing=(lambda path: None, "no such file"), empty=(lambda path: path.touch(), "cut off or no HDF5"),
           text=(lambda path: path.write_text("observations\n" * 99), "cut off or no HDF5"),
           cut_off=(cut_off, "cut off"),
           folder=(lambda path: path.mkdir(), "can't read"),
           no_costs=(without("costs"), "lacks costs"),
           no_next=(without("next_observations"), "lacks next_observations"),
           no_rewards=(without("rewards"), "lacks rewards"),
           width=(changed(observations=np.zeros((20, 3), np.float32)), r"observations .*\(20, 3\).*\(20, 2\)"),
           actions_width=(changed(actions=np.zeros((20, 2), np.float32)),
                          r"actions .*DoubleIntegrator needs \(20, 1\)"),
           length=(changed(costs=np.zeros(19, np.float32)), r"costs .*\(19,\)"),
           flat=(changed(actions=np.zeros(20, np.float32)), r"actions .*\(20,\)"),
           nan=(changed(observations=NAN), "observations .*NaN"),
           infinite=(changed(rewards=np.full(20, np.inf, np.float32)), "rewards .*infinity"),
           nan_action=(changed(actions=NAN[:, :1]), "actions .*NaN"),
           nan_cost=(changed(costs=NAN[:, 0]), "costs .*NaN"),
           large_actions=(changed(actions=np.full((20, 1), 1.5, np.float32)), r"\[-1, 1\].*1.5"),
           no_ends=(changed(terminals=np.zeros(20), timeouts=np.zeros(20)), "no end of an episode"),
           unsafe=(changed(costs=np.ones(20, np.float32)), "none of the 2 episodes .*10.*--max-episode-cost"),
           no_rows=(lambda path: write_hdf5(path, {k: v[:0] for k, v in episodes_of([0]).items()}), "no end"))


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(name, tmp_path):
    make, why = BAD[name]
    make(tmp_path / "bad.hdf5")
    with pytest.raises(ProcoError, match=why) as e:
        proco.load_data(tmp_path / "bad.hdf5", DI)
    assert "bad.hdf5" in str(e.value) and "\n" not in str(e.value)


def test_whole_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with proco.whole(path) as part:
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyError):
        with proco.whole(path) as part:
            part.write_text("tw")
            raise KeyError
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]
    with pytest.raises(ProcoError, match="can't write"):
        with proco.whole(path / "below a file"):
            pass


def test_driven_data_are_collected_once_in_dsrls_format(cache):
    path = proco.drive_data("DoubleIntegrator", 12)
    stamp, (data, facts) = path.stat().st_mtime_ns, proco.load_data(path, DI)
    assert proco.drive_data("DoubleIntegrator", 12) == path and path.stat().st_mtime_ns == stamp
    assert cache in path.parents and facts["episodes"] == 12 and facts["transitions"] == 1200
    same = data["episode"][1:] == data["episode"][:-1]
    assert np.array_equal(data["next_observations"][:-1][same], data["observations"][1:][same])
    # the demonstrator speeds up and always brakes in time
    assert facts["unsafe_share"] == 0 and data["observations"][:, 1].max() > 1 and facts["return_mean"] > 1


def test_where_data_come_from(cache, monkeypatch, capsys):
    monkeypatch.setattr(proco, "drive_data", lambda name, episodes: Path(f"driven-{name}-{episodes}"))
    assert proco.find_data(small(data="a.hdf5")) == ("file", Path("a.hdf5"))
    assert proco.find_data(small(driver_episodes=7)) == ("driver", Path("driven-DoubleIntegrator-7"))
    with pytest.raises(ProcoError, match="PointGoal1"):
        proco.find_data(small(task="PointGoal1", data="dsrl"))
    capsys.readouterr()
    assert proco.find_data(small(task="PointGoal1", data="auto"))[0] == "driver"
    assert "WARNING" in capsys.readouterr().err
    file = cache / "dsrl" / "SafetyPointGoal1Gymnasium-v0-100-2022.hdf5"
    file.parent.mkdir(exist_ok=True)
    h5py.File(file, "w").close()
    assert proco.find_data(small(task="PointGoal1", data="auto")) == ("dsrl", file)
    file.unlink()


def test_the_driver_says_what_it_cannot_drive():
    with pytest.raises(ProcoError, match="AntVelocity"):
        proco.drive_data("AntVelocity", 3)


@pytest.mark.parametrize("name", ["PointGoal1", "CarGoal2", "PointButton2", "CarButton1", "PointCircle1", "CarCircle2"])
def test_the_driver_acts_within_the_box_on_what_it_sees(name):
    task, rng = get_task(name), np.random.default_rng(0)
    act = proco.make_driver(name, np.random.default_rng(1))
    obs = proco.decode(spread_out(task, rng, 12), task).numpy()
    actions = np.stack([act(row) for row in obs])
    assert actions.shape == (12, 2) and actions.dtype == np.float32 and np.abs(actions).max() <= 1
    assert len(np.unique(actions, axis=0)) > 2


@pytest.fixture(scope="session")
def driven(simulator):
    """One episode of the scripted driver on PointGoal1, in the simulator."""
    return proco.collect_episode("PointGoal1", 0)


def test_an_episode_of_the_driver_is_safe_and_earns(driven):
    assert {key: value.shape for key, value in driven.items()} == dict(
        observations=(1000, 60), next_observations=(1000, 60), actions=(1000, 2),
        **{key: (1000,) for key in ("rewards", "costs", "terminals", "timeouts")})
    assert driven["costs"].sum() == 0 and driven["rewards"].sum() > 12 and np.abs(driven["actions"]).max() <= 1
    assert np.array_equal(driven["next_observations"][:-1], driven["observations"][1:])
    assert driven["timeouts"].sum() == driven["timeouts"][-1] == 1


def test_detours_go_around_discs_and_straight_where_none_is_in_the_way():
    starts, goal = np.array([[0.0, 0.0], [0.0, 3.0]]), np.array([4.0, 0.0])
    disc, radius = np.array([[2.0, 0.0]]), np.array([0.5])
    far, away = proco.driver.detours(starts, goal, disc, radius, 20.0)
    assert 4 < far < 4 + 20 * 1 and away == pytest.approx(5)
    tangent = 2 * math.sqrt(2 ** 2 - 0.5 ** 2) + 2 * 0.5 * math.asin(0.5 / 2)          # a string around the disc
    assert tangent <= far + 0.02 and far < tangent + 0.4
    assert proco.driver.detours(starts, goal, disc + [0, 9], radius, 20.0) == pytest.approx([4, 5])


def test_to_device_knows_how_far_each_step_was_from_danger(tmp_path):
    arrays = proco.load_data(write_hdf5(tmp_path / "d.hdf5", episodes_of([0, 0])), DI)[0]
    data = proco.to_device(arrays, DI, load_cost("DoubleIntegrator"), torch.device("cpu"))
    assert np.array_equal(data["state"], arrays["observations"]) and np.array_equal(data["action"], arrays["actions"])
    assert np.array_equal(data["next_state"], arrays["next_observations"])
    wall = (1 - arrays["next_observations"][:, 0]).clip(0, 1)
    assert np.abs(data["danger"].numpy() - wall).max() < 0.005


# =====================================================================================================================
# 2. Dynamics
# =====================================================================================================================


def test_members_are_separate_networks():
    torch.manual_seed(0)
    net, x = proco.Mlp([3, 8, 8, 2], members=4), torch.randn(5, 3)
    out, each = net(x), torch.randn(4, 5, 3)
    assert out.shape == (4, 5, 2) and net(each).shape == (4, 5, 2)
    for m in range(4):
        layers = [(w[m], b[m, :, 0]) for w, b in zip(net.weights, net.biases)]

        def alone(x):
            for n, (w, b) in enumerate(layers):
                x = torch.nn.functional.linear(x.relu() if n else x, w, b)
            return x
        assert torch.allclose(out[m], alone(x), atol=1e-5) and torch.allclose(net(each)[m], alone(each[m]), atol=1e-5)
    net(x)[1].sum().backward()
    touched = [[bool(p.grad[m].any()) for m in range(4)] for p in net.parameters()]
    assert touched == [[False, True, False, False]] * 6


def test_move_is_an_affine_map():
    turn = torch.tensor([[0.0, -1, 5], [1, 0, 7]]) - torch.eye(2, 3)            # a quarter turn, then a shift
    xy = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    assert torch.allclose(xy + proco.move(turn, xy), torch.tensor([[5.0, 8], [4, 7], [5, 7]]))
    maps, points = torch.randn(4, 6, 2, 3), torch.randn(6, 9, 2)
    brute = torch.tensor([[[[sum(m[r][c] * p[c] for c in (0, 1)) + m[r][2] for r in (0, 1)] for p in points[b].tolist()]
                           for b, m in enumerate(member)] for member in maps.tolist()])
    assert torch.allclose(proco.move(maps, points), brute, atol=1e-5)


def drive_past(task, places, velocity, rate, start=(0.3, -0.2), heading=0.7):
    """Two states one step apart of an agent that moves at `velocity` (its own frame) and turns at `rate` past objects
    fixed in the world, places {lidar: (N, 2)} -> state, next_state, displacement of each seen object, all (1, .)."""
    def view(position, angle):
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        return {name: (np.array(xy) - position) @ rotation.T for name, xy in places.items()}

    ahead = np.array([[math.cos(heading), -math.sin(heading)], [math.sin(heading), math.cos(heading)]])
    seen = view(np.array(start), heading)
    later = view(start + task.dt * ahead @ velocity, heading + rate * task.dt)
    states = []
    for now in (seen, later):
        state = torch.zeros(1, task.state_dim)
        state[0, :3] = torch.tensor([*velocity, rate])
        for L in task.lidars:
            xy = torch.full((L.count, 2), 0.0)
            xy[:, 0] = L.reach                                                  # unseen
            xy[:len(now[L.name])] = torch.tensor(now[L.name])
            state[0, L.at:L.at + 2 * L.count] = xy.flatten()
        states.append(proco.nearest_first(state, task))
    return *states, seen, later


def test_objects_are_paired_across_a_step_even_where_their_order_swaps():
    task, ahead = get_task("PointGoal1"), np.array([math.cos(0.7), math.sin(0.7)])
    start = np.array([0.3, -0.2])
    places = dict(goal=[start + [0.5, 1]], vases=[start + [-1, 0.4]],
                  hazards=[start - 0.99 * ahead, start + 1.0 * ahead, start + [0.3, -2]])
    state, later, before, after = drive_past(task, places, np.array([1.5, 0.1]), 2.0)
    hazards = task.lidars[1]
    assert state[0, hazards.at] < 0 < later[0, hazards.at]                      # the nearest was behind, and is ahead
    delta, trusted = proco.pair_objects(state, later, task)
    assert delta.shape == (1, 9, 2) and trusted[0].tolist() == [True] + [True] * 3 + [False] * 2 + [True] + [False] * 2
    truth = after["hazards"] - before["hazards"]                                # their order: behind, ahead, aside
    assert np.abs(delta[0, 1:4].numpy() - truth).max() < 1e-5 and np.abs(truth).max() > 0.03
    assert np.abs(delta[0, 0].numpy() - (after["goal"] - before["goal"])[0]).max() < 1e-5


def test_an_object_that_jumps_is_not_trusted():
    task, places = get_task("PointGoal1"), dict(goal=[(1, 1)], hazards=[(0, 1)], vases=np.zeros((0, 2)))
    state, later, *_ = drive_past(task, places, np.array([1.0, 0]), 0.5)
    later[0, 5:7] += 0.3                                                        # the goal is drawn anew
    assert proco.pair_objects(state, later, task)[1][0, :2].tolist() == [False, True]


def still(task, members=2):
    """A model whose network says zero: nothing changes."""
    model = proco.Dynamics(task, members, 8)
    for parameter in model.net.parameters():
        torch.nn.init.zeros_(parameter)
    model.low, model.high = torch.full_like(model.low, -9), torch.full_like(model.high, 9)
    return model.requires_grad_(False)


def test_a_model_that_says_nothing_leaves_everything_where_it_is():
    task = get_task("CarButton1")
    state = spread_out(task, np.random.default_rng(5), 7)
    for nexts in still(task).step(state, torch.zeros(7, 2)):
        assert torch.allclose(nexts, state, atol=1e-6)


def test_only_trusted_displacements_count_in_the_loss():
    task = get_task("PointGoal1")
    state, model = spread_out(task, np.random.default_rng(6), 8).expand(2, 8, -1), still(task)
    action, delta, trusted = torch.zeros(2, 8, 2), torch.zeros(2, 8, 9, 2), torch.ones(2, 8, 9, dtype=torch.bool)
    loss, score = proco.dynamics_loss(model, state, action, state, delta, trusted)
    assert loss.shape == score.shape == (2,) and score.abs().max() < 1e-6       # it was right
    delta[0, 3, 4], trusted[0, 3, 4] = 100, False
    assert torch.equal(proco.dynamics_loss(model, state, action, state, delta, trusted)[0], loss)
    trusted[0, 3, 4] = True
    worse, wrong = proco.dynamics_loss(model, state, action, state, delta, trusted)
    assert worse[0] > loss[0] and wrong[0] > 0.1 and worse[1] == loss[1]        # each member has a loss of its own


TOY = proco.Task("Toy", 3, 1, 100, 0.1, (0, 1, 2))                              # x, v and a field that is always 5


@pytest.fixture(scope="session")
def learnt(cache):
    """A model of the double integrator beside a constant field, and its data."""
    rng = np.random.default_rng(0)
    x, v = rng.uniform(-3, 1, 4000), rng.uniform(-2, 2, 4000)
    a = rng.uniform(-1, 1, 4000)
    after = np.clip(v + 0.1 * a, -2, 2)
    both = [np.stack([p, q, np.full(4000, 5.0)], -1).astype(np.float32) for p, q in ((x, v), (x + 0.1 * after, after))]
    data = dict(state=torch.tensor(both[0]), next_state=torch.tensor(both[1]), action=torch.tensor(a[:, None]).float(),
                episode=torch.arange(4000) // 100, held_out=torch.arange(4000) // 100 % 10 == 9)
    torch.manual_seed(0)
    model = proco.train_dynamics(data, TOY, small(hidden=128, model_epochs=25, scale=1.0), gen(1))
    return model, data


def test_dynamics_learns_the_double_integrator_beside_a_constant_field(learnt):
    model, data = learnt
    held_out = data["held_out"]
    state, nexts = data["state"][held_out], data["next_state"][held_out]
    guess = model.step(state, data["action"][held_out])
    assert guess.shape == (len(model.elites), 400, 3) and len(model.elites) == 2
    change, wrong = nexts - state, guess - nexts
    for k in (0, 1):
        assert (1 - wrong[..., k].square().mean(1) / change[:, k].var()).min() > 0.97
    assert wrong[..., 2].abs().max() < 1e-4
    assert torch.isfinite(model.limit) and model.limit > 0
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_members_differ_more_off_the_data_than_on_them(learnt):
    model, data = learnt
    model = proco.copy.deepcopy(model)
    model.low, model.high = model.low - 1e3, model.high + 1e3
    off = data["state"][:200] * torch.tensor([8.0, 8.0, 1.0])
    near, far = (model.disagreement(model.step(s, data["action"][:200])).median() for s in (data["state"][:200], off))
    assert far > 3 * near


def test_a_roll_out_invents_no_speeds(learnt):
    model, state = learnt[0], torch.tensor([[0.9, 1.99, 5.0]]).expand(50, -1)
    for _ in range(30):
        state = model.step(state, torch.ones(50, 1))[0]
    assert 2 < state[:, 1].max() <= 2 + 0.5 * 4 + 1e-4             # half of the recorded range beyond it


def test_the_dynamics_report(learnt):
    model, data = learnt
    rows = {key: [] for key in ("state", "next_state", "action", "episode")}
    for episode in range(30):                                                   # now in the order of time
        state = torch.tensor([-2 + episode / 30, episode / 100, 5])
        for t in range(30):
            action = data["action"][30 * episode + t]
            v = (state[1] + 0.1 * action[0]).clamp(-2, 2)
            after = torch.stack([state[0] + 0.1 * v, v, state[2]])
            for key, value in zip(rows, (state, after, action, torch.tensor(episode))):
                rows[key].append(value)
            state = after
    rows = {key: torch.stack(value) for key, value in rows.items()}
    report = results.dynamics_report(model, rows | dict(held_out=rows["episode"] % 10 == 9), steps=(1, 4))
    assert set(report) == {"sensors"} and set(report["sensors"]) == {"r2", "error", "nothing_changes"}
    row = report["sensors"]
    assert row["r2"] > 0.9 and len(row["error"]) == len(row["nothing_changes"]) == 2
    assert row["error"][0] < 0.3 * row["nothing_changes"][0] and row["error"][1] < 0.3 * row["nothing_changes"][1]


def test_disagreement_is_in_standardised_changes_and_of_the_worst_sensor():
    model = still(DI, members=2)
    model.change = torch.tensor([0.5, 2.0])
    same = torch.randn(3, 2).expand(2, 3, 2)
    assert model.disagreement(same).abs().max() < 1e-6
    apart = same.clone()
    apart[1, 0, 0] += 1.0                                                       # two changes of x
    apart[1, 1, 1] += 1.0                                                       # half a change of v
    apart[1, 2] += torch.tensor([1.0, 1.0])
    d = model.disagreement(apart)
    assert d.shape == (3,) and (d / d[1]).tolist() == pytest.approx([4, 1, 4], rel=1e-4)


def test_what_costs_depend_on_is_predicted_well_on_the_real_simulator(driven):
    """One episode of data: the nearest hazard is foretold far better than by "nothing changes"."""
    task = get_task("PointGoal1")
    data = {key: torch.tensor(proco.encode(driven[name], task)) for key, name in
            (("state", "observations"), ("next_state", "next_observations"))}
    data |= dict(action=torch.tensor(driven["actions"]), episode=torch.arange(1000) // 25,
                 held_out=torch.arange(1000) // 25 % 10 == 9)
    torch.manual_seed(0)
    model = proco.train_dynamics(data, task, small(hidden=128, model_epochs=60, scale=1.0), gen(2))
    row = results.dynamics_report(model, data, steps=(1,))["hazards"]
    assert row["error"][0] < 0.5 * row["nothing_changes"][0] and row["error"][0] < 0.01
    assert (model.drift == 0).all()                                             # hazards and vases stand still


# =====================================================================================================================
# 3. Cost: the language side
# =====================================================================================================================

TASK = "PointGoal1"                                     # 60 observations, hazards lidar at 28:44
GOOD = "def cost(obs, action, next_obs, margin=0.0):\n    d = 3 * (1 - next_obs[..., 28:44].amax(-1))\n" \
       "    return (d <= 0.2 + margin).float()\n"


def body(*lines, before=""):
    """A predicate that would pass, with these lines put into it."""
    return (f"{before}\ndef cost(obs, action, next_obs, margin=0.0):\n"
            "    d = 3 * (1 - next_obs[..., 28:44].amax(-1))\n" + "".join(f"    {x}\n" for x in lines)
            + "    return (d <= 0.2 + margin).float()\n")


HOSTILE = dict(
    import_os=body("import os"), import_top=body(before="import os"),
    from_import=body(before="from torch import load"), import_as=body(before="import torch as math"),
    dunder_import=body("__import__('os').system('true')"),
    dunder_walk=body("x = ().__class__.__base__.__subclasses__()"),
    dunder_attribute=body("x = obs.__class__"), getattr_=body("x = getattr(obs, 'tofile')"),
    eval_=body("eval('1')"), exec_=body("exec('x = 1')"), open_=body("open('x', 'w')"),
    globals_=body("x = globals()"), builtins=body("x = __builtins__"),
    torch_save=body("torch.save(obs, 'x')"), torch_load=body("x = torch.load('x')"),
    hub=body("torch.hub.load('a', 'b')"), ops=body("torch.ops.load_library('x')"),
    classes=body("torch.classes.load_library('x')"), utils=body("torch.utils.dlpack.to_dlpack(obs)"),
    torch_alias=body("t = torch", "t.save(obs, 'x')"), torch_os=body("torch.os.system('true')"),
    storage=body("obs.untyped_storage().fill_(0)"), tofile=body("obs.numpy().tofile('x')"),
    numpy=body("x = obs.numpy()"), from_file=body("x = torch.from_file('x')"),
    default_executes=body(before="def f(x=print(1)):\n    return x"),
    default_call=GOOD.replace("margin=0.0", "margin=float(1)"),
    annotation=GOOD.replace("obs, action", "obs: print(1), action"),
    result_annotation=GOOD.replace("margin=0.0):", "margin=0.0) -> print(1):"),
    variable_annotation=body("x: print(1) = 2"), decorator="@torch.jit.script\n" + GOOD,
    class_=body("class A: pass"), lambda_=body("f = lambda: 1"), while_=body("while True: pass"),
    huge_loop=body("for i in range(999999): pass"),
    nested_loops=body("for i in range(999):", "    for j in range(999):", "        for k in range(9): pass"),
    huge_power=body("x = 9 ** 999999"), power_chain=body("x = 9 ** 9 ** 9"), shift=body("x = 1 << 999999"),
    squaring=body("n = 10", *["n = n * n"] * 40), tuple_bomb=body("t = (1,)", *["t = t + t"] * 40),
    repeat_tuple=body("t = (0,) * 999999"),
    compare_bomb=body("t = (1, 1)", *["t = (t, t)"] * 30, "x = t == t"),
    range_bomb=body("x = torch.tensor(range(999999 * 9999))"), range_index=body("x = obs[range(999999 * 9999)]"),
    range_value=body("r = range", "x = obs[r(99)]"),
    tensor_bomb=body("t = (1, 1)", *["t = (t, t)"] * 30, "x = torch.tensor(t)"),
    fractions=body("x = torch.arange(0.0, 1.0, 1e-12)"),
    linspace=body("x = torch.linspace(0, 1, 999999 * 9999)"),
    shadow_meter=body(before="def _op(x, y, z):\n    return 1"),
    shadow_tick=body(before="def f(_tick):\n    return 1"),
    own_out=body(before="def f(out):\n    return torch.abs(out, out=out)"),
    double_star=body("x = torch.abs(*obs)"), linalg=body("x = torch.linalg.inv(obs)"),
    closure=body("x = load_cost.__globals__"),
    stack_bomb=body("t = (obs, obs)", *["t = (t, t)"] * 30, "x = torch.cat(t)"),
    huge_tensor=body("x = torch.zeros(99999, 99999)"), huge_arange=body("x = torch.arange(999999999999)"),
    doubling=body("x = obs", *["x = torch.cat([x, x])"] * 40), outer=body("x = obs[:, None] * obs[None]"),
    outer_index=body("x = obs[:, torch.zeros_like(obs[:, 0]).long()]"),
    expand=body("x = obs[..., :1].expand(99999, 99999)"),
    recursion=body("return f(obs)", before="def f(x):\n    return f(x)"),
    mutual=body(before="def f(x):\n    return cost(x, x, x)"),
    calls_itself=body("return cost(obs, action, next_obs)"),
    tower=body("f7(1)", before="def f0(x):\n    return x\n" + "".join(
        f"def f{i}(x):\n    for j in range(64):\n        f{i - 1}(x)\n" for i in range(1, 8))),
    write_item=body("next_obs[..., 0] = 0"), write_method=body("next_obs.add_(1)"),
    write_zero=body("obs.zero_()"), write_augmented=body("next_obs += 1"),
    write_out=body("torch.add(obs, 1, out=next_obs)"), write_data=body("obs.data = next_obs"),
    write_copy=body("obs.copy_(next_obs)"), delete=body("del obs"),
    set_threads=body("torch.set_num_threads(1)"), set_dtype=body("torch.set_default_dtype(torch.float64)"),
    set_grad=body("torch.set_grad_enabled(False)"), global_=body("global n", "n = 1"),
    with_=body("with torch.no_grad(): pass"), patch=body("torch.where = 1"),
    seed=body("torch.manual_seed(0)"), rand=body("d = d + torch.rand_like(d)"),
    randn=body("d = d + torch.randn(1)"), dropout=body("d = torch.dropout(d, 0.5, True)"),
    bernoulli=body("d = d.bernoulli()"), fstring=body("x = f'{obs}'"),
    format_=body("x = '{0.__class__}'.format(obs)"), try_=body("try: pass\n    except: pass"),
    star=body("x = torch.stack([*obs])"), item=body("x = obs.sum().item()"), walrus=body("x = (y := 1)"),
    shadow=body("torch = obs"), shadow_range=body(before="def range(x):\n    return x"),
    nested=body("def f(): return 1"), yield_=body("yield 1"), assert_=body("assert False"),
    async_=body("async def f(): pass"), match=body("match d:\n        case 1: pass"),
    top_call=body(before="print(1)"), top_torch=body(before="X = torch.zeros(3)"),
    prose="I am sorry, but I can't write that.", prose_tail=GOOD + "\nHope this helps!", empty="",
    null="\0", deep="x = " + "-" * 9000 + "1", brackets="(" * 9000, long=GOOD + "#" * 30_000,
    no_cost="def price(obs, action, next_obs, margin=0.0):\n    return obs",
    arguments=GOOD.replace("action, ", ""), no_margin=GOOD.replace("margin=0.0", "margin"),
    two_costs=GOOD + GOOD, nan=body("return d * math.nan"), nan_2=body("return d / 0 - d / 0"),
    not_01=body("return d"), boolean=body("return d <= 0.2 + margin"),
    integer=body("return (d <= 0.2 + margin).long()"), nothing=body("return None"),
    number=body("return 0.0"), wrong_shape=body("return (d <= 0.2 + margin).float().unsqueeze(-1)"),
    reduced=body("return (d <= 0.2 + margin).float().amax()"),
    batch_bound=body("return (next_obs[:, 28] > 0.9 - margin).float()"),
    mixes_rows=body("return (d <= d.mean() + margin).float()"),
    not_monotone=GOOD.replace("+ margin", "- margin"), all_safe=body("return torch.zeros_like(d)"),
    all_unsafe=body("return torch.ones_like(d)"), raises=body("x = obs[..., 999]"),
    undefined=body("x = y"), no_such=body("x = torch.wehre(obs)"))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_replies_are_refused(name, tmp_path, monkeypatch):
    """Each with one sentence, and the world is as it was."""
    monkeypatch.chdir(tmp_path)
    random, where = torch.get_rng_state(), torch.where
    state = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    with pytest.raises(CostError) as e:
        compile_cost(HOSTILE[name], TASK)
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == [] and torch.where is where
    assert torch.equal(random, torch.get_rng_state())
    assert state == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())


def test_what_a_plain_predicate_needs_is_allowed():
    compile_cost("import torch\nimport math\n" + GOOD, TASK)
    compile_cost('''
CORNERS = ((0.1, 0.1), (-0.1, 0.1))
RADIUS = 0.2 + 0.0 * math.sqrt(2)

def distance(bins, reach=3.0):
    """Of the nearest."""
    value, _ = bins.max(dim=-1)
    return reach * (1 - value)

def cost(obs, action, next_obs, margin=0.0):
    bins = next_obs[..., 28:44]
    i = torch.argmax(bins, dim=-1, keepdim=True)
    around = torch.cat([torch.gather(bins, -1, (i + k) % 16) for_k], dim=-1)
    angle = torch.atan2(around[..., 1], around[..., 0]) + torch.arange(16, device=obs.device)[0]
    xy = torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1)
    unsafe = torch.zeros(next_obs.shape[:-1], dtype=torch.bool, device=next_obs.device)
    for x, y in CORNERS:
        unsafe = unsafe | (torch.linalg.norm(xy * 0 + x * y * 0, dim=-1) < -1)
    if margin >= 0 and bins.shape[-1] == 16:
        unsafe = unsafe | (distance(bins) <= RADIUS + margin)
    return torch.where(unsafe, torch.ones_like(angle), torch.zeros_like(angle)).to(next_obs.dtype)
'''.replace("[torch.gather(bins, -1, (i + k) % 16) for_k]",
            "[torch.gather(bins, -1, (i - 1) % 16), torch.roll(bins, 1, dims=-1).gather(-1, i)]"), TASK)


@pytest.mark.parametrize("task", TASKS)
def test_cached_predicates(task):
    """Each loads through the whitelist, was written from the prompt of today, and widens with its margin."""
    head = (Path(proco.__file__).parent / "llm_costs" / f"{task}.py").read_text()
    assert re.search(r"^# prompt: (\w{16}) ", head, re.M)[1] == prompt_hash(task)
    assert re.search(r"^# model:  \S", head, re.M) and re.search(r"^# day:    \d{4}-\d\d-\d\d$", head, re.M)
    cost, batch = load_cost(task), [x.clone().requires_grad_() for x in plausible(task)]
    share = [cost(*batch, m).mean().item() for m in (0.0, 0.05, 0.2, 1.0)]
    assert share == sorted(share) and share[0] < share[-1]
    assert "{" not in prompt(task) and f"(..., {batch[0].shape[-1]})" in prompt(task)


def test_prompts_tell_facts_and_what_is_missing_is_said():
    for task in TASKS:
        text = prompt(task)
        assert task in text and ("lidar" in text) == (task in WITH_LIDARS)
        assert ("Gremlins" in text) == ("Button" in task) and ("Vases" in text) == ("Goal2" in task)
    assert "24 to 39: the circle lidar" in prompt("CarCircle2")
    assert "12 to 27: the circle lidar" in prompt("PointCircle2")
    with pytest.raises(ProcoError):
        prompt("PointFly1")
    with pytest.raises(CostError):
        load_cost("PointFly1")


def scene(task, lidars, yaw=0.0):
    """An observation in which each named lidar sees objects at (distance m, bearing degrees)."""
    obs = torch.zeros(get_task(task).obs_dim)
    obs[9], obs[10] = -0.5 * math.sin(yaw), -0.5 * math.cos(yaw)
    for L in get_task(task).lidars:
        for distance, bearing in lidars.get(L.name, ()):
            i, v = int(bearing % 360 // 22.5), max(0.0, 1 - distance / L.reach)
            f = bearing % 360 / 22.5 - i
            for k, value in ((i, v), (i + 1, f * v), (i - 1, (1 - f) * v)):
                obs[L.start + k % 16] = max(obs[L.start + k % 16], value)
    return obs


@pytest.mark.parametrize("task, lidars, yaw, unsafe_from", [
    ("PointGoal1", dict(hazards=[(0.19, 100)]), 0, 0),
    ("CarGoal1", dict(hazards=[(0.23, 100), (1, 3)]), 0, 0.03),
    ("PointGoal1", dict(goal=[(0.1, 0)], vases=[(0.1, 0)]), 0, 2.8),
    ("CarPush1", dict(hazards=[(0.33, 7)]), 0, 0.03),
    ("PointCircle1", dict(circle=[(1.1, 180)]), 0, 0.025),
    ("PointCircle1", dict(circle=[(1.1, 180)]), math.pi / 2, 1.125),
    ("CarCircle2", dict(circle=[(1.1, 30)]), math.radians(60), 0.025),
    ("CarCircle1", dict(circle=[(1.13, 9)]), -math.radians(9), 0), ("CarCircle1", {}, 0, 0),
    ("PointPush2", dict(pillars=[(0.40, 0)]), 0, 0.048),
    ("PointPush2", dict(pillars=[(0.40, 90)]), 0, 0.098),
    ("CarPush2", dict(pillars=[(0.40, 270)]), 0, 0.023), ("CarGoal2", dict(vases=[(0.29, 270)]), 0, 0),
    ("PointButton1", dict(buttons=[(0.15, 90), (1, 0)], goal=[(1, 0)]), 0, 0),
    ("PointButton1", dict(buttons=[(0.15, 90), (1, 0)], goal=[(0.15, 90)]), 0, 0.748),
    ("CarButton2", dict(gremlins=[(0.3, 270)]), 0, 0)])
def test_hand_computed_distances(task, lidars, yaw, unsafe_from):
    cost, obs = load_cost(task), scene(task, lidars, yaw)
    action = torch.zeros(2)
    assert unsafe_from == 0 or cost(obs, action, obs, unsafe_from - 2e-3) == 0
    assert cost(obs, action, obs, unsafe_from + 2e-3) == 1


def test_buttons_are_off_while_their_lidar_is_dark():
    cost, action = load_cost("CarButton1"), torch.zeros(2)
    on = scene("CarButton1", dict(buttons=[(0.1, 90)], goal=[(2, 0)]))
    off = scene("CarButton1", dict(goal=[(2, 0)]))
    assert [cost(a, action, b) for a, b in ((on, on), (off, on), (on, off), (off, off))] == [1, 0, 0, 0]


@pytest.mark.parametrize("task, i, limit", [("HalfCheetahVelocity", 8, 3.2096), ("HopperVelocity", 5, 0.7402),
                                            ("SwimmerVelocity", 3, 0.2282), ("Walker2dVelocity", 8, 2.3415)])
def test_speed_is_the_mean_over_the_step(task, i, limit):
    cost, size, actions = load_cost(task), get_task(task).obs_dim, get_task(task).act_dim
    obs, next_obs, action = torch.zeros(size), torch.zeros(size), torch.zeros(actions)
    obs[i], next_obs[i] = limit + 0.1, limit - 0.08
    assert cost(obs, action, next_obs) == 1 and cost(obs, action, 2 * next_obs - obs) == 0
    assert cost(-obs, action, -next_obs) == 0 and cost(obs, action, next_obs - 0.05) == 0
    assert cost(obs, action, next_obs - 0.05, margin=0.02) == 1


class Endpoint(BaseHTTPRequestHandler):
    """Plays a chat-completions server: gives the replies it was given and keeps what it was asked."""
    def do_POST(self):
        self.server.asked.append((self.path, dict(self.headers), json.loads(
            self.rfile.read(int(self.headers["Content-Length"])))))
        reply = self.server.replies.pop(0)
        status, text = reply if isinstance(reply, tuple) else (200, json.dumps(
            dict(choices=[dict(message=dict(role="assistant", content=reply))])))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fenced(code):
    return f"Here it is.\n```python\n{code}```\nAsk me anything."


def test_write_cost_caches_only_the_good_reply_and_says_why(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROCO_LLM_KEY", "very-secret")
    endpoint.replies = [fenced(HOSTILE["import_os"]), fenced(HOSTILE["wrong_shape"]), fenced(GOOD)]
    path = write_cost(TASK, endpoint.url, "model\nx = 1", out_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f"{TASK}.py"] and path == tmp_path / f"{TASK}.py"
    text = path.read_text()
    assert GOOD in text and prompt_hash(TASK) in text and compile_cost(text, TASK)
    assert len(endpoint.asked) == 3 and all(p == "/v1/chat/completions" for p, _, _ in endpoint.asked)
    assert endpoint.asked[0][2]["messages"] == [dict(role="user", content=prompt(TASK))]
    last = endpoint.asked[2][2]["messages"]
    assert [m["role"] for m in last] == ["user", "assistant"] * 2 + ["user"]
    assert "imports" in last[2]["content"] and "shape" in last[4]["content"]
    assert endpoint.asked[0][1]["Authorization"] == "Bearer very-secret"
    assert "very-secret" not in text + capsys.readouterr().out + json.dumps([m for _, _, m in endpoint.asked])


def test_write_cost_holds_a_reply_against_recorded_safe_steps(endpoint, tmp_path):
    obs, action, next_obs = plausible(TASK)
    safe = load_cost(TASK)(obs, action, next_obs) == 0
    data = [x[safe].numpy() for x in (obs, action, next_obs)]
    shy = GOOD.replace("0.2 +", "0.9 +")
    endpoint.replies = [fenced(shy), fenced(GOOD)]
    assert "0.9 +" not in write_cost(TASK, endpoint.url, "m", out_dir=tmp_path, data=data).read_text()
    assert "recorded" in endpoint.asked[1][2]["messages"][-1]["content"]


@pytest.mark.parametrize("replies, error", [
    ([(500, "oops")], ProcoError), ([(401, "no")], ProcoError), ([(302, "")], ProcoError),
    ([(200, "not JSON")], ProcoError), ([(200, "[]")], ProcoError),
    ([(200, '{"choices": []}')], ProcoError),
    ([(200, '{"choices": [{"message": {"content": null}}]}')], ProcoError), (["no code"] * 2, CostError),
    (["x", (500, "")], ProcoError), ([fenced(HOSTILE["not_monotone"])] * 2, CostError)])
def test_write_cost_overwrites_nothing_when_it_fails(endpoint, tmp_path, replies, error):
    (tmp_path / f"{TASK}.py").write_text("before")
    endpoint.replies = list(replies)
    with pytest.raises(error) as e:
        write_cost(TASK, endpoint.url, "m", attempts=2, out_dir=tmp_path)
    assert "\n" not in str(e.value) and [p.read_text() for p in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "nonsense", "http://"])
def test_write_cost_with_nobody_there(url, tmp_path):
    with pytest.raises(ProcoError, match="no language model answers"):
        write_cost(TASK, url, "m", out_dir=tmp_path, key="very-secret")
    with pytest.raises(ProcoError) as e:
        write_cost(TASK, url, "m", out_dir=tmp_path, key="very\nsecret")
    assert "secret" not in str(e.value)


# =====================================================================================================================
# 3. Cost: what a predicate is used for
# =====================================================================================================================


def test_danger_distance_is_the_distance_to_the_wall():
    cost = load_cost("DoubleIntegrator")
    x = torch.tensor([-3.0, -0.2, 0.0, 0.25, 0.6, 0.93, 0.999, 1.0, 1.5])
    obs = torch.stack([x, torch.zeros(9)], -1)
    gap = proco.danger_distance(cost, obs, torch.zeros(9, 1), obs)
    assert gap.tolist() == pytest.approx([1, 1, 1, 0.75, 0.4, 0.07, 0.001, 0, 0], abs=0.005)
    assert (gap[x < 1] > 0).all() and (gap[x >= 1] == 0).all()


def test_danger_distance_is_the_distance_to_the_nearest_hazard():
    task, cost = get_task("PointGoal1"), load_cost("PointGoal1")
    state = spread_out(task, np.random.default_rng(8), 50)
    at = task.lidars[1].at
    truth = (state[:, at:at + 2].norm(dim=-1) - 0.2).clamp(0, 1)
    obs = proco.decode(state, task)
    assert (proco.danger_distance(cost, obs, torch.zeros(50, 2), obs) - truth).abs().max() < 0.006


def test_the_conservative_cost_is_the_worst_over_members_and_margin():
    cost, rng = load_cost("DoubleIntegrator"), np.random.default_rng(0)
    nexts = torch.tensor(rng.uniform(0.5, 1.1, (3, 40, 2)), dtype=torch.float32)
    state, action, model = torch.zeros(40, 2), torch.zeros(40, 1), SimpleNamespace(task=DI)
    for margin in (0.0, 0.1, 0.3):
        c = proco.conservative_cost(model, cost, state, action, nexts, margin)
        assert c.tolist() == [float(any(x + margin >= 1 for x in nexts[:, row, 0])) for row in range(40)]


def test_the_margin_covers_the_models_own_error():
    """A model that is always 1.5 cm too optimistic gets a margin of about two such errors, within bounds."""
    x = torch.linspace(0.55, 0.95, 200)
    data = dict(state=torch.stack([x, 0 * x], -1), action=torch.zeros(200, 1), danger=1 - x,
                episode=torch.full((200,), 9), held_out=torch.ones(200, dtype=torch.bool))
    off = lambda error: SimpleNamespace(task=DI, step=lambda s, a: (s - torch.tensor([error, 0.0]))[None])
    margins = [proco.model_margin(off(error), load_cost("DoubleIntegrator"), data) for error in (0.0, 0.015, 0.08)]
    assert 0 < margins[0] < margins[1] < margins[2] <= 0.1 and 0.02 < margins[1] < 0.04


def test_caution_shares_tell_what_the_margin_and_a_minority_add():
    """Three members, one of which sees all 0.1 m farther on: of five places one is safe for all, one unsafe by margin and
    minority, one by minority alone, one by the margin alone, one for everybody."""
    off = torch.tensor([[0.0, 0], [0, 0], [0.1, 0]])[:, None]
    model = SimpleNamespace(task=DI, step=lambda state, action: state + off)
    state = torch.tensor([[0.0, 0], [0.87, 0], [0.93, 0], [1.2, 0], [0.87, 0]])
    unsafe, margin, minority = proco.caution_shares(model, load_cost("DoubleIntegrator"), state, torch.zeros(5, 1), 0.05)
    assert (unsafe, margin, minority) == pytest.approx((4 / 5, 2 / 4, 3 / 4))


def test_object_slices_follow_the_layout_of_the_state():
    task = get_task("CarButton2")
    state = torch.arange(float(task.state_dim))
    pairs = state[len(task.sensors):].view(-1, 2)
    for mine, lidar in zip(proco.object_slices(task), task.lidars):
        assert torch.equal(pairs[mine].flatten(), state[lidar.at:lidar.at + 2 * lidar.count])


# =====================================================================================================================
# 4. Counterfactual roll-outs
# =====================================================================================================================


class Exact:
    """The double integrator itself in the place of a learnt model."""

    task, elites, limit, kinds = dataclasses.replace(DI, repeat=1), torch.zeros(1, dtype=torch.long), torch.tensor(math.inf), 0
    foreseen = staticmethod(lambda state: torch.ones(len(state), dtype=torch.bool))

    def step(self, state, action, hidden=None):
        v = (state[:, 1] + 0.1 * action[:, 0]).clamp(-2, 2)
        return torch.stack([state[:, 0] + 0.1 * v, v], -1)[None]

    def hold(self, state, action, steps):
        for _ in range(steps):
            state = self.step(state, action)[0]
        return state


@pytest.fixture(scope="session")
def newborn():
    torch.manual_seed(3)
    return proco.Agent(DI, small())


def roll(agent, starts, model=None, margin=0.0, seed=0, **changes):
    return proco.counterfactual_rollouts(model or Exact(), load_cost("DoubleIntegrator"), agent, starts,
                                         small(**changes), margin, gen(seed))


def starts(count=100, low=-1.0, high=0.95):
    rng = np.random.default_rng(1)
    return torch.tensor(np.stack([rng.uniform(low, high, count), rng.uniform(-0.5, 2, count)], -1), dtype=torch.float32)


def test_roll_outs_follow_the_model_and_are_labelled_by_the_predicate(newborn):
    margin = 0.05
    rows = roll(newborn, starts(), margin=margin, horizon=15)
    count = len(rows["state"])
    assert {key: rows[key].shape for key in ("state", "action", "next_state", "cost", "risky")} == dict(
        state=(count, 2), action=(count, 1), next_state=(count, 2), cost=(count, 1), risky=(count,))
    assert all(len(value) == count for value in rows.values()) and 500 < count <= 100 * 15
    assert torch.allclose(rows["next_state"], Exact().step(rows["state"], rows["action"])[0])
    assert torch.equal(rows["cost"][:, 0], (rows["next_state"][:, 0] + margin >= 1).float())
    assert rows["action"].abs().max() <= 1 and rows["action"].std() > 0.3
    assert 0.05 < rows["cost"].mean() < 0.8                                     # unsafe samples and safe ones


def test_risky_rows_are_those_at_or_shortly_before_a_violation(newborn):
    rows = roll(newborn, starts(), horizon=25)
    at = {tuple(s): k for k, s in enumerate(rows["state"].tolist())}            # the next row starts where one ended
    after = [at.get(tuple(s)) for s in rows["next_state"].tolist()]
    truth = []
    for k in range(len(after)):
        hit, steps = False, 0
        while k is not None and steps <= proco.RISKY:
            hit |= rows["cost"][k] > 0
            k, steps = after[k], steps + 1
        truth.append(bool(hit))
    assert rows["risky"].tolist() == truth and 0.1 < np.mean(truth) < 0.9


def test_roll_outs_linger_in_danger_and_then_end(newborn):
    inside, horizon = torch.tensor([[50.0, 0.0]]).repeat(20, 1), 30
    rows = roll(newborn, inside, horizon=horizon)
    assert rows["cost"].all() and rows["risky"].all()
    assert proco.LINGER <= len(rows["cost"]) / 20 <= proco.LINGER + 1 < horizon
    outside = roll(newborn, -inside, horizon=horizon)
    assert len(outside["cost"]) == 20 * horizon and not outside["cost"].any() and not outside["risky"].any()


def test_roll_outs_end_where_the_members_differ_too_much(newborn):
    class Unsure(Exact):
        elites, limit = torch.zeros(2, dtype=torch.long), torch.tensor(0.3)
        step = lambda self, state, action, hidden=None: Exact.step(self, state, action).expand(2, -1, -1)
        disagreement = lambda self, nexts: nexts[0, :, 0]                       # sure of itself only left of 0.3
    rows = roll(newborn, starts(), Unsure(), horizon=12)
    assert rows["next_state"][:, 0].max() <= 0.3 and 0 < len(rows["cost"]) < 1200


def test_a_decision_in_a_roll_out_lasts_some_steps_of_the_model(newborn):
    """Each row is one action held for three steps, labelled at each, and ends where those three steps lead."""
    class Slow(Exact):
        task = dataclasses.replace(DI, repeat=3)
    rows = roll(newborn, starts(), Slow(), horizon=12)
    assert rows["cost"].shape == (len(rows["state"]), 3) and 200 < len(rows["state"]) <= 400
    state = rows["state"]
    for j in range(3):
        state = Exact().step(state, rows["action"])[0]
        assert torch.equal(rows["cost"][:, j], (state[:, 0] >= 1).float())
    assert torch.allclose(state, rows["next_state"])


def test_roll_outs_end_where_something_will_be_redrawn(newborn):
    class Goal(Exact):
        foreseen = staticmethod(lambda state: state[:, 0] < 0.5)
    rows = roll(newborn, starts(), Goal(), horizon=12)
    assert 0 < len(rows["state"]) and rows["next_state"][:, 0].max() < 0.5


def test_redrawn_tells_a_jump_from_a_drive():
    task = get_task("PointGoal1")
    state = spread_out(task, np.random.default_rng(2), 4)
    after = state.clone()
    goal, hazards = (lidar.at for lidar in task.lidars[:2])
    state[:, goal:goal + 2], state[:, hazards:hazards + 2] = torch.tensor([0.4, 0.0]), torch.tensor([0.0, 0.3])
    after[:, goal:goal + 2] = torch.tensor([[0.36, 0.0], [1.9, 0.3], [0.4, 0.0], [0.16, 0.0]])
    after[:, hazards:hazards + 2] = torch.tensor([[0.0, 0.3], [0.0, 0.3], [0.0, 0.5], [0.0, 0.32]])
    assert proco.redrawn(state, after, task)[:, :2].tolist() == [[False, False], [True, False], [False, True], [True, False]]
    assert proco.nearest(state, task)[:, :2].tolist() == [[pytest.approx(0.4), pytest.approx(0.3)]] * 4


def test_the_model_learns_what_moves_by_itself():
    """Gremlins go 7 mm a step in any direction, all else stays where it is."""
    task, rng = get_task("PointButton1"), np.random.default_rng(11)
    state = spread_out(task, rng, 2000)
    state[:, :3] = 0                                                            # the agent stands
    after, gremlins = state.clone(), task.lidars[-1].at
    turn = torch.tensor(rng.uniform(0, 2 * math.pi, (2000, 4)), dtype=torch.float32)
    after[:, gremlins:] += 0.007 * torch.stack([turn.cos(), turn.sin()], -1).flatten(1)
    episode = torch.arange(2000) // 100
    data = dict(state=state, next_state=after, action=torch.tensor(rng.uniform(-1, 1, (2000, 2)), dtype=torch.float32),
                episode=episode, held_out=episode >= 18)
    torch.manual_seed(0)
    model = proco.train_dynamics(data, task, small(hidden=64, model_epochs=15, scale=1.0), gen(3))
    assert model.drift[:3].tolist() == [0, 0, 0] and model.drift[3] == pytest.approx(0.007, rel=0.1)


def test_hidden_motion_moves_only_what_no_observation_foretells():
    task = get_task("PointButton1")
    model = still(task)
    model.drift[-1] = 0.01                                                      # gremlins come last
    state = spread_out(task, np.random.default_rng(3), 6)
    hidden = torch.ones(6, 4, 2)
    still_there, moved = model.step(state, torch.zeros(6, 2))[0], model.step(state, torch.zeros(6, 2), hidden)[0]
    at = task.lidars[-1].at
    assert torch.allclose(still_there[:, :at], moved[:, :at], atol=1e-6)
    seen = state[:, at:].unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1) < 2.99
    gap = (moved - still_there)[:, at:][seen]
    assert len(gap) > 20 and gap.median() == pytest.approx(0.01, rel=0.1)      # one of them changed its place in the order


def test_displaced_starts_are_the_same_scene_from_beside():
    task, count = get_task("PointGoal1"), 200
    state = spread_out(task, np.random.default_rng(9), count)
    last = task.lidars[1].at + 8
    state[:, last:last + 2] = torch.tensor([3.0, 0])                            # one hazard out of reach
    out = proco.displaced(state.clone(), task, gen())
    assert out.shape == state.shape and torch.equal(out, proco.displaced(state.clone(), task, gen()))
    assert torch.equal(out[:, 3:5], state[:, 3:5])                              # the compass stays
    goal = task.lidars[0].at
    shift = out[:, goal:goal + 2] - state[:, goal:goal + 2]                     # there is one goal: it tells the shift
    assert shift.norm(dim=-1).max() <= 0.5 + 1e-5 and shift.std(0).min() > 0.1
    moved = state.clone()
    for at in range(5, task.state_dim, 2):
        moved[:, at:at + 2] += shift * (state[:, at:at + 2].norm(dim=-1, keepdim=True) < 2.999)
    assert torch.allclose(proco.nearest_first(moved, task)[:, 5:], out[:, 5:], atol=1e-5)


def test_roll_outs_repeat_themselves_under_the_same_generator(newborn):
    one, two, other = roll(newborn, starts()), roll(newborn, starts()), roll(newborn, starts(), seed=1)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["action"][:100], other["action"][:100])


def test_some_roll_outs_seek_what_the_feasibility_value_fears(newborn):
    agent = proco.copy.deepcopy(newborn)
    agent.danger = lambda state, actions: actions.repeat(1, 1, 2)               # it fears thrust
    first = roll(agent, starts(), horizon=1)["action"][:, 0]
    agent.danger = lambda state, actions: -actions.repeat(1, 1, 2)              # it fears braking
    second = roll(agent, starts(), horizon=1)["action"][:, 0]
    assert ((first == 1) & (second == -1)).sum() >= 10 and ((first == -1) & (second == 1)).sum() >= 10


# =====================================================================================================================
# 5. Feasibility
# =====================================================================================================================


def test_a_step_down_is_torchs_adam_and_leaves_other_networks_alone():
    """The same numbers as torch.optim.Adam's fused form, to the bit, with a rate that changes on the way."""
    torch.manual_seed(0)
    mine, other = proco.Mlp([3, 16, 2], 2), proco.Mlp([2, 4, 1])
    theirs, kept = copy.deepcopy(mine), copy.deepcopy(other.state_dict())
    optimiser, reference = proco.adam(mine, rate=1e-2), torch.optim.Adam(theirs.parameters(), 1e-2, fused=True)
    for step in range(20):
        x, rate = torch.randn(32, 3), 1e-2 / (1 + step)
        optimiser.rate = reference.param_groups[0]["lr"] = rate
        proco.descend(optimiser, other(mine(x)[0])[0].square().mean() + mine(x)[1].square().mean())
        reference.zero_grad()
        (other(theirs(x)[0])[0].square().mean() + theirs(x)[1].square().mean()).backward()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())
    assert all(param.grad is None for param in mine.parameters()) and float(optimiser.step) == 20


def test_the_feasibility_values_settle_at_their_closed_form():
    """A chain 4 -> 3 -> 2 -> 1 -> 0 into a trap, a safe place, a place where the sign of the action decides between
    them, and one that grazes danger once and is safe thereafter. V_f = gamma_f^k, k steps before the trap; Q_c sums.
    From one place chance leads to those which no other leads to, as V learns where steps end."""
    trap, safe, choice, graze, chance, gamma_f = 0, 5, 6, 7, 8, 0.8
    task = proco.Task("Chain", 9, 1, 9, 1.0, tuple(range(9)))
    rng = np.random.default_rng(0)
    at, action = rng.integers(0, 9, 900), rng.uniform(-1, 1, 900).astype(np.float32)
    after = np.select([at == trap, at <= 4, at == choice, at == chance],
                      [trap, at - 1, np.where(action > 0, safe, trap), rng.choice([4, choice, graze], 900)], safe)
    cost = torch.tensor(((after == trap) | (at == graze)).astype(np.float32))
    eye = torch.eye(9)
    state, next_state, act = eye[at], eye[after], torch.tensor(action[:, None])
    torch.manual_seed(1)
    agent = proco.Agent(task, small(hidden=48), dict(state=state))
    optimiser, generator = proco.adam(agent.q_s, agent.v_s, rate=3e-3), gen(0)
    for step in range(1500):
        optimiser.rate = 3e-3 * min(1, 2 * (1 - step / 1500))
        rows = torch.randint(900, (128,), generator=generator)
        proco.descend(optimiser, proco.feasibility_loss(agent, agent.features(state[rows]), act[rows],
                                                        agent.features(next_state[rows]), cost[rows, None], gamma_f, generator))
    v_f = agent.feasibility(eye.numpy())
    assert v_f[:5] == pytest.approx([1, 1, gamma_f, gamma_f ** 2, gamma_f ** 3], abs=0.06)
    assert v_f[safe] == pytest.approx(0, abs=0.06) and v_f[choice] < 0.15       # the right action saves it
    q = agent.danger(agent.features(eye[[choice, choice, graze, 1, 3]]), torch.tensor([[0.7], [-0.7], [0.0], [0.0], [0.0]])).detach()
    assert q[:, 0].tolist() == pytest.approx([0, 1, 1, 1, gamma_f ** 2], abs=0.1)
    assert q[2:, 1].tolist() == pytest.approx([1 - gamma_f, 1, gamma_f ** 2], abs=0.1)     # grazing beats staying


def test_a_violation_within_a_decision_is_discounted_by_its_step():
    """Q_f of a decision of four steps that hits at the third is gamma_f^2, whatever follows; Q_c sums what it costs."""
    agent = proco.Agent(DI, small())
    agent.v_s = Known(lambda a: 0 * a + 0.5, lambda a: 0 * a + 0.1)
    state, cost, gamma_f = torch.zeros(8, 2), torch.tensor([[0.0, 0, 1, 1]]).repeat(8, 1), 0.9
    q_f = gamma_f ** 2
    q_c = (1 - gamma_f) * (gamma_f ** 2 + gamma_f ** 3) / (1 - gamma_f ** 4)    # for ever: what follows is the same again

    def loss(f, c):
        agent.q_s = Known(lambda a: 0 * a + f, lambda a: 0 * a + c, members=2)
        return float(proco.feasibility_loss(agent, state, torch.zeros(8, 1), state, cost, gamma_f, gen()))
    rest = (0.5 - q_f) ** 2 / 2 + (0.1 - q_c) ** 2 / 2                          # V is away from its own target
    assert loss(q_f, q_c) == pytest.approx(rest, abs=1e-6) and loss(q_f + 0.1, q_c) > rest + 0.005


def test_decisions_are_stretches_within_an_episode():
    task = dataclasses.replace(DI, repeat=3)
    data = dict(state=torch.arange(14.0).view(7, 2), next_state=torch.arange(14.0).view(7, 2) + 2,
                action=torch.arange(7.0)[:, None] / 10, reward=torch.tensor([1.0, 2, 4, 8, 16, 32, 64]),
                done=torch.tensor([0.0, 0, 0, 1, 0, 0, 0]), episode=torch.tensor([0, 0, 0, 0, 1, 1, 1]),
                danger=torch.tensor([0.5, 0.4, 0.03, 0.5, 0.5, 0.5, 0.5]))
    out = proco.decisions(data, task, 0.5, 0.1)
    assert out["state"][:, 0].tolist() == [0, 2, 8] and out["next_state"][:, 0].tolist() == [6, 8, 14]
    assert out["action"][:, 0].tolist() == pytest.approx([0.1, 0.2, 0.5])
    assert out["reward"].tolist() == [1 + 1 + 1, 2 + 2 + 2, 16 + 16 + 16] and out["done"].tolist() == [0, 1, 0]
    assert out["cost"].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]] and out["danger"].tolist() == pytest.approx([0.03, 0.03, 0.5])


@pytest.mark.parametrize("size", [1, 2, 8])
def test_candidates_hold_the_proposal_and_corners_within_the_box(size):
    proposal = torch.rand(5, size) * 2 - 1
    options = proco.candidate_actions(proposal, 16, gen())
    assert options.shape == (16, 5, size) and options.abs().max() <= 1
    assert (options == proposal).all(-1).any(0).all()
    corners = {tuple(o) for o in options[:, 0].tolist() if all(abs(x) == 1 for x in o)}
    assert len(corners) >= min(2 ** size, 4)
    assert torch.equal(options, proco.candidate_actions(proposal, 16, gen()))
    assert (options - proposal).abs().flatten(1).amax(1).gt(0.05).sum() >= 8    # and they are spread


def watchful(q_f, q_c, **changes):
    """An agent on a plane whose safety values are given functions of the action."""
    torch.manual_seed(0)
    agent = proco.Agent(proco.Task("Plane", 2, 2, 9, 1.0, (0, 1)), small(**changes))
    agent.danger = lambda state, actions: torch.stack([q_f(actions), q_c(actions)], -1)
    return agent


def test_choose_takes_the_nearest_feasible_candidate():
    agent = watchful(lambda a: 1 - (a[..., 0] > 0.5).float(), lambda a: a[..., 0])
    state = torch.randn(30, 2)
    agent.propose = lambda state: torch.tensor([0.1, 0.2]).expand(30, 2)
    options, chosen = proco.candidate_actions(agent.propose(agent.features(state)), agent.candidates, gen(4)), agent.choose(state, gen(4))
    for row in range(30):
        fine = [o for o in options[:, row].tolist() if o[0] > 0.5]
        assert chosen[row].tolist() == min(fine, key=lambda o: (o[0] - 0.1) ** 2 + (o[1] - 0.2) ** 2)
    agent.danger = lambda state, actions: torch.zeros(*actions.shape[:-1], 2)
    assert torch.equal(agent.choose(state), agent.propose(agent.features(state)))   # a feasible proposal is taken as it is


def test_choose_takes_the_least_cost_where_nothing_is_feasible():
    agent = watchful(lambda a: torch.ones_like(a[..., 0]), lambda a: (a[..., 0] - 0.3) ** 2 + a[..., 1] ** 2)
    state = torch.randn(20, 2)
    options, chosen = proco.candidate_actions(agent.propose(agent.features(state)), agent.candidates, gen(4)), agent.choose(state, gen(4))
    for row in range(20):
        assert chosen[row].tolist() == min(options[:, row].tolist(), key=lambda o: (o[0] - 0.3) ** 2 + o[1] ** 2)


def judges(q_r=None, q_s=None, v_s=None):
    """An agent whose critics say what they are told of two states: q_r and q_s of (action (B,)), v_s (B, 2)."""
    twins = lambda f: lambda inputs: f(inputs[:, -1]).expand(2, -1, -1)
    return SimpleNamespace(eps=0.5, log_lam=torch.tensor(2.0).log(), q_scale=torch.tensor(3.0), q_r=twins(q_r) if q_r
                           else None, q_s=twins(q_s), v_s=lambda x: None if v_s is None else torch.tensor([v_s]))


def test_the_lagrangian_pays_lambda_for_a_violation_where_safety_can_be_kept_and_q_c_where_not():
    agent = judges(q_s=lambda a: torch.stack([0.7 + 0 * a, 0.25 + 0 * a], -1), v_s=[[0.4, 0.0], [0.9, 0.0]])
    loss, violation = proco.lagrangian_loss(agent, torch.zeros(2, 3), torch.zeros(2, 1), torch.tensor([0.3, -9.0]))
    assert float(loss) == pytest.approx((0.3 + 2 * 0.2 + 20 * 0.25) / 2) and float(violation) == pytest.approx(0.2)


def test_fisor_weighs_the_driver_by_his_advantage_and_the_way_back_by_its_cost():
    agent = judges(q_r=lambda a: 2 * a[:, None], q_s=lambda a: torch.stack([0.1 + 0 * a, 0.4 + 0 * a], -1),
                   v_s=[[0.4, 0.0], [0.9, 0.3]])
    rows = dict(x=torch.zeros(2, 3), driver=torch.tensor([[0.5], [0.5]]), action=torch.tensor([[0.5], [1.0]]))
    loss, violation = proco.fisor_loss(agent, rows, torch.zeros(2, 1), torch.tensor([0.25, 0.25]))
    assert violation is None and float(loss) == pytest.approx((math.e * 0.25 + math.exp(-2) * 1) / 2, rel=1e-5)
    agent = judges(q_r=lambda a: 2 * a[:, None], q_s=lambda a: torch.stack([0.6 + 0 * a, 0.4 + 0 * a], -1),
                   v_s=[[0.4, 0.0], [0.9, 0.3]])                                # what the driver did is infeasible
    assert float(proco.fisor_loss(agent, rows, torch.zeros(2, 1), torch.tensor([0.25, 0.25]))[0]) == pytest.approx(
        math.exp(-2) / 2, rel=1e-5)


def test_cpq_earns_only_where_q_c_is_within_its_limit():
    agent = judges(q_s=lambda a: torch.stack([0 * a, a], -1))
    pi, cfg = torch.tensor([[proco.CPQ_LIMIT - 0.01], [proco.CPQ_LIMIT + 0.01]]), small(bc_weight=1.5)
    loss, _ = proco.cpq_loss(agent, torch.zeros(2, 3), pi, torch.tensor([-7.0, -7.0]), torch.tensor([0.2, 0.2]), cfg)
    assert float(loss) == pytest.approx((-7 + 2 * 1.5 * 0.2) / 2)


@pytest.mark.parametrize("changes", [dict(candidates=0), dict(method="bc"), dict(method="td3bc")])
def test_without_the_filter_the_proposal_is_the_action(changes):
    agent = watchful(lambda a: torch.ones_like(a[..., 0]), lambda a: a[..., 0], **changes)
    state = torch.randn(9, 2)
    assert torch.equal(agent.choose(state), agent.propose(agent.features(state)))


def far_sighted(q_r, clone=0.0, v_f=None, **changes):
    """An agent of the double integrator that knows which states are doomed and what an end is worth, q_r(state); its
    cloned policy always does the same."""
    torch.manual_seed(0)
    agent = proco.Agent(Exact.task, small(candidates=32, **changes))
    doomed = lambda state: torch.as_tensor(proco.double_integrator_doomed(*state.numpy().T)).float()
    agent.features, agent.propose = lambda state: state, lambda state: 0 * state[..., :1]
    agent.danger = lambda state, actions: torch.zeros(*actions.shape[:-1], 2)
    agent.__dict__.update(v_s=v_f or (lambda state: doomed(state)[None, :, None]),              # before its modules
                          clone=lambda state: (0 * state[..., :1] + math.atanh(clone))[None],
                          q_r=lambda inputs: q_r(inputs[:, :2])[None, :, None].expand(2, -1, -1))
    return agent


def test_look_ahead_takes_what_earns_most_and_never_what_is_doomed():
    agent, state = far_sighted(lambda s: 100 * s[:, 0]), torch.tensor([[-1.0, 0.0], [-5.0, 1.5], [0.5, 0.0]])
    for step in range(80):
        state = Exact().step(state, agent.imagine(Exact(), state))[0]
        assert (state[:, 0] < 1).all()
        assert step != 3 or (state[:2, 1] > torch.tensor([0.3, 1.8])).all()     # full speed ahead while there is room
    assert (state[:, 0] > 0.8).all()                                            # and a stop close to the wall


def test_look_ahead_stays_with_the_cloned_policy_where_nothing_is_to_be_won():
    agent = far_sighted(lambda s: 0 * s[:, 0], clone=-0.999)
    assert (agent.imagine(Exact(), torch.tensor([[-1.0, 0.0], [-5.0, 1.5]])) < -0.8).all()
    agent.q_scale.fill_(1e9)                    # a value is worth what it is beside the mean |Q_r|
    agent.__dict__["q_r"] = far_sighted(lambda s: 100 * s[:, 0]).q_r
    assert (agent.imagine(Exact(), torch.tensor([[-1.0, 0.0]])) < -0.8).all()


def test_look_ahead_heeds_both_safety_values():
    def mark(agent):                                                            # what the filter alone would do: 0.123
        judged = agent.filtered
        agent.filtered = lambda x, generator: (torch.full((len(x), 1), 0.123), *judged(x, generator)[1:])
    agent, state = far_sighted(lambda s: 0 * s[:, 0], v_f=lambda state: torch.ones(1, len(state), 2)), torch.randn(9, 2)
    mark(agent)
    assert (agent.imagine(Exact(), state) == 0.123).all()                       # no plan is left: the filter decides
    agent = far_sighted(lambda s: 100 * s[:, 0])
    agent.danger = lambda state, actions: (actions > -0.5).float().expand(*actions.shape[:-1], 2)
    assert (agent.imagine(Exact(), torch.tensor([[-5.0, 0.0]])) <= -0.5).all()
    state, held = torch.tensor([[-5.0, 0.0], [0.5, 0.0], [-4.0, 1.0]]), []
    agent.danger = lambda state, actions: (state[:, :1] > 0).float().expand(*actions.shape[:-1], 2)
    mark(agent)
    model = Exact()
    model.hold = lambda state, *rest: (held.append(state), Exact().hold(state, *rest))[1]
    alone, both = agent.imagine(Exact(), state[::2]), agent.imagine(model, state)
    assert both[1] == 0.123 and torch.equal(both[::2], alone)                   # what is lost is not planned for,
    assert held and all((there[:, 0] < 0.4).all() for there in held[:1])        # what is not is planned for as ever


def test_look_ahead_drives_plans_that_begin_alike_as_one():
    agent, model, rows = far_sighted(lambda s: 100 * s[:, 0]), Exact(), []
    model.hold = lambda state, *rest: (rows.append(len(state)), Exact().hold(state, *rest))[1]
    agent.imagine(model, torch.tensor([[-5.0, 0.0], [-6.0, 0.0]]))              # no plan of a second is doomed here
    assert rows[:2] == [64, 64] and rows == sorted(rows)                        # 32 candidates each, all held for two
    assert rows[-1] == 2 * (32 + 32 + 16)                                       # in the end all have parted


def test_look_ahead_stops_where_the_model_can_not_foresee():
    """Behind x = 0 something is redrawn: what an end is worth there does not count, what the last place before is does."""
    agent, model = far_sighted(lambda s: torch.where(s[:, 0] > 0, 1e4, -s[:, 0])), Exact()
    agent.__dict__["v_s"] = lambda state: torch.zeros(1, len(state), 2)
    model.foreseen = lambda state: state[:, 0] < 0
    assert (agent.imagine(model, torch.tensor([[-0.5, 0.0], [-0.3, 0.0]])) < 0.5).all()
    model.foreseen = lambda state: state[:, 0] < 9
    assert (agent.imagine(model, torch.tensor([[-0.15, 0.0]])) > 0.2).all()


def test_holding_an_action_is_stepping_the_best_elite():
    torch.manual_seed(0)
    task = get_task("PointButton1")
    model = proco.Dynamics(task, 4, 16)
    model.elites, model.low, model.high = torch.tensor([2, 0, 3]), -torch.ones(5), torch.ones(5)
    model.change, model.shift = 0.1 * torch.ones(5), 0.1 * torch.ones(4)
    state = proco.nearest_first(torch.rand(20, task.state_dim) * 2 - 1, task)
    state[:, task.lidars[1].at:task.lidars[1].at + 2] = torch.tensor([3.0, 0.0])               # an unseen goal
    action, stepped = torch.rand(20, 2) * 2 - 1, state
    for _ in range(5):
        stepped = model.step(stepped, action)[0]
    assert torch.allclose(model.hold(state, action, 5), stepped, atol=1e-5)
    assert (stepped - state).abs().max() > 0.05


def test_danger_is_the_graver_of_the_twins(newborn):
    state, actions = torch.randn(6, 2), torch.rand(4, 6, 1) * 2 - 1
    out = newborn.danger(newborn.features(state), actions)
    assert out.shape == (4, 6, 2)
    twins = newborn.q_s(torch.cat([newborn.features(state), actions[2]], -1))
    assert torch.allclose(out[2], torch.maximum(twins[0], twins[1]), atol=1e-6)
    assert torch.allclose(newborn.danger(newborn.features(state), actions[1]), out[1], atol=1e-6)


# =====================================================================================================================
# 6. Policy
# =====================================================================================================================


class Known(torch.nn.Module):
    """A network that is a formula of the last input, the action: out (members, B, columns)."""

    def __init__(self, *columns, members=1):
        super().__init__()
        self.columns, self.members = columns, members

    def forward(self, x, members=slice(None)):
        x = x.expand(len(range(self.members)[members]), *x.shape[-2:])
        return torch.stack([column(x[..., -1]) for column in self.columns], -1)


def pushed(method="proco", q_r=lambda a: 0 * a + 1, q_f=lambda a: 0 * a, q_c=lambda a: 0 * a, v_f=0.0, lam=1.0,
           data=None, **changes):
    """Which way one step of descent on the actor's loss moves its action: > 0 is up. Every value is a formula of a."""
    cfg = small(method=method, **changes)
    torch.manual_seed(0)
    agent = proco.Agent(DI, cfg)
    agent.q_r, agent.q_s = Known(q_r, members=2), Known(q_f, q_c, members=2)
    agent.v_s = Known(lambda a: 0 * a + v_f, lambda a: 0 * a + v_f)
    agent.log_lam.fill_(math.log(lam))
    state = torch.randn(64, 2)
    action = agent.propose(agent.features(state)).detach() if data is None else torch.full((64, 1), data)
    rows = dict(x=agent.features(state), action=action, next_x=agent.features(state), cost=torch.zeros(64, 1))
    agent.clone.load_state_dict(agent.actor.state_dict())
    x = torch.randn(64, 2)
    cf = dict(rows, x=x, action=torch.rand(64, 1) * 2 - 1, driver=agent.propose(x).detach()) if cfg.counterfactual else None
    loss = proco.actor_loss(agent, proco.with_counterfactuals(rows, cf), cfg)[0]
    loss.backward()
    return -float(agent.actor.biases[-1].grad.sum())


def test_the_actor_is_pushed_the_right_way():
    up, down = (lambda a: a + 3), (lambda a: 3 - a)
    assert pushed("td3bc", data=1.0) > 0 > pushed("td3bc", data=-1.0)           # towards the data
    assert pushed("td3bc", q_r=up) > 0 > pushed("td3bc", q_r=down)              # towards reward
    assert pushed(q_r=up) > 0 > pushed(q_r=down)
    assert pushed(data=1.0) > 0 > pushed(data=-1.0)
    feared = lambda a: 0.8 + 0.3 * a                                            # Q_f rises with the action, past eps
    assert pushed(q_f=feared, lam=5.0) < 0                                      # feasible: away from what Q_f fears
    assert pushed(q_f=feared, lam=10.0) < 1.5 * pushed(q_f=feared, lam=5.0)     # the harder, the higher lambda
    assert pushed(q_r=up, q_f=feared, lam=100.0) < 0                            # at any reward, if lambda is high
    assert pushed(q_c=lambda a: a, v_f=1.0) < 0 < pushed(q_c=lambda a: -a, v_f=1.0)         # infeasible: the way back
    assert pushed(q_r=up, q_c=lambda a: 0.3 * a, v_f=1.0) < 0                   # whatever it earns
    assert pushed(q_r=up, q_c=lambda a: 0.3 * a, v_f=0.0) > 0                   # where feasible, Q_c says nothing


def test_fisor_regresses_on_what_is_feasible_and_better_and_back_to_safety():
    up = lambda a: a + 3
    assert pushed("fisor", data=0.9) > 0 > pushed("fisor", data=-0.9)           # towards the data
    assert pushed("fisor", q_r=up, data=0.9) > 1.5 * pushed("fisor", data=0.9)  # the harder, the more they earn
    assert 0 > pushed("fisor", q_r=up, data=-0.9) > pushed("fisor", data=-0.9) / 1.5
    assert pushed("fisor", q_f=lambda a: (a > 0.5).float(), data=0.9) == 0      # not where they are infeasible
    steep = [pushed("fisor", q_c=lambda a: c - 0.2 * a, v_f=1.0, data=0.9) for c in (1.08, 1.18)]
    assert steep[0] > 2 * steep[1] > 0                                          # infeasible: the less cost ahead, the more


def test_cpq_earns_only_where_little_cost_is_ahead():
    up = lambda a: a + 3
    assert pushed("cpq", q_r=up) > 0 == pushed("cpq", q_r=up, q_c=lambda a: 0 * a + 2 * proco.CPQ_LIMIT)
    assert pushed("cpq", q_c=lambda a: 0 * a + 1, data=1.0) > 0                 # cloning goes on
    agent, row = proco.Agent(DI, small()), torch.zeros(16, 2)
    agent.q_r = Known(lambda a: 0 * a, members=2)
    agent.q_r_slow = Known(lambda a: 0 * a + 2, members=2)
    for q_c, target in ((0.5, 0.5), (0.0, 0.5 + 0.9 * 2)):                      # what follows a dangerous action is worth 0
        agent.q_s = Known(lambda a: 0 * a, lambda a: 0 * a + q_c, members=2)
        loss = proco.reward_critic_loss(agent, row, row[:, :1], row[:, 0] + 0.5, row, row[:, 0], 0.9, gen(), proco.CPQ_LIMIT)
        assert float(loss) == pytest.approx(2 * target ** 2)


def test_cpqs_penalty_raises_the_cost_of_actions_nobody_takes():
    agent, state, driver = proco.Agent(DI, small()), torch.zeros(4000, 2), torch.full((4000, 1), -0.5)
    for q_c, share in ((0.0, 0.25), (0.5, 0.125), (1.0, 0.0), (2.0, 0.0)):      # a quarter of [-1, 1] is farther than 1
        agent.q_s = Known(lambda a: 0 * a, lambda a: 0 * a + q_c, members=2)
        assert float(proco.penalty(agent, state, driver, gen())) == pytest.approx(0.1 * share, abs=0.003)


def test_proco_adds_counterfactual_rows_and_leaves_an_algorithm_as_it_is_without():
    rows = dict(x=torch.randn(8, 2), action=torch.rand(8, 1), next_x=torch.randn(8, 2), cost=torch.zeros(8, 1))
    alone = proco.with_counterfactuals(rows, None)
    assert all(torch.equal(alone[key], rows[key]) for key in rows)
    assert torch.equal(alone["driver"], rows["action"]) and alone["trust"].tolist() == [1] * 8
    cf = dict(x=torch.randn(5, 2), action=torch.rand(5, 1), next_x=torch.randn(5, 2), cost=torch.ones(5, 1),
              driver=torch.rand(5, 1))
    both = proco.with_counterfactuals(rows, cf)
    assert all(torch.equal(both[key], torch.cat([alone[key], cf[key]])) for key in cf)
    assert both["trust"].tolist() == [1] * 8 + [0.5] * 5


def test_what_networks_see_of_rows_is_kept_with_them():
    """D and D_cf hold features of the very states beside them, and D_cf what the cloned policy would do."""
    state = starts(300)
    data = dict(state=state, next_state=state + 0.01, action=torch.rand(300, 1) * 2 - 1, reward=torch.rand(300),
                done=torch.zeros(300), cost=torch.zeros(300), danger=torch.ones(300), episode=torch.arange(300) // 100)
    torch.manual_seed(0)
    learner = proco.Learner(small(rollouts=600), DI, data, load_cost("DoubleIntegrator"), Exact(), 0.0)
    learner.roll_out()
    learner.roll_out()
    for rows in learner.data, learner.cf:
        for key in ("", "next_"):
            assert torch.allclose(rows[key + "x"], learner.agent.features(rows[key + "state"]))
            assert rows[key + "x"].std(0).min() > 0.1
    clone = torch.tanh(learner.agent.clone(learner.cf["x"])[0])
    assert torch.allclose(learner.cf["driver"], clone) and clone.std() > 0.01
    drawn = learner.sample_cf(50)
    assert torch.allclose(drawn["driver"], torch.tanh(learner.agent.clone(drawn["x"])[0])) and len(drawn["cost"]) == 50


@pytest.mark.parametrize("method, works", [("proco", True), ("td3bc-lag", True), ("proco-fisor", True),
                                           ("proco-cpq", True), ("proco", False)])
def test_updates_recorded_as_a_graph_are_the_eager_ones(method, works, monkeypatch, capsys):
    """On a stand-in for CUDA's graphs, which takes back what recording changed, as nothing runs while a GPU records:
    the weights are those of an eager run, each kind of update is recorded once a round, and a failure is told."""
    recorded, learners = [], []

    class Graph:
        def register_generator_state(self, generator):
            if not works:
                raise RuntimeError("not here")
            self.learner = learners[-1]

        def replay(self):
            for known, logs in self.learner.learn(self.policy).items():
                self.logs[known].copy_(logs)

    @contextlib.contextmanager
    def record(graph):
        learner, learn = graph.learner, graph.learner.learn
        before = copy.deepcopy([learner.agent.state_dict(), learner.generator.get_state(), learner.state()["optimisers"]])

        def seen(policy):
            graph.policy, graph.logs = policy, learn(policy)
            recorded.append(policy)
            return graph.logs
        learner.learn = seen
        yield
        del learner.learn
        learner.agent.load_state_dict(before[0])
        learner.generator.set_state(before[1])
        for name, optimiser in learner.optimisers.items():
            optimiser.step, optimiser.mean, optimiser.square = before[2][name]
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(CUDAGraph=Graph, graph=record, Stream=lambda: stream, current_stream=lambda: stream,
                            stream=lambda stream: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)
    state = starts(300)
    data = dict(state=state, next_state=state + 0.01, action=torch.rand(300, 1) * 2 - 1, reward=torch.rand(300),
                done=torch.zeros(300), cost=torch.zeros(300), danger=torch.ones(300), episode=torch.arange(300) // 100)
    logs = []
    for device in ("cpu", "cuda-graphs"):
        torch.manual_seed(0)
        cfg = small(method=method, device=device, rollouts=600, feasibility_updates=30, updates=30, scale=1.0, batch=16)
        learners.append(proco.Learner(cfg, Exact.task, data, load_cost("DoubleIntegrator"), Exact(), 0.0))
        learners[-1].step = learners[-1].clone_updates
        for _ in range(learners[-1].updates):
            logs.append({key: float(value) for key, value in learners[-1].update().items()})
            learners[-1].step += 1
    eager, graphed = learners
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager.agent.state_dict().values(),
                                                              graphed.agent.state_dict().values()))
    half = len(logs) // 2
    assert all(a == pytest.approx(b, rel=1e-3, abs=1e-5) for a, b in zip(logs[:half], logs[half:]))
    assert ("not here" in capsys.readouterr().err) != works
    if not works:
        assert graphed.graphs is None and not recorded
    elif method == "td3bc-lag":                                                 # 30 updates, every second with policy
        assert recorded == [True, False]
    else:                                       # six rounds of 10 updates, of which three train the feasibility alone
        assert recorded == [False] * 3 + [True, False] * 3


@pytest.mark.parametrize("method, algorithm, counterfactual", [
    ("proco", "td3bc-lag", True), ("proco-fisor", "fisor", True), ("proco-cpq", "cpq", True), ("td3bc-lag", "td3bc-lag", False),
    ("fisor", "fisor", False), ("cpq", "cpq", False), ("td3bc", "td3bc", False), ("bc", "bc", False)])
def test_a_methods_name_says_what_it_is_made_of(method, algorithm, counterfactual, tmp_path):
    cfg = small(method=method, out=str(tmp_path), eval_episodes=2)
    assert (cfg.algorithm, cfg.counterfactual) == (algorithm, counterfactual)
    proco.run(cfg)
    saved = proco.load_checkpoint(proco.run_folder(cfg) / "checkpoint.pt")
    assert bool(saved["model"]) == counterfactual == bool(saved["learner"]["snapshots"])
    assert len(list(csv.DictReader(open(proco.run_folder(cfg) / "episodes.csv")))) == 2


def test_an_algorithm_alone_learns_from_the_costs_that_were_recorded():
    data = dict(state=torch.arange(12.0).view(6, 2), next_state=torch.arange(12.0).view(6, 2), action=torch.zeros(6, 1),
                reward=torch.zeros(6), done=torch.zeros(6), episode=torch.zeros(6), cost=torch.tensor([0.0, 0, 3, 0, 0, 0]),
                danger=torch.tensor([1.0, 1, 1, 1, 0, 1]))
    task = dataclasses.replace(DI, repeat=2)
    assert proco.decisions(data, task, 0.9)["cost"].tolist() == [[0, 0], [0, 1], [1, 0], [0, 0], [0, 0]]
    assert proco.decisions(data, task, 0.9, 0.1)["cost"].tolist() == [[0, 0], [0, 0], [0, 0], [0, 1], [1, 0]]


def multiplier(violation, steps=1):
    """lambda before and after some steps of dual ascent at a given mean violation of the constraint."""
    agent = proco.Agent(DI, small())
    before = float(agent.log_lam.exp())
    for _ in range(steps):
        proco.dual_step(agent, torch.tensor(violation))
    return before, float(agent.log_lam.exp())


def test_the_multiplier_rises_while_the_constraint_is_broken():
    before, broken = multiplier(0.2)
    assert broken > before > multiplier(0.0)[1]
    assert multiplier(0.2, 5)[1] > broken and multiplier(0.0, 5)[1] < multiplier(0.0)[1]


def test_the_multiplier_is_bounded():
    high, low = multiplier(1.0, 1000)[1], multiplier(0.0, 6000)[1]
    assert 0 <= low < 1 < high < 1e4 and high == multiplier(1.0, 1010)[1]


@pytest.mark.parametrize("done, target", [(0.0, 0.5 + 0.9 * 2), (1.0, 0.5)])
def test_the_reward_critics_target(done, target):
    """r + gamma times the smaller of the slow twins, and nothing beyond an end."""
    agent = proco.Agent(DI, small())
    slow = Known(lambda a: 0 * a)
    slow.forward = lambda x: torch.stack([torch.full((len(x), 1), 3.0), torch.full((len(x), 1), 2.0)])
    agent.q_r_slow = slow

    def loss(value):
        agent.q_r = Known(lambda a: 0 * a + value, members=2)
        state = torch.randn(16, 2)
        return float(proco.reward_critic_loss(agent, state, torch.zeros(16, 1), torch.full((16,), 0.5), state,
                                              torch.full((16,), done), 0.9, gen()))
    assert loss(target) == pytest.approx(0, abs=1e-9)
    assert loss(target + 0.2) == pytest.approx(loss(target - 0.2), rel=1e-3)
    assert loss(target + 0.2) == pytest.approx(4 * loss(target + 0.1), rel=1e-3) and loss(target + 0.1) > 0.005


# =====================================================================================================================
# 7. Evaluation
# =====================================================================================================================


def test_tables_keep_what_some_rows_lack_empty(tmp_path):
    proco.write_table(tmp_path / "t.csv", [dict(step=1, loss=0.5), dict(step=2, lam=3.0)])
    assert list(csv.DictReader(open(tmp_path / "t.csv"))) == [dict(step="1", loss="0.5", lam=""), dict(step="2", loss="", lam="3.0")]


def test_a_decision_under_way_goes_on_while_it_is_feasible():
    agent = watchful(lambda a: (a[..., 0] > 0.5).float(), lambda a: a[..., 0])
    agent.choose = lambda state: torch.full((len(state), 2), -0.25)
    held = np.float32([[0.4, 0.9], [0.6, 0.9], [-1.0, 0.0]])
    assert agent.act(np.zeros((3, 2)), held).tolist() == np.float32([[0.4, 0.9], [-0.25, -0.25], [-1.0, 0.0]]).tolist()
    assert held[1].tolist() == np.float32([0.6, 0.9]).tolist()                  # what was given stays as it was
    assert (agent.act(np.zeros((3, 2))) == -0.25).all()


@pytest.mark.parametrize("plans, fresh", [(True, [0, 3, 6]), (False, list(range(9)))])
def test_planned_decisions_are_held_for_as_long_as_in_training(plans, fresh, monkeypatch):
    calls = []

    def act(obs, held=None):
        calls.append(held)
        return np.zeros((len(obs), 1), np.float32) + len(calls) / 10 if held is None else held
    agent = SimpleNamespace(task=DI, plans=plans, act=act)
    row = proco.drive(agent, "DoubleIntegrator", [0, 1])[1]
    assert DI.repeat == 3 and [t for t in range(9) if calls[t] is None] == fresh and len(row.actions) == 100
    assert (len({float(a[0]) for a in row.actions[:9]}) == len(fresh)) and (not plans or row.actions[4] == row.actions[3])


def test_whole_hdf5_files_are_told_from_others(tmp_path):
    with h5py.File(tmp_path / "whole.hdf5", "w") as file:
        file["rewards"] = np.zeros(5000)
    (tmp_path / "cut.hdf5").write_bytes((tmp_path / "whole.hdf5").read_bytes()[:-100])
    (tmp_path / "page.hdf5").write_text("<html>moved</html>")
    assert [fetch.is_hdf5(tmp_path / f"{name}.hdf5") for name in ("whole", "cut", "page", "none")] == [True, False, False, False]


def test_recorded_steps_come_from_the_file_or_the_cache_or_not_at_all(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(proco, "CACHE", tmp_path)
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path))
    assert proco.recorded_steps(small()) is None
    path = proco.drive_data("DoubleIntegrator", 3)
    for cfg in (small(), small(data=str(path))):
        obs, action, after = proco.recorded_steps(cfg)
        assert obs.shape == after.shape == (300, 2) and action.shape == (300, 1) and np.array_equal(obs[1], after[0])


def test_interrupts_are_noted_and_then_handled_as_before():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with proco.interruptible() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert asked == [signal.SIGINT, signal.SIGTERM]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_warnings_are_loud_and_kept(capsys):
    proco.WARNINGS.clear()
    proco.warn("other data")
    assert proco.WARNINGS == ["other data"] and "WARNING: other data" in capsys.readouterr().err


def test_bootstrap_intervals():
    rng = np.random.default_rng(1)
    assert (results.resampled(np.full((3, 4, 1), 7.0), rng) == 7).all()                # nothing varies, nothing is uncertain
    values = rng.normal(size=(1, 400, 2)) * [1, 5]
    assert results.resampled(values, rng).std(0) == pytest.approx([1 / 20, 5 / 20], rel=0.15)      # one seed: s / sqrt(n)
    seeds = np.repeat(np.array([0.0, 1, 2, 3])[:, None, None], 50, 1)           # all that varies is the seed
    assert results.resampled(seeds, rng).std() == pytest.approx(seeds.std() / 2, rel=0.1)
    assert results.resampled(seeds, rng).mean() == pytest.approx(1.5, abs=0.1)


COMPARE = ("--compare bc,td3bc --tasks DoubleIntegrator --seeds 2 --scale 0.01 --hidden 16 --eval-episodes 3 --data driver "
           "--driver-episodes 20 --device cpu --out").split()


def test_a_comparison_trains_what_is_missing_and_reads_the_rest(tmp_path, monkeypatch, capsys):
    assert proco.main([*COMPARE, str(tmp_path)]) == 0
    table = (tmp_path / "compare.csv").read_bytes()
    assert (tmp_path / "compare.md").read_text() in capsys.readouterr().out and (tmp_path / "compare.png").stat().st_size > 5000
    rows = list(csv.DictReader(open(tmp_path / "compare.csv")))
    assert [(row["task"], row["method"], row["seeds"]) for row in rows] == [("DoubleIntegrator", "bc", "2"),
                                                                          ("DoubleIntegrator", "td3bc", "2")]
    files = [tmp_path / f"DoubleIntegrator/bc/seed{k}/episodes.csv" for k in (0, 1)]
    episodes = [row for file in files for row in csv.DictReader(open(file))]
    assert float(rows[0]["return"]) == pytest.approx(np.mean([float(row["return"]) for row in episodes]))
    assert float(rows[0]["return_low"]) <= float(rows[0]["return"]) <= float(rows[0]["return_high"])
    assert float(rows[0]["cost_at_10"]) == pytest.approx(float(rows[0]["cost"]) / 10)
    assert [row["seed"] for row in episodes[:3]] == [row["seed"] for row in episodes[3:]]   # the same episodes for all

    run, trained = proco.run, []
    monkeypatch.setattr(proco, "run", lambda cfg, resume: trained.append(cfg) or run(cfg, resume))
    (tmp_path / "DoubleIntegrator/td3bc/seed1/results.json").unlink()           # as if it had been interrupted there
    assert proco.main([*COMPARE, str(tmp_path)]) == 0
    assert [(cfg.method, cfg.seed) for cfg in trained] == [("td3bc", 1)] and (tmp_path / "compare.csv").read_bytes() == table
    assert proco.main([*COMPARE, str(tmp_path), "--hidden", "8"]) == 2
    assert "other settings (hidden)" in capsys.readouterr().err and len(trained) == 1


def test_a_comparison_of_several_tasks_ends_in_their_mean(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "finished_run", lambda cfg: np.full((4, 7), cfg.value))
    rows = proco.compare({(task, "bc"): [SimpleNamespace(out=tmp_path, value=value)] for task, value in (("one", 1), ("two", 3))})
    assert [(row["task"], row["return"]) for row in rows] == [("one", 1), ("two", 3), ("all", 2)]


@pytest.mark.parametrize("name", ["PointGoal1", "CarPush1", "PointCircle1", "CarCircle2", "HopperVelocity", "AntVelocity"])
def test_the_simulators_own_rule_agrees_with_the_predicate(name):
    """They were written apart: one by a language model from a sentence, one from the simulator's source."""
    task, rng = get_task(name), np.random.default_rng(0)
    draw = (lambda: rng.normal(size=(4000, task.obs_dim)) * 2) if "Velocity" in name else \
        lambda: rng.uniform(0, 0.97, (4000, task.obs_dim))
    obs, after = (torch.tensor(draw(), dtype=torch.float32) for _ in range(2))
    if "Circle" in name:
        yaw, place = (torch.tensor(rng.uniform(-math.pi, math.pi, 4000) * k, dtype=torch.float32) for k in (1, 0.6))
        state = torch.zeros(4000, task.state_dim)
        state[:, 3], state[:, 4] = -0.5 * yaw.sin(), -0.5 * yaw.cos()
        x, y = -place, -place.flip(0)                                           # the origin, seen from there
        state[:, 5], state[:, 6] = yaw.cos() * x + yaw.sin() * y, -yaw.sin() * x + yaw.cos() * y
        obs = after = proco.decode(state, task)
    action = torch.zeros(4000, task.act_dim)
    rule, written = (cost(obs, action, after, 0.05) for cost in (proco.oracle_cost(task), load_cost(name)))
    assert 0.02 < rule.mean() < 0.98 and (rule != written).float().mean() < 0.002


@pytest.mark.parametrize("name, raw", [("CarButton1", False), ("PointGoal2", False), ("PointPush2", False), ("PointGoal1", True)])
def test_no_rule_of_the_simulator_where_states_do_not_tell(name, raw, tmp_path, capsys):
    flags = ["--task", name, "--cost", "oracle", "--out", str(tmp_path)] + ["--raw-obs"] * raw
    assert proco.main(flags) == 2 and f"not defined for {name}" in capsys.readouterr().err


def test_without_a_horizon_there_are_no_counterfactuals(tmp_path):
    cfg = small(out=str(tmp_path), horizon=0)
    proco.run(cfg)
    assert proco.load_checkpoint(proco.run_folder(cfg) / "checkpoint.pt")["learner"]["snapshots"] == []


def test_area_under_curve_is_the_chance_of_the_right_order():
    rng = np.random.default_rng(0)
    for scale in (3, 50):                                                       # many ties, few ties
        scores, labels = rng.integers(0, scale, 60).astype(float), rng.random(60) < 0.3
        brute = np.mean([(p > n) + (p == n) / 2 for p in scores[labels] for n in scores[~labels]])
        assert results.area_under_curve(scores, labels) == pytest.approx(brute)
    assert results.area_under_curve(np.array([1.0, 2, 3]), np.array([False, True, True])) == 1


@pytest.mark.parametrize("name, low, high", [("CarButton1", 0.0028926206826067613, 44.420003345738984),
                                             ("PointGoal1", 0.01196012764197707, 30.071114857340543),
                                             ("CarCircle2", 5.113386154174805, 25.950098037719727)])
def test_scores_are_normalised_by_dsrls_numbers(name, low, high):
    if importlib.util.find_spec("dsrl") is None:
        pytest.skip("dsrl is not installed")
    assert results.normalised(name, low, 0.0) == pytest.approx((0, 0))
    assert results.normalised(name, high, 20.0) == pytest.approx((1, 1))
    assert results.normalised(name, (low + high) / 2, 5.0) == pytest.approx((0.5, 0.25))


def test_what_dsrl_does_not_know_is_not_normalised():
    assert results.normalised("DoubleIntegrator", 1.0, 1.0) == (None, None)


def full_throttle(obs):
    return np.ones((len(obs), 1), np.float32)


def test_episodes_in_lockstep_are_episodes_alone():
    act = lambda obs: np.clip(1 - obs[:, :1] - obs[:, 1:], -1, 1)
    together = proco.drive(None, "DoubleIntegrator", [3, 4, 5], act)
    for row in together:
        env = proco.DoubleIntegrator()
        obs, ended, total, cost = env.reset(seed=row.seed)[0], False, 0, 0
        while not ended:
            obs, reward, c, _, ended, _ = env.step(act(obs[None])[0])
            total, cost = total + reward, cost + c
        assert (row.ret, row.cost, row.length) == (pytest.approx(total), cost, 100) and len(row.obs) == 100
    assert len({row.ret for row in together}) == 3
    crash = proco.drive(None, "DoubleIntegrator", [3], full_throttle)[0]
    assert crash.cost == sum(crash.costs) > 50


def test_the_warning_table_on_a_case_counted_by_hand():
    """One violation, at step 10 of 30: eleven steps are outside, of which the last k come within k steps of it."""
    x = np.linspace(0, 0.9, 11).tolist() + [1.2] * 19
    row = SimpleNamespace(obs=np.float32([[v, 0] for v in x]), costs=np.repeat([0, 1], [10, 20]), actions=np.zeros((30, 1)))
    agent = SimpleNamespace(feasibility=lambda obs: obs[:, 0], _state=torch.as_tensor, features=lambda state: state,
                            danger=lambda state, actions: torch.zeros(*actions.shape[:-1], 2))
    for (k, value, gap, taken, share) in results.warning_table(agent, load_cost("DoubleIntegrator"), [row], (1, 5)):
        assert value == gap == 1 and taken == 0.5 and share == pytest.approx(k / 11)
    agent.feasibility, agent.danger = lambda obs: -obs[:, 0], lambda state, actions: state[None].expand(1, -1, 2)
    assert results.warning_table(agent, load_cost("DoubleIntegrator"), [row], (5,))[0][1:4] == (0, 1, 1)


def test_a_run_without_dsrl_says_what_it_lacks(monkeypatch, tmp_path, capsys, cache):
    monkeypatch.setattr(proco, "versions", lambda: dict(results.versions(), dsrl=None))
    told = proco.run(small(method="bc", out=str(tmp_path)))["warnings"]
    assert len(told) == 1 and "dsrl is not installed" in told[0] and told[0] in capsys.readouterr().err


def test_the_forecast_grows_with_what_there_is_to_do(monkeypatch):
    monkeypatch.setattr(results.timeit, "repeat", lambda *work, **often: [0.0018])      # twice as slow as the README's
    seconds = lambda *flags, rows=50_000: results.forecast(proco.parse(["--task", "PointGoal1", *flags])[0],
                                                           get_task("PointGoal1"), rows)
    whole = seconds()
    assert 180 < whole < 300                                                    # it took two minutes there
    for less in (["--scale", "0.1"], ["--method", "td3bc-lag"], ["--method", "bc"], ["--eval-episodes", "0", "--horizon", "0"]):
        assert 0 < seconds(*less) < 0.9 * whole


def test_the_summary_counts_violation_free_episodes():
    rows = [SimpleNamespace(ret=r, cost=c) for r, c in ((1.0, 0), (3.0, 0), (5.0, 4), (7.0, 0))]
    score = results.summary("DoubleIntegrator", rows)
    assert (score["episodes"], score["return_mean"], score["cost_mean"], score["zero_cost_share"]) == (4, 4, 1, 0.75)
    assert score["return_std"] == pytest.approx(math.sqrt(5)) and score["cost_std"] == pytest.approx(math.sqrt(3))


# =====================================================================================================================
# 8. The command line, and whole runs
# =====================================================================================================================


def fails(capsys, *flags):
    """The one line that a failing command says."""
    assert proco.main(list(map(str, flags))) == 2
    out = capsys.readouterr()
    assert out.err.count("\n") == 1 and len(out.err) < 500 and "Traceback" not in out.err
    return out.err


@pytest.mark.parametrize("flags, why", [
    (["--task", "PointGaol1"], "PointGoal1"), (["--task", "DoubleIntegrator", "--method", "magic"], "bc, td3bc"),
    (["--task", "DoubleIntegrator", "--data", "nowhere.hdf5"], "nowhere.hdf5"),
    (["--task", "PointGoal1", "--data", "dsrl"], "PointGoal1"),
    (["--task", "AntVelocity", "--data", "driver"], "AntVelocity"),
    (["--diagnose", "nowhere"], "nowhere"), (["--task", "DoubleIntegrator", "--device", "abacus"], "abacus"),
    (["--write-cost"], "--llm-url")])
def test_expected_failures_say_one_line_and_exit_with_2(flags, why, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert why in fails(capsys, *flags)


@pytest.mark.parametrize("flags", ["--driver-episodes 0", "--driver-episodes 5", "--horizon 0", "--ensemble 0",
                                   "--ensemble 1", "--eps 0", "--gamma-f 1", "--scale nan", "--hidden 1",
                                   "--margin 0", "--candidates 1", "--rollouts 0", "--raw-obs"])
def test_odd_settings_work_or_are_refused_in_one_line(flags, capsys, tmp_path):
    tiny = (f"--task DoubleIntegrator --hidden 16 --batch 16 --ensemble 3 --scale 0.002 --driver-episodes 12 "
            f"--device cpu --eval-episodes 2 --data driver --out {tmp_path}")
    code = proco.main(tiny.split() + flags.split())
    err = capsys.readouterr().err
    assert code == 0 and math.isfinite(json.loads((tmp_path / "DoubleIntegrator/proco/seed0/results.json").read_text())
                                       ["eval"]["return_mean"]) or code == 2 and err.count("\n") == 1


def test_a_gpu_that_is_not_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda" in fails(capsys, "--task", "DoubleIntegrator", "--device", "cuda", "--out", tmp_path)


def test_an_out_that_cannot_be_a_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file" in fails(capsys, "--task", "DoubleIntegrator", "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_program_itself_exits_with_2_and_debug_shows_the_traceback(tmp_path):
    command = [sys.executable, proco.__file__, "--task", "PointGaol1"]
    plain, debug = (subprocess.Popen(command + more, cwd=tmp_path, text=True, stdout=-1, stderr=-1)
                    for more in ([], ["--debug"]))
    out, err = plain.communicate(timeout=120)
    assert plain.returncode == 2 and out == "" and err.count("\n") == 1 and err.startswith("proco: ")
    assert "Traceback" in debug.communicate(timeout=120)[1] and debug.returncode != 0


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as e:
        proco.main(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    for field in dataclasses.fields(proco.Config):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", text, re.M), field.name
        assert " ".join(field.metadata["help"].split()) in " ".join(text.split())
    for flag in ("--resume", "--diagnose", "--write-cost"):
        assert flag in text


def test_flags_become_settings():
    assert proco.parse([])[0] == proco.Config()
    cfg, more = proco.parse("--task CarGoal1 --eval-episodes 7 --scale 0.5 --raw-obs --seed 3 --resume".split())
    assert (cfg.task, cfg.eval_episodes, cfg.scale, cfg.raw_obs, cfg.seed) == ("CarGoal1", 7, 0.5, True, 3)
    assert more.resume and not more.diagnose


def read(folder, name):
    with open(Path(folder) / name, newline="") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=False)["learner"]["agent"]


def same_run(one, two):
    """Bit for bit: every weight, and every evaluation episode."""
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert read(one, "episodes.csv") == read(two, "episodes.csv")


@pytest.fixture(scope="session")
def trained(cache):
    """A whole run in seconds -> its folder and results."""
    keep, proco.CACHE = proco.CACHE, cache
    results = proco.run(small(out=str(cache / "runs")))
    proco.CACHE = keep
    return cache / "runs" / "DoubleIntegrator" / "proco" / "seed0", results


def test_the_report_is_drawn_again(trained, capsys, tmp_path):
    folder, _ = trained
    first = (folder / "report.png").read_bytes()
    (folder / "report.png").unlink()
    assert proco.main(["--report", str(folder)]) == 0 and "report.png" in capsys.readouterr().out
    assert (folder / "report.png").read_bytes()[:8] == first[:8] == b"\x89PNG\r\n\x1a\n" and len(first) > 20_000
    (tmp_path / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes())          # stopped half-way
    assert "no finished run" in fails(capsys, "--report", tmp_path)


def test_paths_are_kept_as_they_were_driven(trained):
    kept, rows = np.load(trained[0] / "paths.npz"), list(csv.DictReader(open(trained[0] / "episodes.csv")))
    assert 1 <= kept["count"] <= len(rows)
    for n in range(kept["count"]):
        x = kept[f"path{n}"][:, 0]
        assert len(x) == int(rows[n]["length"]) and kept[f"costs{n}"].sum() == float(rows[n]["cost"])
        assert (kept[f"costs{n}"] > 0).tolist() == (x >= 1).tolist()
        assert x[-1] - x[0] == pytest.approx(float(rows[n]["return"]), abs=0.25)        # the first step is not in it


@pytest.mark.parametrize("name", ["PointGoal1", "CarPush1"])
def test_from_above_the_lidars_nearest_is_the_nearest(name):
    env, task = proco.make_env(name), get_task(name)
    obs, _ = env.reset(seed=4)
    dangers = proco.dangers(env)
    kinds = {lidar.name: proco.nearest(torch.as_tensor(proco.encode(obs, task)), task)[n].item()
             for n, lidar in enumerate(task.lidars)}
    gaps = np.hypot(*(dangers[:, :2] - proco.place(env)).T)
    assert min(gaps) == pytest.approx(min(kinds[k] for k in ("hazards", "pillars") if k in kinds), abs=1e-3)
    assert set(dangers[:, 2]) <= {0.2, 0.3}


def test_robots_that_run_are_driven_without_a_map():
    row, = proco.drive(None, "HalfCheetahVelocity", [0], lambda obs: np.zeros((len(obs), 6), np.float32))
    assert row.length == 1000 and np.shape(row.path) == (1000, 2) and row.dangers.shape == (0, 3)


def test_a_run_leaves_what_it_promises(trained):
    folder, results = trained
    assert {"config.json", "metrics.csv", "episodes.csv", "results.json", "checkpoint.pt"} <= {
        path.name for path in folder.iterdir()}
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    assert json.loads((folder / "config.json").read_text()) == dataclasses.asdict(small(out=str(folder.parents[2])))
    saved = json.loads((folder / "results.json").read_text())
    assert {"task", "method", "seed", "data", "eval", "timing", "versions", "warnings"} <= set(saved)
    assert {"source", "path", "episodes", "transitions", "unsafe_share", "return_mean"} <= set(saved["data"])
    assert set(saved["eval"]) >= {"episodes", "return_mean", "return_std", "cost_mean", "cost_std", "zero_cost_share",
                                  "normalized_return", "normalized_cost"}
    assert (saved["task"], saved["method"], saved["seed"]) == ("DoubleIntegrator", "proco", 0)
    assert saved["data"]["source"] == "driver" and saved["data"]["transitions"] == 2000
    assert saved["data"]["unsafe_share"] == 0 and saved["versions"]["torch"] == torch.__version__
    assert saved["versions"]["threads"] == torch.get_num_threads() and not saved["warnings"]
    assert {"data", "dynamics", "evaluation", "total"} <= set(saved["timing"])
    assert all(seconds >= 0 for seconds in saved["timing"].values())
    rows = read(folder, "episodes.csv")
    assert list(rows[0]) == ["seed", "return", "cost", "length"]
    assert len({row["seed"] for row in rows}) == len(rows) == 4
    assert np.mean([float(row["return"]) for row in rows]) == pytest.approx(saved["eval"]["return_mean"])
    assert np.mean([float(row["cost"]) for row in rows]) == pytest.approx(saved["eval"]["cost_mean"])
    assert len(read(folder, "metrics.csv")) >= 1


def test_load_run(trained):
    agent, rng = proco.load_run(trained[0]), np.random.default_rng(0)
    obs = rng.normal(0, 1, (50, 2)).astype(np.float32)
    actions, values = agent.act(obs), agent.feasibility(obs)
    assert actions.shape == (50, 1) and actions.dtype == np.float32 and np.abs(actions).max() <= 1
    assert values.shape == (50,) and values.dtype == np.float32 and 0 <= values.min() <= values.max() <= 1
    assert 0 < agent.eps < 1
    assert np.array_equal(agent.act(obs), actions)                              # acting is repeatable
    with pytest.raises(ProcoError, match="nowhere"):
        proco.load_run(trained[0] / "nowhere")


def test_evaluation_gives_every_method_the_same_episodes(trained):
    one, bare = (proco.evaluate(trained[0], "DoubleIntegrator", 5, behaviour=kind) for kind in ("policy", "bare"))
    seeds = [row.seed for row in one]
    assert seeds == sorted(set(seeds)) == [row.seed for row in bare] and len(seeds) == 5
    for a, b in zip(one, bare):
        assert np.array_equal(a.obs[0], b.obs[0])


def test_diagnose_compares_value_and_distance(trained, capsys):
    assert proco.main(["--diagnose", str(trained[0]), "--eval-episodes", "2"]) == 0
    text = capsys.readouterr().out
    for line in ("cloned policy", "bare actor", "sensors", "AUC"):
        assert line in text


def test_the_same_seed_makes_the_same_run(trained, tmp_path):
    proco.run(small(out=str(tmp_path)))
    folder = tmp_path / "DoubleIntegrator" / "proco" / "seed0"
    same_run(trained[0], folder)
    proco.run(small(out=str(tmp_path), seed=1))
    other = weights(folder.parent / "seed1")
    assert any(not torch.equal(value, other[key]) for key, value in weights(folder).items())


@pytest.mark.parametrize("method", ["bc", "td3bc"])
def test_the_other_methods_run(method, tmp_path):
    results = proco.run(small(method=method, out=str(tmp_path)))
    assert results["method"] == method and results["eval"]["episodes"] == 4
    agent = proco.load_run(tmp_path / "DoubleIntegrator" / method / "seed0")
    state = torch.randn(5, 2)
    assert torch.equal(agent.choose(state), agent.propose(agent.features(state)))
    if method == "bc":                                                          # the clone, as it was
        assert torch.equal(agent.actor.weights[0], agent.clone.weights[0])


@pytest.fixture
def signals():
    """What a run does to signal handlers ends with the test."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_run_that_is_asked_to_stop_goes_on_bit_for_bit(trained, tmp_path, monkeypatch, signals):
    update, count = proco.Learner.update, []

    def interrupted(learner):
        count.append(1)
        if len(count) == 61:                                                    # in the midst of an update
            os.kill(os.getpid(), signal.SIGTERM)
        return update(learner)

    with monkeypatch.context() as patch:
        patch.setattr(proco.Learner, "update", interrupted)
        with pytest.raises(ProcoError, match="--resume"):
            proco.run(small(out=str(tmp_path)))
    assert len(count) == 61
    folder = tmp_path / "DoubleIntegrator" / "proco" / "seed0"
    assert not (folder / "results.json").exists()
    with monkeypatch.context() as patch:                                        # the model is not learnt again
        patch.setattr(proco, "train_dynamics", None)
        proco.run(small(out=str(tmp_path)), resume=True)
    same_run(trained[0], folder)
    assert read(trained[0], "metrics.csv")[-1] == read(folder, "metrics.csv")[-1]


@pytest.mark.parametrize("method", ["bc", "proco"])
def test_an_absurd_learning_rate_ends_in_one_sentence(method, tmp_path, monkeypatch):
    adam = proco.adam
    monkeypatch.setattr(proco, "adam", lambda *nets, rate=0: adam(*nets, rate=1e30))
    with pytest.raises(ProcoError, match="no longer finite at update .*lower the learning rates"):
        proco.run(small(out=str(tmp_path), method=method))
    kept = weights(tmp_path / "DoubleIntegrator" / method / "seed0")
    assert all(torch.isfinite(value).all() for value in kept.values())          # the last good state


def test_a_run_that_is_killed_three_times_goes_on_bit_for_bit(trained, cache, tmp_path):
    code = f"""
import os, signal, sys, torch, proco
from pathlib import Path
torch.set_num_threads(1)
update, count = proco.Learner.update, []
def killed(learner):
    count.append(1)
    if len(count) == int(sys.argv[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(learner)
proco.Learner.update = killed
proco.run({small(out=str(tmp_path))!r}, resume=True)
""".replace("run(Config", "run(proco.Config")
    for updates in (30, 7, 51):
        done = python(code.replace("sys.argv[-1]", str(updates)), tmp_path)
        assert done.returncode == -signal.SIGKILL, done.stderr
    proco.run(small(out=str(tmp_path)), resume=True)
    same_run(trained[0], tmp_path / "DoubleIntegrator" / "proco" / "seed0")


def test_a_finished_run_that_is_resumed_stays_as_it_is(trained, tmp_path):
    folder = tmp_path / "DoubleIntegrator" / "proco" / "seed0"
    proco.run(small(out=str(tmp_path)))
    before = weights(folder)
    proco.run(small(out=str(tmp_path)), resume=True)
    assert all(torch.equal(value, before[key]) for key, value in weights(folder).items())
    with pytest.raises(ProcoError, match="gamma_f"):                            # other settings are another run
        proco.run(small(out=str(tmp_path), gamma_f=0.9), resume=True)


def test_a_broken_checkpoint_is_said_in_one_sentence(tmp_path, capsys):
    folder = tmp_path / "DoubleIntegrator" / "proco" / "seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"PK\x03\x04 not all of it")
    assert "checkpoint.pt" in fails(capsys, "--diagnose", folder)
    torch.save(dict(config={}), folder / "checkpoint.pt")
    assert "another version" in fails(capsys, "--diagnose", folder)


@pytest.mark.skipif(not os.environ.get("PROCO_SLOW"), reason="takes minutes: set PROCO_SLOW=1")
def test_the_double_integrator_at_full_length(tmp_path):
    """Violation-free data alone: the infeasible set is found, and the policy never hits the wall."""
    results = proco.run(proco.parse(["--task", "DoubleIntegrator", "--out", str(tmp_path), "--device", "cpu"])[0])
    agent = proco.load_run(tmp_path / "DoubleIntegrator" / "proco" / "seed0")
    x, v = (axis.ravel() for axis in np.meshgrid(np.linspace(-1, 0.995, 200), np.linspace(-0.5, 2, 200)))
    truth = proco.double_integrator_doomed(x, v)
    found = agent.feasibility(np.stack([x, v], -1).astype(np.float32)) > agent.eps
    assert results["data"]["unsafe_share"] == 0 and results["eval"]["cost_mean"] == 0
    assert (truth & found).sum() / (truth | found).sum() >= 0.93 and (truth & ~found).sum() / truth.sum() <= 0.03


# =====================================================================================================================
# The download, from a server on this machine that misbehaves in every way seen so far
# =====================================================================================================================

FILE = "SafetyCarButton1Gymnasium-v0-250-2656.hdf5"                             # as dsrl names CarButton1's


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves server.body, at most server.cut bytes before the line is cut; counts requests and bytes."""
    with h5py.File(tmp_path / "original.hdf5", "w") as file:
        file["observations"] = np.random.default_rng(0).normal(size=(4000, 88))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.paths.append(self.path)
            ranged, body, start = self.headers["Range"], self.server.body, 0
            same = self.headers["If-Range"] in (None, self.server.tag)
            if ranged and same and self.server.ranges:
                start = int(ranged.removeprefix("bytes=").rstrip("-"))
            self.send_response(self.server.status or (206 if start else 200))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            if self.server.tag:
                self.send_header("ETag", self.server.tag)
            self.send_header("Content-Length", str(len(body) - start + self.server.lie))
            self.end_headers()
            piece = body[start:start + self.server.cut]
            self.server.sent += len(piece)
            threading.Event().wait(self.server.delay)
            self.wfile.write(piece)
            self.close_connection = True
            self.server.after(self.server)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body = (tmp_path / "original.hdf5").read_bytes()
        server.cut, server.tag, server.ranges, server.lie, server.status, server.delay = 1 << 40, '"one"', True, 0, 0, 0
        server.paths, server.sent, server.after = [], 0, lambda server: None
        server.url = f"http://127.0.0.1:{server.server_port}/data/"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def refused(folder, url, words):
    """fetch_dsrl fails in one sentence with these words and a way out, and leaves nothing that looks like data."""
    with pytest.raises(ProcoError) as failure:
        fetch_dsrl("CarButton1", folder, url)
    assert words in str(failure.value) and "--data driver" in str(failure.value) and "\n" not in str(failure.value)
    assert not list(folder.glob("*.hdf5"))


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "cache"))
    path = fetch_dsrl("CarButton1", base_url=server.url)
    assert path == tmp_path / "cache" / FILE and path.read_bytes() == server.body
    assert fetch_dsrl("CarButton1", base_url=server.url) == path and server.paths == [f"/data/{FILE}"]
    assert not list(path.parent.glob(".*.part"))


@pytest.mark.parametrize("tag", ['"one"', ""])
def test_a_line_cut_after_each_third_is_taken_up_where_it_broke(server, tmp_path, tag):
    server.cut, server.tag = len(server.body) // 3 + 1, tag
    assert fetch_dsrl("CarButton1", tmp_path / "cache", server.url).read_bytes() == server.body
    assert len(server.paths) >= 3 and server.sent <= 1.2 * len(server.body)


def test_a_line_that_is_cut_a_dozen_times_does_not_count_as_broken(server, tmp_path):
    server.cut = len(server.body) // 12
    assert fetch_dsrl("CarButton1", tmp_path / "cache", server.url).read_bytes() == server.body


def test_a_later_run_takes_up_what_an_earlier_one_left(server, tmp_path):
    def vanish(server):                                                         # after a third, for good
        server.status = 503
    server.cut, server.after = len(server.body) // 3, vanish
    refused(tmp_path / "cache", server.url, "broke off")
    server.status, server.cut, server.after, server.sent = 0, 1 << 40, lambda server: None, 0
    assert fetch_dsrl("CarButton1", tmp_path / "cache", server.url).read_bytes() == server.body
    assert server.sent <= 0.75 * len(server.body)


@pytest.mark.parametrize("tag", ['"two"', ""])
def test_pieces_of_two_different_files_are_never_glued(server, tmp_path, tag):
    with h5py.File(tmp_path / "newer.hdf5", "w") as file:
        file["observations"] = np.random.default_rng(1).normal(size=(4100, 88))
    newer = (tmp_path / "newer.hdf5").read_bytes()

    def change(server):
        server.body, server.tag, server.cut = newer, tag, 1 << 40
    server.cut, server.tag, server.after = len(server.body) // 2, tag and '"one"', change
    assert fetch_dsrl("CarButton1", tmp_path / "cache", server.url).read_bytes() == newer


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    def heal(server):
        server.cut = 1 << 40
    server.ranges, server.cut, server.after = False, len(server.body) // 2, heal
    assert fetch_dsrl("CarButton1", tmp_path / "cache", server.url).read_bytes() == server.body


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(server, tmp_path):
    server.ranges, server.cut = False, len(server.body) // 2
    refused(tmp_path / "cache", server.url, "broke off")
    assert len(server.paths) <= 6


def test_what_is_no_data_is_refused_and_leaves_nothing(server, tmp_path):
    whole, server.body = server.body, b"<!DOCTYPE html><html>Please log in</html>" * 1000
    refused(tmp_path / "cache", server.url, "a web page")
    server.body = b""
    refused(tmp_path / "cache", server.url, "no HDF5")
    server.body = whole[:-1000]                                                 # its server believes it whole
    refused(tmp_path / "cache", server.url, "cut off")
    server.body, server.status = whole, 404
    refused(tmp_path / "cache", server.url, "404")


def test_a_size_that_is_not_kept_is_refused(server, tmp_path):
    server.lie = 1000
    refused(tmp_path / "cache", server.url, "broke off")


def test_two_runs_at_once_fetch_once(server, tmp_path):
    server.delay = 0.2
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: fetch_dsrl("CarButton1", tmp_path / "cache", server.url), range(2)))
    assert paths[0] == paths[1] and paths[0].read_bytes() == server.body and len(server.paths) == 1


def test_a_half_written_file_in_the_cache_is_fetched_again(server, tmp_path):
    (tmp_path / FILE).write_bytes(server.body[:-5000])                          # as DSRL's own downloader leaves it
    assert fetch_dsrl("CarButton1", tmp_path, server.url).read_bytes() == server.body


def test_the_own_host_is_asked_where_the_mirror_fails(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MIRROR", "http://127.0.0.1:9/nobody")
    monkeypatch.setattr(fetch.runpy, "run_path", lambda path: dict(DATASET_URLS=dict(CarButton1=server.url + FILE)))
    assert fetch_dsrl("CarButton1", tmp_path / "cache").read_bytes() == server.body


def test_nobody_there_unknown_tasks_and_bad_folders_are_told_at_once(server, tmp_path):
    begin = time.time()
    refused(tmp_path / "cache", "http://127.0.0.1:9", "can't be reached")
    assert time.time() - begin < 5
    with pytest.raises(ProcoError, match="no data of DoubleIntegrator"):
        fetch_dsrl("DoubleIntegrator", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ProcoError, match="can't write"):
        fetch_dsrl("CarButton1", tmp_path / "file" / "cache", server.url)


# =====================================================================================================================
# python test_proco.py --bench: how fast each step is, and next to what the machine could do
# =====================================================================================================================


def plain_td3bc(learner):
    """TD3+BC as it is usually written: a module a network, a slow copy of each, twins one after the other, Adam without
    fusion; with the widths, the batch, the data and their features of `learner` -> one update of critics and actor."""
    cfg, data, nn = learner.cfg, learner.data, torch.nn
    width, acts = data["x"].shape[-1], learner.task.act_dim
    net = lambda i, o: nn.Sequential(nn.Linear(i, cfg.hidden), nn.ReLU(), nn.Linear(cfg.hidden, cfg.hidden), nn.ReLU(),
                                     nn.Linear(cfg.hidden, o))
    actor, slow_actor, (q1, q2, slow1, slow2) = net(width, acts), net(width, acts), (net(width + acts, 1) for _ in range(4))
    critics = torch.optim.Adam([*q1.parameters(), *q2.parameters()], 3e-4, foreach=False)
    actors, gamma = torch.optim.Adam(actor.parameters(), 3e-4, foreach=False), cfg.gamma ** learner.task.repeat

    def update():
        rows = torch.randint(0, len(data["x"]), (cfg.batch,))
        state, action, following, reward, done = (data[key][rows] for key in ("x", "action", "next_x", "reward", "done"))
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
            pair = torch.cat([following, (torch.tanh(slow_actor(following)) + noise).clamp(-1, 1)], -1)
            target = reward[:, None] + gamma * (1 - done[:, None]) * torch.min(slow1(pair), slow2(pair))
        pair = torch.cat([state, action], -1)
        loss = torch.nn.functional.mse_loss(q1(pair), target) + torch.nn.functional.mse_loss(q2(pair), target)
        critics.zero_grad()
        loss.backward()
        critics.step()
        pi = torch.tanh(actor(state))
        q = q1(torch.cat([state, pi], -1))
        loss = -q.mean() / q.abs().mean().detach() + torch.nn.functional.mse_loss(pi, action)
        actors.zero_grad()
        loss.backward()
        actors.step()
        for net, slow in ((q1, slow1), (q2, slow2), (actor, slow_actor)):
            for fast, late in zip(net.parameters(), slow.parameters()):
                late.data.copy_(0.02 * fast.data + 0.98 * late.data)
    return update


def evaluation_seconds(run, name, episodes, stock):
    """Prints how long an episode of a finished run takes to evaluate: as a run does it, or one after the other with the
    stock simulator and its reset. For a process of its own."""
    if stock:
        torch.set_num_threads(1)
        agent, env = proco.load_run(run), stock_simulator()(name)
        proco.make_env = SimpleNamespace(__wrapped__=lambda name: env)
        work = lambda: [proco.drive(agent, name, [10_000 + n]) for n in range(episodes)]
    else:
        with ProcessPoolExecutor(1, proco.WORKER_START) as pool:                # a run has had the server for minutes
            pool.submit(int).result()
        work = lambda: proco.evaluate(run, name, episodes)
    begin = time.perf_counter()
    work()
    print("\nSECONDS", (time.perf_counter() - begin) / episodes)


def bench_evaluation(run, rounds=3):
    """Times the evaluation of 20 episodes against the stock simulator's, in turn, the latter on 3 episodes."""
    run, name = Path(run).resolve(), json.loads((Path(run) / "config.json").read_text())["task"]
    for _ in range(rounds):
        ours, stock = (float(subprocess.run(
            [sys.executable, "-c", f"import test_proco; test_proco.evaluation_seconds({str(run)!r}, {name!r}, {n}, {stock})"],
            check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.split("SECONDS")[1])
            for n, stock in ((20, False), (3, True)))
        print(f"evaluation of {name}: 20 episodes in {20 * ours:.1f} s; one process with the stock simulator {stock:.2f} s "
              f"an episode, {stock / ours:.2f} times as long", flush=True)


def bench(name="PointGoal1", threads=1):
    """Prints a table: for each step its milliseconds (median of 5 rounds), its operations, and the rate they make beside
    that of a large matrix product on the same threads."""
    from torch.utils.flop_counter import FlopCounterMode
    median = lambda times: sorted(times)[len(times) // 2]
    torch.set_num_threads(threads)

    def timed(work, count):
        work()
        rounds = []
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(count):
                work()
            rounds.append((time.perf_counter() - begin) / count)
        return median(rounds)

    big = torch.randn(1024, 1024)
    rate = 2 * 1024 ** 3 / timed(lambda: big @ big, 10)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, matrix product {rate / 1e9:.0f} GFLOP/s\n")
    print("| step | ms | MFLOP | share of the matrix product's rate |\n| --- | --- | --- | --- |")

    def row(words, work, count=30):
        seconds = timed(work, count)
        with FlopCounterMode(display=False) as counter:
            work()
        flops = counter.get_total_flops()
        print(f"| {words} | {1e3 * seconds:.2f} | {flops / 1e6:.0f} | {flops / seconds / rate:.0%} |", flush=True)
        return seconds

    task, cost = get_task(name), load_cost(name)
    cfg = proco.Config(task=name, data="driver", driver_episodes=6, ensemble=7, device="cpu", rollouts=6000)
    arrays, _ = proco.load_data(proco.find_data(cfg)[1], task)
    data = proco.to_device(arrays, task, cost, "cpu")
    quick = dataclasses.replace(cfg, scale=1 / cfg.model_epochs)                # one epoch
    proco.train_dynamics(data, task, quick, gen())                              # a first training warms up
    begin = time.perf_counter()
    model = proco.train_dynamics(data, task, quick, gen())
    print(f"| dynamics, one epoch of {len(data['state'])} rows | {1e3 * (time.perf_counter() - begin):.0f} | | |")
    learner = proco.Learner(cfg, task, data, cost, model, 0.02)
    row("clone update", learner.clone_update)
    learner.step = learner.clone_updates
    begin = time.perf_counter()
    learner.roll_out()
    print(f"| roll-outs, per 1000 rows of D_cf | {1e6 * (time.perf_counter() - begin) / len(learner.cf['state']):.0f} | | |")

    def at(step, learner=learner):
        learner.step = learner.clone_updates + step
        learner.update()
    row("feasibility update", lambda: at(1))
    row("feasibility, critics and policy update", lambda: at(learner.alone + 2))
    agent, obs = learner.agent, arrays["observations"][:10]
    object.__setattr__(agent, "model", model)
    row("look-ahead for 10 agents", lambda: agent.act(obs), 5)
    row("the same, a decision under way", lambda: agent.act(obs, np.zeros((10, task.act_dim), np.float32)))

    alone = proco.Learner(dataclasses.replace(cfg, method="td3bc"), task, data, cost, None, 0.02)
    usual = plain_td3bc(alone)
    ratios = []
    for _ in range(5):                                                          # in turn: the machine's moods hit both
        pair = [timed(work, 30) for work in (lambda: at(2, alone), usual)]
        ratios.append(pair[1] / pair[0])
    print(f"| td3bc update, critics and actor | {1e3 * pair[0]:.2f} | | |")
    print(f"| the same as separate modules with plain Adam | {1e3 * pair[1]:.2f} | | |")
    print(f"\na td3bc update is {median(ratios):.2f} times as fast as with separate modules (5 rounds: "
          f"{min(ratios):.2f} to {max(ratios):.2f})")
    for name in (name, "CarButton1"):
        env = proco.make_env(name)
        reset = timed(lambda: env.reset(seed=0), 1)
        print(f"{name}: reset {1e3 * reset:.0f} ms, {1 / timed(lambda: env.step(np.array([0.5, 0.3])), 60):.0f} steps/s a process")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--bench"] or len(sys.argv) > 3:
        sys.exit("usage: python test_proco.py --bench [finished RUN, to time its evaluation], or python -m pytest -q")
    for threads in sorted({1, proco.WORKERS}):
        bench(threads=threads)
    if sys.argv[2:]:
        bench_evaluation(sys.argv[2])
