"""What came out: --diagnose, --report and --compare. No part of PROCO."""
import csv
import dataclasses
import functools
import importlib.metadata
import json
import math
import sys
import timeit
from pathlib import Path

import numpy as np
import torch

import proco                                    # circular: what is used of it is looked up when it is used
from llm_costs.fetch import dsrl_infos
from llm_costs.language import ProcoError


@torch.no_grad()
def feasibility_map(agent, axes, motion, title):
    """Draws V_f over the places where the agent could be, at a given motion of its own, the dangers it sees, and the
    boundary V_f = eps. For the double integrator the plane is (x, v) and the exact boundary is drawn over it."""
    import matplotlib.pyplot as plt
    task = agent.task
    if task.name == "DoubleIntegrator":
        x, v = np.meshgrid(np.linspace(-1, 1, 201), np.linspace(-0.5, 2, 126))
        state, doomed = np.stack([x, v], -1).reshape(-1, 2), proco.double_integrator_doomed(x, v)
        axes.contour(x, v, doomed, [0.5], colors="k", linestyles="--")
        axes.plot([], [], "k--", label="true boundary")
        axes.set(xlabel="position x, m (wall at 1)", ylabel="velocity v, m/s")
    else:
        x, v = np.meshgrid(np.linspace(-1.5, 1.5, 121), np.linspace(-1.5, 1.5, 121))
        size, seen = len(task.sensors), agent._state(proco.make_env(task.name).reset(seed=1)[0][None]).cpu()
        place = torch.as_tensor(np.stack([x, v], -1), dtype=torch.float32).view(-1, 1, 2)
        xy = seen[:, size:].unflatten(-1, (-1, 2)) - place
        sensors = torch.cat([torch.tensor([motion]), seen[:, proco.MOTION:size]], -1).expand(len(xy), -1)
        state = proco.nearest_first(torch.cat([sensors, xy.flatten(1)], -1), task)
        for mine, lidar in zip(proco.object_slices(task), task.lidars):
            for at in seen[0, size:].unflatten(-1, (-1, 2))[mine]:
                if at.norm() < 0.99 * lidar.reach and lidar.name != "circle":
                    axes.add_patch(plt.Circle(at.tolist(), 0.2 if lidar.name == "hazards" else 0.1, fill=False, lw=1.5,
                                              color="tab:cyan" if lidar.name == "goal" else "tab:orange", zorder=3))
        axes.set(xlabel="body x: ahead of a Point, to the left of a Car; m", ylabel="body y, m", aspect="equal",
                 xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    value = agent.v_s(agent.features(torch.as_tensor(state, dtype=torch.float32)))[0, :, 0].clamp(0, 1).view(x.shape)
    mesh = axes.pcolormesh(x, v, value.numpy(), cmap="cividis", vmin=0, vmax=1, shading="auto", rasterized=True)
    axes.contour(x, v, value.numpy(), [agent.eps], colors="white")
    axes.plot([], [], color="white", label=f"V_f = eps = {agent.eps:g}")
    axes.set_title(title)
    axes.legend(loc="lower left", fontsize=8, facecolor="0.5")
    return mesh


def keep_paths(folder, name, rows, agent):
    """What report.png draws of the first evaluation episodes, into folder/paths.npz."""
    kept, cost = {}, proco.load_cost(name)
    for n, row in enumerate(rows[:8]):
        seen, actions = torch.as_tensor(row.obs), torch.as_tensor(row.actions)
        kept |= {f"path{n}": row.path, f"costs{n}": row.costs, f"dangers{n}": row.dangers,
                 f"value{n}": agent.feasibility(row.obs), f"gap{n}": proco.danger_distance(cost, seen, actions, seen).numpy()}
    with proco.whole(folder / "paths.npz") as part, open(part, "wb") as file:
        np.savez_compressed(file, count=len(rows[:8]), **{key: np.asarray(value, np.float32) for key, value in kept.items()})


def panel_paths(axes, runs, n, name):
    """Evaluation episode n seen from above, as each of `runs`, {method: what keep_paths kept}, drove it."""
    import matplotlib.pyplot as plt
    for (method, kept), style in zip(runs.items(), ("-", "--")):
        path, bad = kept[f"path{n}"], kept[f"costs{n}"] > 0
        axes.plot(*path.T, style, lw=1.2, color="C0" if style == "-" else "C1", label=f"{method}: cost {bad.sum()}")
        axes.plot(*path[bad].T, "x", color="k", ms=4)
        axes.plot(*path[0], "o", color="C0")
    for x, y, radius in kept[f"dangers{n}"]:
        axes.add_patch(plt.Circle((x, y), radius, color="tab:orange", alpha=0.5, lw=0))
    if "Circle" in name:
        for line in (axes.axvline, axes.axhline)[:int(name[-1])]:
            line(-1.125, color="tab:orange"), line(1.125, color="tab:orange")
    axes.set(title=f"evaluation episode {n + 1}: paths (x: violation)", xlabel="x, m", ylabel="y, m", aspect="equal")
    axes.legend(fontsize=8, loc="upper right")


def panel_warning(axes, kept, eps, dt):
    """V_f and the distance to danger up to the first violation that was kept, or else the nearest miss."""
    firsts = [(int((kept[f"costs{n}"] > 0).argmax()), n) for n in range(kept["count"]) if kept[f"costs{n}"].any()]
    end, n = min(firsts) if firsts else min((int(kept[f"gap{n}"].argmin()), n) for n in [
        min(range(kept["count"]), key=lambda n: kept[f"gap{n}"].min())])
    when = np.arange(max(0, end - 100), end + 1)
    axes.plot((when - end) * dt, kept[f"value{n}"][when], "C0-", label="V_f")
    axes.plot((when - end) * dt, kept[f"gap{n}"][when], "C1--", label="distance to danger (m, m/s)")
    axes.axhline(eps, color="0.5", lw=0.8, label=f"eps = {eps:g}")
    axes.set(xlabel="time before, s", ylim=(-0.02, 1.05),
             title="up to the first violation" if firsts else "the nearest miss")
    axes.locator_params(axis="x", nbins=5)
    axes.legend(fontsize=8)


def panel_training(axes, rows, title):
    """The multiplier, the share of recorded states called infeasible, and the losses, over updates."""
    for key, style in (("lam", "C0-"), ("infeasible_share", "C1--"), ("feasibility_loss", "C2:"), ("reward_loss", "C3-."),
                       ("clone_loss", "C4-")):
        points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
        if points:
            axes.semilogy(*zip(*points), style, label=key.replace("lam", "lambda").replace("_", " "))
    axes.set(xlabel="update", title=title)
    axes.locator_params(axis="x", nbins=5)
    axes.legend(fontsize=8)


def panel_dynamics(axes, blocks):
    """The model's error after 1 and 15 open-loop steps as a share of what "nothing changes" errs."""
    for at, (k, colour) in enumerate(((0, "C0"), (-1, "C1"))):
        share = [row["error"][k] / max(row["nothing_changes"][k], 1e-9) for row in blocks.values()]
        axes.bar(np.arange(len(blocks)) + 0.4 * at - 0.2, share, 0.4, color=colour, label=("1 step", "15 steps")[at])
    axes.axhline(1, color="0.5", lw=0.8)
    axes.set(title="model's error / that of 'nothing changes'", ylim=(0, 1.3))
    axes.set_xticks(range(len(blocks)), blocks, rotation=20)
    axes.legend(fontsize=8)


def report(folder):
    """Draws folder/report.png: where V_f says that safety can be kept, what was driven (beside bc, if its run is there),
    how danger came near, how training went, how good the model is -> the path. Raises ProcoError without a whole run."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    folder, agent, panels = Path(folder), proco.load_run(folder), []
    saved, task = proco.load_checkpoint(folder / "checkpoint.pt"), agent.task
    method, counterfactual = saved["config"]["method"], agent.model is not None
    try:
        with open(folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        runs = {}
        for run in dict.fromkeys((folder, folder.parent.parent / "bc" / folder.name)):
            if (run / "paths.npz").exists():
                runs["bc" if run != folder else method] = dict(np.load(run / "paths.npz"))
    except OSError as error:
        raise ProcoError(f"{folder} is no finished run ({error.strerror}: {error.filename}); train first") from None
    if counterfactual and task.name == "DoubleIntegrator":
        panels.append(lambda axes: feasibility_map(agent, axes, None, "feasibility value V_f"))
    elif counterfactual and task.lidars:
        ahead = [1.0, 0.0, 0.0] if "Point" in task.name else [0.0, -0.7, 0.0]           # a Car's front is body -y
        for words, motion in (("standing", [0.0] * 3), (f"driving {max(map(abs, ahead)):g} m/s", ahead)):
            panels.append(functools.partial(feasibility_map, agent, motion=motion, title=f"feasibility value V_f {words}"))
    if runs and task.lidars:
        shown = range(min(2, *(int(kept["count"]) for kept in runs.values())))
        panels += [functools.partial(panel_paths, runs=runs, n=n, name=task.name) for n in shown]
    if counterfactual and runs.get(method):
        panels.append(lambda axes: panel_warning(axes, runs[method], agent.eps, task.dt))
    panels.append(lambda axes: panel_training(axes, rows, f"{task.name}, {method}: training"))
    if saved["report"]:
        panels.append(lambda axes: panel_dynamics(axes, saved["report"]))
    columns = math.ceil(len(panels) / 2)
    figure, grid = plt.subplots(min(2, len(panels)), columns, figsize=(5 * columns, 4.4 * min(2, len(panels))),
                                layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        mesh = panel(axes)
        if mesh:
            figure.colorbar(mesh, ax=axes, label="V_f: 0 safe, gamma_f^k doomed in k steps")
    for axes in grid.flat[len(panels):]:
        axes.set_axis_off()
    with proco.whole(folder / "report.png") as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)
    return folder / "report.png"


def draw_comparison(rows, path):
    """Return against cost of every method, a panel for each task, from proco.compare's rows, with their intervals."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    tasks, methods = (list(dict.fromkeys(row[key] for row in rows if row["task"] != "all")) for key in ("task", "method"))
    columns = min(3, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(4.4 * columns, 3.6 * lines), layout="constrained", squeeze=False)
    for axes, task in zip(grid.flat, tasks):
        for n, method in enumerate(methods):
            row = next(row for row in rows if (row["task"], row["method"]) == (task, method))
            bars = {key: [[max(row[key] - row[f"{key}_low"], 0)], [max(row[f"{key}_high"] - row[key], 0)]]
                    for key in ("cost", "return")}
            axes.errorbar(row["cost"], row["return"], bars["return"], bars["cost"], fmt="osD^v<>p"[n % 8], color=f"C{n}",
                          ms=7, lw=1, capsize=2, label=method)
        axes.set_xscale("symlog", linthresh=1)
        axes.set(title=task, xlabel="violating steps an episode", ylabel="return", xlim=(-0.1, None))
        axes.axvspan(-0.1, 20, color="tab:green", alpha=0.08, lw=0)         # DSRL's middle limit
    grid.flat[0].legend(fontsize=8)
    for axes in grid.flat[len(tasks):]:
        axes.set_axis_off()
    with proco.whole(path) as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)


