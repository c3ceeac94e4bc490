"""How right the cached cost predicates are, against the simulator's own cost.

    python -m llm_costs.score all
    python -m llm_costs.score TASK [TASK ...] [--states 10000] [--seed 0]

The states come from mixed behaviour: random actions, driving to the goal, driving at dangers,
holding a heading. Where speed is the danger, the robot is kicked to a speed between backward and
1.6 times the limit. Columns of the Markdown table that is printed:

* states, and the share of them that the simulator calls unsafe
* recall: of the unsafe states, those that the predicate calls unsafe; precision: of its positives,
  those that are unsafe; within 5: up to 5 steps of the episode may lie between the two
* the same at a margin of 0.05 (m or m/s), and how early that warns: for how many steps before an
  unsafe stretch it had been warning without a break (median over stretches)
* lost: positives at margin 0 that a margin of 0.05 takes back; has to be 0
"""

import argparse
import functools
import sys

import numpy as np
import torch
from tqdm import tqdm

try:
    import proco
except ModuleNotFoundError as error:
    if error.name != "proco":
        raise
    sys.exit("llm_costs.score: there is no proco.py here; run this in the repository's folder.")

HEAD = """| task | states | unsafe | recall | precision | recall within 5 | precision within 5 \
| recall, 0.05 | precision, 0.05 | within 5, 0.05 | warns early, steps | lost |"""
DANGERS = ("hazards", "gremlins", "vases", "pillars", "buttons")


