"""What the runs of pretrain.py gave: one JSON file, the next run to do, a table, a figure."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass
class Results:
    """The runs that are done, in a file that is written anew after each.

    Attributes:
      path: of the file.
      setting: what all its runs have in common.
      runs: as dicts: method, rate, seed, loss, curve, ranks and more.
    """

    path: pathlib.Path
    setting: dict[str, Any]
    runs: list[dict[str, Any]]

    @classmethod
    def open(cls, path: pathlib.Path, setting: dict[str, Any] | None = None) -> "Results":
        """Reads the file, or begins one.

        Raises:
          ValueError: the file is of another setting.
        """
        if not path.exists():
            return cls(path, setting or {}, [])
        fields = json.loads(path.read_text())
        if setting is not None and fields["setting"] != setting:
            there = {k: v for k, v in fields["setting"].items() if setting.get(k) != v}
            raise ValueError(f"{path} is of another setting: {there}. Give another --json.")
        return cls(path, fields["setting"], fields["runs"])

    def add(self, run: dict[str, Any]) -> None:
        """Adds a run and writes the file, whole or not at all."""
        self.runs.append(run)
        scratch = self.path.with_suffix(".partial")
        rows = ",\n".join("  " + json.dumps(run) for run in self.runs)
        scratch.write_text(f'{{"setting": {json.dumps(self.setting)},\n "runs": [\n{rows}\n]}}\n')
        os.replace(scratch, self.path)

    def of(self, method: str, **wanted: Any) -> list[dict[str, Any]]:
        """The runs of one method that have these fields."""
        return [
            run
            for run in self.runs
            if run["method"] == method and all(run[k] == v for k, v in wanted.items())
        ]

    def next_of(
        self, method: str, rates: Sequence[float], seeds: Sequence[int]
    ) -> tuple[float, int] | None:
        """(learning rate, seed) of the run to do next, or None where all is done.

        The first seed finds the rate: the best of `rates`, and beyond them, by factors of two, as
        long as the best lies at an end. The other seeds then have that rate.
        """
        first, *others = seeds
        losses = {run["rate"]: _finite(run["loss"]) for run in self.of(method, seed=first)}
        if left := [rate for rate in rates if rate not in losses]:
            return left[0], first
        best = min(losses, key=lambda rate: losses[rate])
        if best == max(losses):
            return 2 * best, first
        if best == min(losses):
            return best / 2, first
        done = {run["seed"] for run in self.of(method, rate=best)}
        return next(((best, seed) for seed in others if seed not in done), None)

    def best(self, method: str) -> list[dict[str, Any]]:
        """The runs of all seeds but the first at the rate that the first found best."""
        first = self.setting["seeds"][0]
        grid = self.of(method, seed=first)
        if not grid:
            return []
        rate = min(grid, key=lambda run: _finite(run["loss"]))["rate"]
        # The seed that chose the rate has seen its luck; it stands in only while it is alone.
        runs = self.of(method, rate=rate)
        return [run for run in runs if run["seed"] != first] or runs


def _finite(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss


def table(results: Results) -> str:
    """A line for each method, best first; losses as mean, lowest and highest over the seeds."""
    lines = [
        f"{'':16}{'loss':>8}{'low':>8}{'high':>8}{'seeds':>7}{'rate':>10}{'rank':>8}"
        f"{'effective':>11}{'trained':>12}{'s':>7}"
    ]
    for method in ordered(results):
        runs = results.best(method)
        losses = [_finite(run["loss"]) for run in runs]
        mean = lambda name, runs=runs: np.mean([run[name] for run in runs])
        lines.append(
            f"{method:16}{np.mean(losses):8.4f}{min(losses):8.4f}{max(losses):8.4f}{len(runs):7}"
            f"{runs[0]['rate']:10.2g}{mean('rank'):8.1%}{mean('effective_rank'):11.1%}"
            f"{runs[0]['trained']:12,}{mean('seconds'):7.0f}"
        )
    return "\n".join(lines)


def ordered(results: Results) -> list[str]:
    """The methods that have runs, by their mean loss."""
    methods = dict.fromkeys(run["method"] for run in results.runs)
    return sorted(methods, key=lambda m: np.mean([_finite(r["loss"]) for r in results.best(m)]))


def draw(results: Results, path: pathlib.Path) -> None:
    """Held-out loss by step, and the rank of what was learned beside it."""
    from matplotlib import pyplot as plt

    methods = ordered(results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    colors = plt.get_cmap("tab20")(np.linspace(0, 1, 20))
    for place, method in enumerate(methods):
        runs = results.best(method)
        curves = np.array([run["curve"] for run in runs], float)
        steps, losses = curves[0, :, 0], curves[:, :, 1]
        left.plot(steps, losses.mean(0), color=colors[place], label=method)
        left.fill_between(steps, losses.min(0), losses.max(0), color=colors[place], alpha=0.2)
        rank = np.mean([run["effective_rank"] for run in runs])
        final = [run["loss"] for run in runs]
        right.plot([100 * rank] * len(final), final, "o", color=colors[place])
        right.annotate(method, (100 * rank, np.mean(final)), fontsize=7, xytext=(4, 2),
                       textcoords="offset points")  # fmt: skip
    left.set(xlabel="step", ylabel="held-out loss")
    right.set(xlabel="effective rank of the whole update, % of full", ylabel="held-out loss")
    left.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    setting = results.setting
    seeds = max(len(results.best(method)) for method in methods)
    figure.suptitle(
        f"{setting['model']}, rank {setting['rank']}, {setting['steps']:,} steps of "
        f"{setting['batch'] * setting['length']:,} tokens, a merge every {setting['merge_every']}; "
        f"up to {seeds} seeds",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