def area_under_curve(scores, labels):
    """Chance that a positive scores above a negative (ties count half): scores, labels (B,) -> float."""
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = labels.sum()
    if positive in (0, len(labels)):
        return math.nan                         # nothing to tell apart
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))


@torch.no_grad()
def warning_table(agent, cost, rows, steps=(1, 5, 10, 20)):
    """How well V_f, the plain distance to danger, and Q_f of the action that was taken foretell a violation within k
    steps -> [(k, AUC of V_f, AUC of distance, AUC of Q_f, share of positives)]. V_f is what nobody could avoid any more,
    Q_f what this action makes of it. Steps inside a violation are left out: they need no warning."""
    scores, times = [], []
    for row in rows:
        obs, actions, costs = row.obs, torch.as_tensor(row.actions), row.costs > 0
        seen = torch.as_tensor(obs)
        taken = agent.danger(agent.features(agent._state(obs)), actions[None])[0, :, 0]
        scores.append([agent.feasibility(obs), -proco.danger_distance(cost, seen, actions, seen).numpy(), taken.numpy()])
        ahead = np.where(costs, np.arange(len(costs)), 10 ** 9)
        ahead = np.minimum.accumulate(ahead[::-1])[::-1] - np.arange(len(costs)) + 1.0            # steps until
        ahead[1:][costs[:-1]] = -1                                                                # already inside
        times.append(ahead)
    scores, times = np.concatenate(scores, -1), np.concatenate(times)
    outside = times > 0
    return [(k, *(area_under_curve(score[outside], times[outside] <= k) for score in scores),
             float((times[outside] <= k).mean())) for k in steps]


