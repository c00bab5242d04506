"""What merging gains from scratch, over all sizes and lengths: one row for each pair of runs.

`report.py` writes the table and draws the figure, from the JSON that `pretrain.py` wrote. MoRA that
is never merged is compared to ReMoRA by `"signs"`, each at its own rate, within a seed.
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import mora_jax
from mora_jax import Sharing
from paper.differences import paired
from paper.pretrain import parameters_of
from paper.recipes import RECIPES
from paper.results import Results
from train.flags import PRESETS

#: Methods that merge at all times, at every second and at every fourth.
MERGED = "signs", "signs every 2nd", "signs every 4th"


class Gain(NamedTuple):
    """MoRA's loss, and what is added to it by merging.

    Attributes:
      parameters: of the model.
      width: of M, as a part of a square layer's.
      seen: bytes that were trained on, for each parameter of the model; repeated ones count again.
      interval: steps from one merge to the next.
      merges: how many there were.
      loss: of MoRA, a byte's, a mean over seeds.
      change: of the loss, by merging; below 0 it helps.
      error: of the change, its standard error.
      seeds: in all of them.
    """

    parameters: int
    width: float
    seen: float
    interval: int
    merges: int
    loss: float
    change: float
    error: float
    seeds: int


def gains_of(results: Results) -> list[Gain]:
    """One for each way to merge that has run with MoRA's seeds, two or more."""
    setting, found = results.setting, list[Gain]()
    told = {
        method: {
            run["seed"]: run["curve"][-1]["test"]
            for run in results.best(method)
            if run["seed"] != setting["seed"]
        }
        for method in ("MoRA", *MERGED)
    }
    plain, features = told.pop("MoRA"), PRESETS[setting["model"]].features
    parameters = parameters_of(setting)
    for method, losses in told.items():
        if losses.keys() != plain.keys() or len(plain) < 2:
            continue
        change, error = paired(losses, plain)
        interval = setting["merge_every"] * int(RECIPES[method].merges)
        gain = Gain(
            parameters=parameters,
            width=mora_jax.square_rank(features, features, setting["rank"], Sharing()) / features,
            seen=setting["steps"] * setting["batch"] * setting["length"] / parameters,
            interval=interval,
            merges=len(mora_jax.merge_steps(setting["steps"], interval)),
            loss=sum(plain.values()) / len(plain),
            change=change,
            error=error,
            seeds=len(plain),
        )
        found.append(gain)
    return found


def table(gains: Sequence[Gain]) -> str:
    """In Markdown, the largest models first, then the widest M, then the longest runs."""
    lines = [
        "| parameters, millions | M, of a square layer's width | bytes read for each parameter "
        "| steps between merges | merges | MoRA's loss | by merging | of the loss |",
        "| --- " * 8 + "|",
    ]
    for gain in sorted(gains, reverse=True):
        few = "" if gain.seeds > 2 else f", {gain.seeds} seeds"
        cells = [
            f"{gain.parameters / 1e6:.3g}",
            f"{gain.width:.2f}",
            f"{gain.seen:.2g}",
            f"{gain.interval}",
            f"{gain.merges}",
            f"{gain.loss:.4f}",
            f"{gain.change:+z.4f} ({gain.error:.4f}){few}",
            f"{gain.change / gain.loss:+z.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rounded_width(gain: Gain) -> float:
    """M's width, of a square layer's, in twentieths: M's side is a whole number."""
    return round(20 * gain.width) / 20


def draw(gains: Sequence[Gain], path: pathlib.Path) -> None:
    """What merging adds, of the loss, by the bytes that the model has read for each parameter.

    A color for each size of model, a mark for each width of M; beside each, how many merges. Of one
    size and width, runs with as many merges are joined.
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    sizes = sorted({gain.parameters for gain in gains})
    marks = dict(zip(sorted({*map(rounded_width, gains)}), itertools.cycle("osD^v"), strict=False))
    kinds = sorted({(gain.parameters, rounded_width(gain)) for gain in gains})
    for size, width in kinds:
        some = [g for g in gains if (g.parameters, rounded_width(g)) == (size, width)]
        aside = (6, 3) if marks[width] == "o" else (-8, 5)
        color, form = f"C{sizes.index(size)}", f"-{marks[width]}"
        name = f"{size / 1e6:.3g} million, M {width:.2f} of a square layer's width"
        for merges in sorted({gain.merges for gain in some}):
            line = sorted((g for g in some if g.merges == merges), key=lambda gain: gain.seen)
            changes = [100 * gain.change / gain.loss for gain in line]
            errors = [100 * gain.error / gain.loss for gain in line]
            seen = [gain.seen for gain in line]
            axes.errorbar(
                seen, changes, errors, fmt=form, color=color, lw=0.8, capsize=2, label=name
            )
            name = "_"  # once in the legend
            for x, y in zip(seen, changes, strict=True):
                axes.annotate(f"{merges}", (x, y), aside, textcoords="offset points", fontsize=8)
    axes.axhline(0, color="gray", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bytes read for each parameter of the model")
    axes.set_ylabel("change of the loss, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("What merging changes (beside each mark: how many merges); standard errors of "
                   "seeds", fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=120)
    plt.close(figure)
