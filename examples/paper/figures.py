"""Drawings of results: curves by step, and dots, one for each seed."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paper.results import COST, Columns, Results, Run, note


def ranked(results: Results, number: Callable[[Run], float | None]) -> list[str]:
    """The methods that have a column's number, the one with the lowest mean first."""
    found = {m: [number(run) for run in results.best(m)] for m in results.methods}
    whole = [method for method in found if None not in found[method]]
    return sorted(whole, key=lambda method: np.array(found[method], float).mean())


def draw_dots(
    axes: Any, results: Results, methods: Sequence[str], number: Callable[[Run], float | None]
) -> None:
    """A line for each method, the first on top, with a dot for each seed, of a column's number.

    Hollow where the seed that chose the rate is still the only one.
    """
    for place, method in enumerate(methods):
        for run in results.best(method):
            fill = "none" if run["seed"] == results.setting["seed"] else "C0"
            if (found := number(run)) is not None:
                axes.plot(found, place, "o", color="C0", markerfacecolor=fill)
    axes.set_yticks(range(len(methods)), methods, fontsize=9)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="y", linewidth=0.3)
    axes.locator_params(axis="x", nbins=6)
    axes.spines[["top", "right"]].set_visible(False)


def dot_panels(results: Results, methods: Sequence[str], columns: Columns) -> tuple[Any, Any]:
    """(figure, axes): a panel of dots for each column that any method has, its head below."""
    from matplotlib import pyplot as plt

    columns = {
        head: number
        for head, number in columns.items()
        if any(number(run) is not None for method in methods for run in results.best(method))
    }
    size = 12, 1.2 + 0.28 * len(methods)
    figure, axes = plt.subplots(
        1, len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (head, number) in zip(axes[0], columns.items(), strict=True):
        draw_dots(axis, results, methods, number)
        axis.set_xlabel(head)
    return figure, axes[0]


def draw_curves(axes: Any, results: Results, methods: Sequence[str], name: str) -> None:
    """A measure by step: the mean over the seeds, and between its lowest and highest a shade.

    Leaves out step 0, where all methods are one, and so far from the end that no more would show.
    """
    from matplotlib import pyplot as plt

    colors = plt.get_cmap("tab20")([*range(0, 20, 2), *range(1, 20, 2)])  # strong ones, then pale
    for number, method in enumerate(methods):
        runs = results.best(method)
        curves = [[found for found in run["curve"] if found["step"]] for run in runs]
        steps = [measures["step"] for measures in curves[0] if name in measures]
        values = np.array([[m[name] for m in curve if name in m] for curve in curves])
        axes.plot(steps, values.mean(0), color=colors[number], label=method)
        axes.fill_between(steps, values.min(0), values.max(0), color=colors[number], alpha=0.2)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)


def draw_tests(results: Results, columns: Columns, path: pathlib.Path) -> None:
    """Writes dots of what is measured at the end, ranked by the first column that has numbers."""
    panels = {head.partition("|")[0]: columns[head] for head in columns if head not in COST}
    rankings = [ranked(results, number) for number in panels.values()]
    figure, _ = dot_panels(results, next(filter(None, rankings)), panels)
    figure.suptitle(f"{results.setting['model']}; {note(results)}", fontsize=9)
    figure.savefig(path, dpi=120)