def normalised(name, returns, costs):
    """DSRL's normalised return and cost (at a limit of 20): (R - R_min) / (R_max - R_min), C / limit; None where
    DSRL knows no such task or is not installed."""
    infos = dsrl_infos()
    if name not in infos.get("MIN_EPISODE_REWARD", {}):
        return None, None
    low, high = infos["MIN_EPISODE_REWARD"][name], infos["MAX_EPISODE_REWARD"][name]
    return (returns - low) / (high - low), costs / 20


def summary(name, rows):
    """What results.json says of evaluation episodes."""
    returns, costs = (np.array([getattr(row, key) for row in rows]) for key in ("ret", "cost"))
    scores = normalised(name, returns.mean(), costs.mean())
    return dict(episodes=len(rows), return_mean=returns.mean(), return_std=returns.std(), cost_mean=costs.mean(),
                cost_std=costs.std(), zero_cost_share=(costs == 0).mean(), normalized_return=scores[0],
                normalized_cost=scores[1])


def versions():
    """What the numbers were made with."""
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    names = ("torch", "numpy", "safety-gymnasium", "dsrl", "mujoco", "gymnasium")
    return dict(python=sys.version.split()[0], threads=torch.get_num_threads(),
                **{name: installed.get(name) for name in names})


def forecast(cfg, task, rows):
    """Seconds that training on `rows` rows of D and evaluation will take on this CPU, roughly: what the steps took on the
    README's machine, where the product below takes 0.18 ms, by how much longer it takes here."""
    x, weight = torch.randn(2, 512, 128), torch.randn(2, 128, 128)
    slower = min(timeit.repeat(lambda: x @ weight, repeat=9, number=5)) / 5 / 0.00018
    training, share = 0.0007 * cfg.clone_updates, 0.4 + 0.6 * (cfg.hidden / 128) ** 2       # of a width's updates
    if cfg.method != "bc":
        training += share * cfg.updates * (0.007 if cfg.counterfactual else 0.002 if cfg.algorithm == "td3bc" else 0.005)
    if cfg.counterfactual:
        decisions = cfg.rollouts * cfg.horizon / task.repeat
        training += share * 0.0045 * cfg.feasibility_updates + 1.8e-6 * task.state_dim * decisions
        training += 2e-6 * rows * cfg.model_epochs * cfg.ensemble
    steps = cfg.eval_episodes * task.steps / (20_000 if cfg.task == "DoubleIntegrator" else 750 * proco.WORKERS)
    return slower * (cfg.scale * training + steps)


