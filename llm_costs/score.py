"""How right the cached cost predicates are, against the simulator's own cost.

    python llm_costs/score.py TASK [TASK ...] | all   [--states 10000] [--seed 0]

States of mixed behaviour: random actions, driving to the goal, driving at dangers, holding a heading; velocity
tasks are kicked to a forward speed between backward and 1.6 times the limit. Printed as a Markdown table:

* states, and the share of them that the simulator calls unsafe
* recall: of the unsafe states, those the predicate calls unsafe; precision: of its positives, those unsafe in the
  very frame; both within 5: the same when up to 5 steps of the episode may lie between the two
* all of it again at a margin of 0.05 (m or m/s), and how early that warns: for how many steps before an unsafe
  stretch the widened predicate had been warning without a break (median over stretches)
* lost: positives at margin 0 that a margin of 0.05 takes back; has to be 0
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from proco import TASKS, get_task, load_cost, locate, make_env  # noqa: E402


def steer(task, bearing):
    """The action that drives along a bearing in the body frame (rad)."""
    if task.startswith("Point"):
        return np.array([np.cos(bearing), np.clip(2 * bearing, -1, 1)])
    error = (bearing + np.pi / 2 + np.pi) % (2 * np.pi) - np.pi       # a Car's front is body -y
    turn = np.clip(1.5 * error, -1, 1)
    ahead = 1.0 if abs(error) < 0.5 else 0.0
    return np.clip(np.array([ahead + turn, ahead - turn]), -1, 1)


def navigate(task, states, seed):
    """Episodes of a navigation task: every 10 to 60 steps another behaviour is drawn."""
    env, rng, lidars = make_env(task), np.random.default_rng(seed), get_task(task).lidars
    goals = [L for L in lidars if L.name in ("goal", "push_box")]
    dangers = [L for L in lidars if L.name in ("hazards", "gremlins", "vases", "pillars", "buttons")]
    episodes = []
    while sum(len(e[3]) for e in episodes) < states:
        obs, _ = env.reset(seed=seed + len(episodes))
        rows, left = [], 0
        for _ in range(500):
            if left == 0:
                mode, left, held = rng.integers(5), rng.integers(10, 60), rng.uniform(-1, 1, 2)
                aim = goals if mode == 0 else dangers
                aim = aim[rng.integers(len(aim))] if mode < 3 and aim else None
                heading = rng.uniform(-np.pi, np.pi)
            left -= 1
            if aim is not None:
                x, y = locate(obs[None, aim.start:aim.start + 16], aim.reach, 1)[0, 0]
                action = steer(task, np.arctan2(y, x)) + 0.2 * held
            elif mode == 3:                                          # hold a heading in the world
                yaw = np.arctan2(-obs[9], -obs[10])
                action = steer(task, (heading - yaw + np.pi) % (2 * np.pi) - np.pi)
            else:
                action = held if rng.random() < 0.8 else rng.uniform(-1, 1, 2)
            action = np.clip(action, -1, 1)
            next_obs, _, cost, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, next_obs, cost > 0))
            obs = next_obs
            if terminated or truncated:
                break
        episodes.append([np.array(x) for x in zip(*rows)])
    return episodes


def run(task, states, seed):
    """Episodes of a velocity task: random actions, held or fresh, kicked to another speed every 25 steps."""
    env, rng = make_env(task), np.random.default_rng(seed)
    limit, episodes = env.unwrapped._velocity_threshold, []
    while sum(len(e[3]) for e in episodes) < states:
        obs, _ = env.reset(seed=seed + len(episodes))
        rows = []
        for t in range(200):
            if t % 25 == 0:                                          # an episode of its own for "within 5"
                episodes.append([np.array(x) for x in zip(*rows)]) if rows else None
                qpos, qvel = env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy()
                speed, angle = rng.uniform(-0.3, 1.6) * limit, rng.uniform(-np.pi, np.pi)
                qvel[:2] = (speed * np.cos(angle), speed * np.sin(angle)) if task.startswith("Ant") else (
                    speed, qvel[1])
                env.unwrapped.set_state(qpos, qvel)
                obs, held, rows = env.unwrapped._get_obs(), rng.uniform(-1, 1, env.action_space.shape), []
            action = (held if rng.random() < 0.5 else rng.uniform(-1, 1, held.shape)).astype(np.float32)
            next_obs, _, cost, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, next_obs, cost > 0))
            obs = next_obs
            if terminated or truncated:
                break
        episodes.append([np.array(x) for x in zip(*rows)])
    return episodes


def near(flags, k=5):
    """flags widened by k steps to both sides"""
    return np.convolve(np.pad(flags.astype(int), k), np.ones(2 * k + 1), "valid") > 0


def warning(wide, true):
    """For each unsafe stretch: the steps before it for which the widened predicate had been warning already."""
    starts, early = np.flatnonzero(true & ~np.r_[False, true[:-1]]), []
    for start in starts[starts > 0]:
        t = start
        while t > 0 and wide[t - 1]:
            t -= 1
        early.append(start - t)
    return early


def score(task, states, seed):
    """One line of the table, as numbers."""
    episodes = (run if "Velocity" in task else navigate)(task, states, seed)
    cost, sums, early = load_cost(task), np.zeros((2, 6)), []
    lost = 0
    for obs, action, next_obs, true in episodes:
        tensors = [torch.as_tensor(x, dtype=torch.float32) for x in (obs, action, next_obs)]
        flags = [cost(*tensors, margin).bool().numpy() for margin in (0.0, 0.05)]
        for row, flag in zip(sums, flags):
            row += [(flag & true).sum(), flag.sum(), true.sum(), (flag & near(true)).sum(),
                    (true & near(flag)).sum(), len(true)]
        early += warning(flags[1], true)
        lost += (flags[0] & ~flags[1]).sum()
    hit, flagged, unsafe, hit_5, found_5, rows = sums.T
    flagged, unsafe = np.maximum(flagged, 1), np.maximum(unsafe, 1)
    return dict(states=int(rows[0]), unsafe=unsafe[0] / rows[0], recall=hit / unsafe, precision=hit / flagged,
                recall_5=found_5 / unsafe, precision_5=hit_5 / flagged, lost=int(lost),
                early=float(np.median(early)) if early else float("nan"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--states", type=int, default=10_000, help="states a task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | states | unsafe | recall | precision | recall within 5 | precision within 5 "
          "| recall, 0.05 | precision, 0.05 | within 5, 0.05 | warns early, steps | lost |")
    print("| --- " * 12 + "|")
    for task in TASKS[1:] if args.tasks == ["all"] else args.tasks:
        s = score(task, args.states, args.seed)
        cells = [s["recall"][0], s["precision"][0], s["recall_5"][0], s["precision_5"][0], s["recall"][1],
                 s["precision"][1], s["precision_5"][1]]
        print(f"| {task} | {s['states']} | {s['unsafe']:.1%} | " + " | ".join(f"{c:.3f}" for c in cells)
              + f" | {s['early']:.0f} | {s['lost']} |", flush=True)


if __name__ == "__main__":
    main()