def wrap(angle):
    """An angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def steer(task, bearing):
    """The action that drives along a bearing in the body frame (rad)."""
    if task.name.startswith("Point"):
        return np.array([np.cos(bearing), 2 * bearing])
    error = wrap(bearing + np.pi / 2)  # a Car's front is body -y
    turn = np.clip(1.5 * error, -1, 1)
    ahead = float(abs(error) < 0.5)
    return np.array([ahead + turn, ahead - turn])


def behaviour(task, rng):
    """Draws what to do for some steps -> (how many, a function from observation to action)."""
    kind = rng.integers(5) if task.lidars else 4  # 0 to the goal, 1 and 2 at a danger, 3 a heading
    steps = rng.integers(10, 60)
    held = rng.uniform(-1, 1, task.act_dim)
    wanted = ("goal", "push_box") if kind == 0 else DANGERS
    aims = [lidar for lidar in task.lidars if lidar.name in wanted and kind < 3]
    aim = aims[rng.integers(len(aims))] if aims else None
    heading = rng.uniform(-np.pi, np.pi)

    def act(obs):
        if aim:
            bins = torch.as_tensor(obs[aim.start : aim.start + 16], dtype=torch.float32)
            bearing = proco.locate(bins, aim.reach, 1)[0].angle().item()
            return steer(task, bearing) + 0.2 * held
        if kind == 3:
            yaw = np.arctan2(-obs[9], -obs[10])
            return steer(task, wrap(heading - yaw))
        return held if rng.random() < 0.8 else rng.uniform(-1, 1, task.act_dim)

    return steps, act


def kick(task, env, rng):
    """Gives a running robot another speed -> (25 steps, how it acts, the observation of that)."""
    robot = env.unwrapped
    speed = rng.uniform(-0.3, 1.6) * robot._velocity_threshold
    direction = rng.uniform(-np.pi, np.pi)
    velocity = robot.data.qvel.copy()
    velocity[0] = speed
    if task.name.startswith("Ant"):  # it runs in the plane
        velocity[:2] = (speed * np.cos(direction), speed * np.sin(direction))
    robot.set_state(robot.data.qpos.copy(), velocity)
    held = rng.uniform(-1, 1, task.act_dim)

    def act(_):
        action = held if rng.random() < 0.5 else rng.uniform(-1, 1, task.act_dim)
        return action.astype(np.float32)

    return 25, act, robot._get_obs()


def episodes_of(task, states, seed):
    """Drives -> list of episodes, each a list of steps (obs, action, next_obs, unsafe).

    A kick ends an episode, so that no comparison of neighbouring steps reaches across it."""
    env = proco.make_env(task.name)
    rng = np.random.default_rng(seed)
    runs = task.name.endswith("Velocity")
    episodes = []
    bar = tqdm(total=states, desc=task.name, leave=False, dynamic_ncols=True)
    driven = 0
    while driven < states:
        obs, _ = env.reset(seed=seed + len(episodes))
        rows = []
        left = 0  # steps of the present behaviour
        for _ in range(200 if runs else 500):
            if left == 0 and runs:
                left, act, obs = kick(task, env, rng)
                episodes += [rows] if rows else []
                rows = []
            elif left == 0:
                left, act = behaviour(task, rng)
            left -= 1
            action = np.clip(act(obs), -1, 1)
            next_obs, _, cost, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, next_obs, cost > 0))
            bar.update()
            driven += 1
            obs = next_obs
            if terminated or truncated:
                break
        episodes.append(rows)
    bar.close()
    return episodes


def near(flags, k=5):
    """Flags widened by k steps to both sides."""
    padded = np.pad(flags.astype(int), k)
    return np.convolve(padded, np.ones(2 * k + 1), "valid") > 0


def warning(wide, unsafe):
    """For each unsafe stretch: how many steps before it the widened predicate began to warn."""
    early = []
    for start in np.flatnonzero(unsafe[1:] & ~unsafe[:-1]) + 1:
        silent = np.flatnonzero(~wide[:start])
        early.append(start - 1 - silent[-1] if len(silent) else start)
    return early


def score(name, states, seed):
    """One row of the table, as cells."""
    task = proco.get_task(name)
    cost = proco.load_cost(name)
    sums = np.zeros((2, 5))  # at both margins: hits, positives, hits within 5, found within 5, lost
    rows = 0
    unsafe_rows = 0
    early = []
    for episode in episodes_of(task, states, seed):
        *steps, unsafe = (np.array(column) for column in zip(*episode))
        steps = [torch.as_tensor(x, dtype=torch.float32) for x in steps]
        plain, wide = (cost(*steps, margin).bool().numpy() for margin in (0.0, 0.05))
        for k, flags in enumerate((plain, wide)):
            around = (flags & near(unsafe)).sum()
            found = (unsafe & near(flags)).sum()
            lost = (plain & ~flags).sum()
            sums[k] += [(flags & unsafe).sum(), flags.sum(), around, found, lost]
        rows += len(unsafe)
        unsafe_rows += unsafe.sum()
        early += warning(wide, unsafe)
    hits, positives, around, found, lost = sums.T
    positives = np.where(positives > 0, positives, np.nan)
    violations = unsafe_rows or np.nan  # shares of nothing are no numbers
    recall = hits / violations
    precision = hits / positives
    precision_5 = around / positives
    recall_5 = found / violations
    shares = [recall[0], precision[0], recall_5[0], precision_5[0]]
    shares += [recall[1], precision[1], precision_5[1]]
    head = [name, str(rows), f"{unsafe_rows / rows:.1%}"]
    steps_before = f"{np.median(early):.0f}" if early else "-"
    cells = ["-" if np.isnan(share) else f"{share:.3f}" for share in shares]
    return [*head, *cells, steps_before, f"{lost[1]:.0f}"]


def judge(names, states, seed):
    """Prints the table, a row for each task. Raises ProcoError before the first is driven."""
    for name in names:
        proco.load_cost(name)
        proco.make_env(name)
    print(HEAD)
    print("| --- " * 12 + "|")
    for name in names:
        print(f"| {' | '.join(score(name, states, seed))} |", flush=True)


def main(argv=None):
    """The command line -> exit code: 0, 2 with one sentence on stderr, or 130."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("llm_costs.score", description=__doc__, formatter_class=form)
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="such as CarButton1, or all")
    parser.add_argument("--states", type=int, default=10_000, help="at least so many a task")
    parser.add_argument("--seed", type=int, default=0, help="of layouts and behaviour")
    args = parser.parse_args(argv)
    if args.states < 1 or not 0 <= args.seed < 2**31:
        parser.error("--states has to be at least 1, --seed from 0 to 2147483647")
    torch.set_num_threads(1)
    names = list(proco.TASKS) if args.tasks == ["all"] else args.tasks
    work = functools.partial(judge, names, args.states, args.seed)
    return proco.serve("llm_costs.score", work)


if __name__ == "__main__":
    sys.exit(main())