@torch.no_grad()
def dynamics_report(model, data, steps=(1, 5, 10, 15)):
    """How wrong the model is, per block, on the held-out episodes, next to the predictor "nothing changes". Blocks are
    the sensors and, of each lidar, the nearest distance: the part of it that is exact and that costs depend on.

    -> {block: {"r2": one-step R^2 of the change, "error": [root mean square after k open-loop steps of the mean
    member, in the block's unit], "nothing_changes": [the same of the start]}}"""
    task, episode = model.task, data["episode"]
    starts = (data["held_out"] & (torch.arange(len(episode), device=episode.device) + max(steps) < len(episode)))
    starts = starts.nonzero()[:, 0]
    starts = starts[episode[starts] == episode[starts + max(steps)]][::7]
    report, size = {}, len(task.sensors)
    parts = {"sensors": lambda s: s[..., :size]} | {
        lidar.name: lambda s, n=n: proco.nearest(s, task)[..., n:n + 1] for n, lidar in enumerate(task.lidars)}
    state = first = data["state"][starts]
    for k in range(max(steps)):
        state = model.step(state, data["action"][starts + k])[k % len(model.elites)]
        if k + 1 not in steps:
            continue
        for name, part in parts.items():
            row = report.setdefault(name, dict(error=[], nothing_changes=[]))
            true = part(data["next_state"][starts + k])
            keep = ((true - part(first)).abs().amax(-1) < 0.06 * (k + 1)) if name != "sensors" else slice(None)
            wrong, moved = (part(state) - true)[keep], (true - part(first))[keep]
            row["error"].append(float(wrong.square().mean().sqrt()))
            row["nothing_changes"].append(float(moved.square().mean().sqrt()))
            if k == 0:
                scale = moved.square().sum(0)
                row["r2"] = float((1 - wrong.square().sum(0) / scale.clamp(min=1e-12))[scale > 1e-9].mean())
    return report


