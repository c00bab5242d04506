"""Draws a fine-tuning: the loss of training and of held-out pairs, accuracy before and after."""

import pathlib
from collections.abc import Mapping

import matplotlib
import numpy as np

import train_log

#: What is counted as right -> how a reader is told.
LABELS = {"exact": "answer", "last_number": "last number"}


def plot(
    metrics: pathlib.Path,
    evaluations: pathlib.Path,
    accuracies: Mapping[str, Mapping[str, float]],
    items: int,
    title: str,
    path: pathlib.Path,
) -> None:
    """Writes the figure.

    Args:
      metrics: CSV with columns step and loss, of every step.
      evaluations: likewise, of held-out pairs.
      accuracies: {"before": {"exact": 0.1, ...}, "after": {...}}; empty if none were measured.
      items: how many prompts were answered.
      title: of the figure.
      path: of the PNG file.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot

    ratios = [3, 1] if accuracies else [1]
    figure, axes = pyplot.subplots(
        1, len(ratios), figsize=(7.2, 3.4), layout="constrained", width_ratios=ratios, squeeze=False
    )
    steps, losses = _columns(metrics)
    held_out_steps, held_out = _columns(evaluations)
    losses_axis = axes[0, 0]
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    losses_axis.plot(steps, losses, color="tab:gray", alpha=0.3, linewidth=0.8)
    losses_axis.plot(
        steps[window - 1 :], smooth, color="tab:gray", label=f"training, mean of {window} steps"
    )
    losses_axis.plot(held_out_steps, held_out, "o-", markersize=3, label="held out")
    losses_axis.set(xlabel="step", ylabel="cross-entropy of response tokens")
    losses_axis.legend(frameon=False)
    if accuracies:
        bars = axes[0, 1]
        for place, (when, parts) in enumerate(accuracies.items()):
            at = np.arange(len(LABELS)) + 0.4 * place
            heights = [100 * parts[name] for name in LABELS]
            drawn = bars.bar(at, heights, 0.38, label=when, color=["tab:gray", "tab:blue"][place])
            bars.bar_label(drawn, fmt="%.1f", fontsize=8)
        bars.set_xticks(np.arange(len(LABELS)) + 0.2, list(LABELS.values()))
        bars.set_ylabel(f"right of {items} by generation, %")
        bars.margins(y=0.15)
        bars.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _columns(path: pathlib.Path) -> tuple[list[int], list[float]]:
    rows = train_log.read(path)
    return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
