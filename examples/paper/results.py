"""What runs gave: one JSON file for an experiment, the next run to do, a table.

Several programs may write one file, each its own runs.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

#: A run as JSON holds it: method, rate, seed, cost, curve and more.
Run = dict[str, Any]
#: Head of a column -> the number of a run that stands there, or None where it has none. By the
#: first column methods are compared within a seed.
Columns = Mapping[str, Callable[[Run], float | None]]


@dataclasses.dataclass
class Results:
    """The runs that are done, in a file that is written anew after each.

    Attributes:
      path: of the file.
      setting: what all its runs have in common.
      runs: in the order in which they were done.
      times: method -> what a step took, on a device that did nothing else.
    """

    path: pathlib.Path
    setting: dict[str, Any]
    runs: list[Run] = dataclasses.field(default_factory=list)
    times: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: pathlib.Path, setting: dict[str, Any] | None = None) -> "Results":
        """Reads the file, or begins one.

        Raises:
          ValueError: the file is of another setting.
        """
        if not path.exists():
            return cls(path, setting or {})
        fields = json.loads(path.read_text())
        if setting is not None and fields["setting"] != setting:
            names = {*setting, *fields["setting"]}
            unlike = [n for n in sorted(names) if setting.get(n) != fields["setting"].get(n)]
            told = ", ".join(
                f"{n} {fields['setting'].get(n)}, not {setting.get(n)}" for n in unlike
            )
            raise ValueError(f"{path} is of another setting: {told}. Give another --json.")
        return cls(path, fields["setting"], fields["runs"], fields["times"])

    def add(self, run: Run | None = None, times: Mapping[str, dict[str, Any]] = {}) -> None:
        """Adds a run, or times, to what the file holds by now, and writes it whole."""
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            there = Results.open(self.path, self.setting)
            self.runs = there.runs + ([run] if run else [])
            self.times = {**there.times, **times}
            scratch = self.path.with_suffix(".partial")
            rows = ",\n".join("  " + json.dumps(run) for run in self.runs)
            timed = ",\n".join(
                f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in self.times.items()
            )
            scratch.write_text(
                f'{{"setting": {json.dumps(self.setting)},\n "times": {{\n{timed}\n}},\n'
                f' "runs": [\n{rows}\n]}}\n'
            )
            os.replace(scratch, self.path)

    def of(self, method: str, **wanted: Any) -> list[Run]:
        """The runs of one method that have these fields."""
        return [
            run
            for run in self.runs
            if run["method"] == method and all(run[k] == v for k, v in wanted.items())
        ]

    def next_of(self, method: str, start: float, seeds: Sequence[int]) -> tuple[float, int] | None:
        """(learning rate, seed) of the run to do next, or None where all is done.

        The first seed finds the rate: from `start`, or from what was tried, by factors of two, as
        long as the best lies at an end. The other seeds then have that rate.

        Raises:
          ValueError: at every rate, however small, training diverged.
        """
        first, *others = seeds
        costs = {run["rate"]: run["cost"] for run in self.of(method, seed=first)}
        if not costs:
            return start, first
        best = chosen(costs)
        if best is None:
            if len(costs) > 12:
                raise ValueError(f"{method} diverged at every rate from {min(costs):g} on.")
            return min(costs) / 2, first
        if best == max(costs):
            return 2 * best, first
        if best == min(costs):
            return best / 2, first
        done = {run["seed"] for run in self.of(method, rate=best)}
        return next(((best, seed) for seed in others if seed not in done), None)

    def rates(self, method: str) -> dict[float, float | None]:
        """Rate -> cost, of the seed that chooses among them; in rising order."""
        runs = self.of(method, seed=self.setting["seed"])
        return {run["rate"]: run["cost"] for run in sorted(runs, key=lambda run: run["rate"])}

    def best(self, method: str) -> list[Run]:
        """The runs of all seeds but the first at the rate that the first found best.

        The seed that chose the rate has seen its luck; it stands in only while it is alone. Runs
        that diverged have nothing to tell but that; `table` counts them.
        """
        if (rate := chosen(self.rates(method))) is None:
            return []
        runs = [run for run in self.of(method, rate=rate) if run["cost"] is not None]
        return [run for run in runs if run["seed"] != self.setting["seed"]] or runs

    @property
    def methods(self) -> list[str]:
        """Those that have a run that did not diverge, by the mean of what rates are chosen by."""
        found = {run["method"]: [x["cost"] for x in self.best(run["method"])] for run in self.runs}
        return sorted((m for m in found if found[m]), key=lambda m: float(np.mean(found[m])))


def chosen(costs: Mapping[float, float | None]) -> float | None:
    """The rate that costs least, of several the middle one; None where all diverged.

    >>> chosen({1: 2.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: None}), chosen({1: None})
    (4, None)
    """
    finite = {rate: cost for rate, cost in costs.items() if cost is not None}
    best = sorted(rate for rate, cost in finite.items() if cost == min(finite.values()))
    return best[(len(best) - 1) // 2] if best else None


def spread(numbers: Iterable[float | None], form: str) -> str:
    """Mean, and where they differ, the lowest and the highest.

    >>> spread([0.5, 0.25], ".0%"), spread([2, 2], ".1f"), spread([None], ".1f")
    ('38% (25% to 50%)', '2.0', '')
    """
    found = [number for number in numbers if number is not None and np.isfinite(number)]
    if not found:
        return ""
    mean, low, high = (f"{x:{form}}" for x in (np.mean(found), min(found), max(found)))
    return mean if low == high else f"{mean} ({low} to {high})"


def table(results: Results, columns: Columns) -> str:
    """Markdown: a line for each method; a column's format follows its head after a bar.

    The grid of rates is shown with what each cost, the chosen one in bold type.
    """
    cells: dict[str, list[str]] = {}
    for head, number in columns.items():
        name, _, form = head.partition("|")
        found = [
            spread(
                [number(results.times.get(method, {}) | run) for run in results.best(method)], form
            )
            for method in results.methods
        ]
        if any(found):  # of steps, say, that nobody has timed there is no column
            cells[name] = found
    lines = ["| method | " + " | ".join(cells) + " | seeds | rates: cost |"]
    lines.append("| --- " * (len(cells) + 3) + "|")
    for place, method in enumerate(results.methods):
        runs = results.best(method)
        costs = {
            rate: f"{rate:g}: " + ("diverged" if cost is None else f"{cost:.4g}")
            for rate, cost in results.rates(method).items()
        }
        grid = ", ".join(
            f"**{cost}**" if rate == runs[0]["rate"] else cost for rate, cost in costs.items()
        )
        seeds = f"{len(runs)}" if runs[0]["seed"] != results.setting["seed"] else "the first"
        if lost := len(results.of(method, rate=runs[0]["rate"], cost=None)):
            seeds += f", {lost} diverged"
        row = " | ".join(found[place] for found in cells.values())
        lines.append(f"| {method} | {row} | {seeds} | {grid} |")
    return "\n".join(lines)


#: Of every experiment.
COST: Columns = {
    "trained|,.0f": lambda run: run["trained"],
    "ms a step|.1f": lambda run: run.get("milliseconds"),
    "GB|.1f": lambda run: run.get("gigabytes"),
}


def note(results: Results) -> str:
    """How many seeds stand behind a figure, and where some are missing, that they are."""
    found = [results.best(method) for method in results.methods]
    counts = [sum(run["seed"] != results.setting["seed"] for run in runs) for runs in found]
    low, high = min(counts, default=0), max(counts, default=0)
    if low < max(3, high):
        return f"partial: {low} to {high} seeds"
    return f"{low} seeds"