def print_dynamics(report, margin):
    """The dynamics report as a table."""
    print("   block      R^2 of the change   error after 1 / 5 / 10 / 15 steps          'nothing changes'")
    for name, row in report.items():
        errors, still = ("  ".join(f"{v:8.4f}" for v in row[key]) for key in ("error", "nothing_changes"))
        print(f"   {name:<10} {row['r2']:12.4f}   {errors}   {still}")
    print(f"   margin of the conservative cost: {margin:.4f}")


def diagnose(folder, episodes=20):
    """What a run's feasibility value knows, before any policy is believed: its AUC against that of the plain distance
    on episodes of the cloned policy, the policy with and without its filter, and the dynamics report."""
    saved = proco.load_checkpoint(Path(folder) / "checkpoint.pt")
    cfg = proco.Config(**saved["config"])
    if saved["report"]:
        print_dynamics(saved["report"], saved["margin"])
    rows = {kind: proco.evaluate(folder, cfg.task, episodes, behaviour=kind) for kind in ("clone", "bare", "filter", "policy")}
    for kind, words in (("clone", "the cloned policy"), ("bare", "the bare actor"), ("filter", "actor and filter"),
                        ("policy", "with look-ahead")):
        score = summary(cfg.task, rows[kind])
        print(f"   {words:<18} return {score['return_mean']:7.2f}   cost {score['cost_mean']:7.2f}   "
              f"violation-free {score['zero_cost_share']:.0%}")
    print("   foretelling a violation of the cloned policy within k steps: AUC of")
    print("    k     V_f   distance   Q_f(s, a)   share of steps")
    for k, value, gap, taken, share in warning_table(proco.load_run(folder), proco.load_cost(cfg.task), rows["clone"]):
        print(f"   {k:2d}  {value:.4f}     {gap:.4f}      {taken:.4f}   {share:.2%}")


