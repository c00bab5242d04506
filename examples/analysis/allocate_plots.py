"""The figures of allocate.py: what layers would gain, and how the variants' losses fell."""

import collections
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

import mora_jax


def draw_scores(allocation: mora_jax.Allocation, path: pathlib.Path) -> None:
    """Gains for each parameter and ranks, by kind of layer and depth."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds: dict[str, dict[int, tuple[float, int]]] = collections.defaultdict(dict)
    for name, score in allocation.scores.items():
        kind, number = name.rpartition("/")[-1], re.search(r"\d+", name)
        each = np.ravel(score.gains) / (score.parameters / score.gains.size)
        for index, gain in enumerate(each):
            kinds[kind][index if score.gains.ndim else int(number[0] if number else 0)] = (
                gain, score.rank
            )  # fmt: skip
    depth = 1 + max(max(found) for found in kinds.values())
    grid = np.full((2, len(kinds), depth), np.nan)
    for row, found in enumerate(kinds.values()):
        for column, cell in found.items():
            grid[:, row, column] = cell
    figure, axes = pyplot.subplots(2, 1, figsize=(7, 4), layout="constrained", sharex=True)
    for axis, cells, label in zip(axes, grid, ("gain for a parameter", "rank"), strict=True):
        figure.colorbar(axis.imshow(cells, aspect="auto"), ax=axis, label=label)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes[1].set_xlabel("layer")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def best_rates(runs: Sequence[Mapping[str, Any]], order: Sequence[str]) -> dict[str, float]:
    """Variant -> the best of the rates that all variants have run with all seeds.

    Args:
      runs: lines of `results.jsonl`.
      order: of the variants.
    """
    found = {run["variant"] for run in runs}
    variants = [variant for variant in order if variant in found]
    seeds = {run["seed"] for run in runs}
    done = collections.Counter((run["lr"], run["variant"]) for run in runs)
    rates = [r for r, _ in done if all(done[r, v] == len(seeds) for v in variants)]
    if not rates:
        raise SystemExit(
            "nothing to draw: there is no rate that all variants have run with all seeds"
        )
    loss = collections.Counter()
    for run in runs:
        loss[run["variant"], run["lr"]] += run["loss"]
    return {variant: min(rates, key=lambda rate, v=variant: loss[v, rate]) for variant in variants}


def write_summary(
    runs: Sequence[Mapping[str, Any]], order: Sequence[str], path: pathlib.Path
) -> None:
    """Writes what the table and the figure need: the loss by step at the best rates alone.

    Args:
      runs: lines of `results.jsonl`.
      order: of the variants.
      path: of a JSON file, with a line for each run.
    """
    best = best_rates(runs, order)
    common = {name: runs[0][name] for name in ("flags", "device", "jax")}
    rows = []
    for run in runs:
        row = {name: run[name] for name in ("variant", "seed", "lr", "loss", "trained")}
        if run["lr"] == best[run["variant"]]:
            row["losses"] = [float(f"{loss:.5g}") for loss in run["losses"]]
        rows.append(json.dumps(row, separators=(",", ":")))
    head = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in common.items())
    path.write_text("{" + head + '"runs": [\n' + ",\n".join(rows) + "\n]}\n")


def draw_losses(runs: list[dict[str, Any]], order: Sequence[str], path: pathlib.Path) -> None:
    """Losses of the last twentieth of the steps so far, and over *uniform*'s, by step.

    Each variant at the best of the rates that all have run with all seeds; between the seeds'
    lowest and highest a shade.

    Args:
      runs: lines of `results.jsonl`, or the runs of `write_summary`.
      order: of the variants, *uniform* first.
      path: of the figure.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    smooth: dict[str, np.ndarray] = {}
    for number, (variant, rate) in enumerate(best_rates(runs, order).items()):
        found = [run for run in runs if (run["variant"], run["lr"]) == (variant, rate)]
        losses = np.array([run["losses"] for run in sorted(found, key=lambda run: run["seed"])])
        width = max(1, losses.shape[1] // 20)
        kernel = np.ones(width) / width
        smooth[variant] = np.array([np.convolve(row, kernel, "valid") for row in losses])
        steps = np.arange(width, losses.shape[1] + 1)
        label = f"{variant}, rate {rate:g}"
        ratio = smooth[variant] / smooth.get("uniform", smooth[variant])
        for axis, values in zip(axes, (smooth[variant], ratio), strict=True):
            axis.plot(steps, values.mean(0), color=f"C{number}", label=label)
            axis.fill_between(steps, values.min(0), values.max(0), color=f"C{number}", alpha=0.2)
    axes[0].set(xlabel="step", ylabel="training loss", yscale="log")
    axes[1].set(xlabel="step", ylabel="over uniform's")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