def write_table(path, rows):
    """A CSV file from dicts; what a row lacks stays empty."""
    with proco.whole(path) as part, open(part, "w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        table.writeheader()
        table.writerows(rows)


SCORES = ("return", "cost", "violation_free", "normalized_return", "cost_at_10", "cost_at_20", "cost_at_40")


def finished_run(cfg):
    """The evaluation episodes of a run, from disk if it is there and else trained: (episodes, len(SCORES)). Raises
    ProcoError where the run on disk was made with other settings."""
    folder = proco.run_folder(cfg)
    if (folder / "results.json").exists():
        made = json.loads((folder / "config.json").read_text())
        differs = [key for key, value in dataclasses.asdict(cfg).items() if made.get(key) != value and key not in ("device", "out")]
        if differs:
            raise ProcoError(f"{folder} was made with other settings ({', '.join(differs)}); use another --out")
    else:
        print(f"---- {folder}")
        proco.run(cfg, resume=True)
    with open(folder / "episodes.csv") as file:
        ret, cost = np.array([(float(row["return"]), float(row["cost"])) for row in csv.DictReader(file)]).T
    normal = normalised(cfg.task, ret, cost)[0]
    return np.stack([ret, cost, cost == 0, np.full_like(ret, np.nan) if normal is None else normal, cost / 10, cost / 20,
                     cost / 40], -1)


def resampled(values, rng, draws=2000):
    """Bootstrap over seeds and, within each drawn seed, over episodes: values (K, episodes, m) -> means (draws, m)."""
    seeds, episodes, _ = values.shape
    picked = rng.integers(seeds, size=(draws, seeds, 1)), rng.integers(episodes, size=(draws, seeds, episodes))
    return values[picked].mean((1, 2))


def compare(configs):
    """The table of several methods, tasks and seeds: trains what is missing, one run after the other, takes what is
    finished from disk, and writes compare.csv, compare.md and compare.png into --out -> rows, a dict each.

    configs: {(task, method): [Config of each seed]}. Every value is a mean over seeds and episodes with its 95% bootstrap
    interval; "all" is the mean over tasks. Normalised costs of at most 1 (safe at that limit) are bold in the Markdown."""
    values = {key: np.stack([finished_run(cfg) for cfg in runs]) for key, runs in configs.items()}
    rng, means = np.random.default_rng(0), {key: v.mean((0, 1)) for key, v in values.items()}
    draws = {key: resampled(v, rng) for key, v in values.items()}
    tasks, methods = (list(dict.fromkeys(names)) for names in zip(*configs))
    for method in methods if len(tasks) > 1 else ():
        for table in (means, draws):
            table["all", method] = np.mean([table[task, method] for task in tasks], 0)
    rows, lines = [], ["| task | method | " + " | ".join(SCORES).replace("_", " ") + " |", "| --- " * (2 + len(SCORES)) + "|"]
    for task, method in means:
        low, high = np.percentile(draws[task, method], [2.5, 97.5], axis=0)
        rows.append(dict(task=task, method=method, seeds=max(map(len, configs.values()))))
        cells = []
        for name, mean, a, b in zip(SCORES, means[task, method], low, high):
            rows[-1] |= {name: mean, f"{name}_low": a, f"{name}_high": b}
            digits = 2 if "norm" in name or "free" in name or "_at_" in name else 1
            text = f"{mean:.{digits}f} [{a:.{digits}f}, {b:.{digits}f}]" if np.isfinite(mean) else "-"
            cells.append(f"**{text}**" if "_at_" in name and mean <= 1 else text)
        lines.append(f"| {task} | {method} | " + " | ".join(cells) + " |")
    folder = Path(next(iter(configs.values()))[0].out)
    write_table(folder / "compare.csv", rows)
    with proco.whole(folder / "compare.md") as part:
        part.write_text("\n".join(lines) + "\n")
    draw_comparison(rows, folder / "compare.png")
    print("\n".join(lines), f"{folder}/compare.csv, .md and .png", sep="\n")
    return rows
