"""What a fine-tuning leaves: adapters, merged model, summary, answers, figure."""

import argparse
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

import mora_jax
from finetune.held_out import HeldOut
from finetune.prompts import Pair
from llama.loading import load_hf
from llama.model import Llama
from mora_jax import checkpoint, export
from train import log as train_log

#: What is counted as right -> how a reader is told.
LABELS = {"exact": "whole\nanswer", "last_number": "last\nnumber"}


def save_models(
    args: argparse.Namespace,
    out: pathlib.Path,
    params: Any,
    plan: mora_jax.Plan | None,
    base_model: Llama,
    held_out: HeldOut,
) -> dict[str, Any]:
    """Saves adapters and merged model; gives their sizes, and the loss of the latter, read back."""
    sizes, base = {}, held_out.base
    adapters, merged = out / "adapters", out / "merged"
    for folder in (adapters, merged):
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier end of this run
    if plan is not None:
        checkpoint.save_adapters(adapters, params, plan)
        sizes["adapter_bytes"] = _bytes(adapters)
    ends = {"eos_token_id": base.end_token}
    config = args.model if args.model != "smollm2" else base.config.to_hf() | ends
    export.save_merged(merged, params, plan, config=config)
    if args.model == "smollm2":  # a directory's tokenizer is copied with the rest
        base.tokenizer.save(str(merged / "tokenizer.json"))
    _, again = load_hf(merged, args.param_dtype)
    loss = held_out.loss(base_model, again)
    return sizes | {"merged_bytes": _bytes(merged), "loss_merged": loss}


def _bytes(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write(
    args: argparse.Namespace,
    out: pathlib.Path,
    summary: Mapping[str, Any],
    pairs: Sequence[Pair],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    """Writes summary.json, finetune.png and, where answers were generated, answers.jsonl."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    accuracies: dict[str, dict[str, float]] = {}
    if before and after:
        accuracies |= zip(("before", "after"), summary["accuracy"], strict=True)
        names = ("prompt", "response", *accuracies)
        with (out / "answers.jsonl").open("w") as file:
            for pair, *answers in zip(pairs, before, after, strict=True):
                file.write(json.dumps(dict(zip(names, (*pair, *answers), strict=True))) + "\n")
    how = {"mora": f"MoRA {args.scheme}, rank {args.rank}", "lora": f"LoRA, rank {args.rank}"}
    title = f"{args.model}, {how.get(args.method, 'all parameters')}, learning rate {args.lr:g}"
    losses = args.csv, out / "evaluations.csv"
    plot(*losses, accuracies, len(pairs), title, out / "finetune.png")


def plot(
    metrics: pathlib.Path,
    evaluations: pathlib.Path,
    accuracies: Mapping[str, Mapping[str, float]],
    items: int,
    title: str,
    path: pathlib.Path,
) -> None:
    """Draws the loss of training and of held-out pairs, and accuracy before and after.

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

    ratios = [5, 2] if accuracies else [1]
    figure, axes = pyplot.subplots(
        1, len(ratios), figsize=(7.2, 3.4), layout="constrained", width_ratios=ratios, squeeze=False
    )
    steps, losses = _columns(metrics)
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    left = axes[0, 0]
    left.plot(steps, losses, color="tab:gray", alpha=0.3, linewidth=0.8)
    label = f"training, mean of {window} steps" if window > 1 else "training"
    left.plot(steps[window - 1 :], smooth, color="tab:gray", label=label)
    left.plot(*_columns(evaluations), "o-", color="tab:blue", markersize=3, label="held out")
    left.set(xlabel="step", ylabel="cross-entropy of response tokens")
    left.legend(frameon=False)
    for place, (when, parts) in enumerate(accuracies.items()):
        at = np.arange(len(LABELS)) + 0.4 * place
        heights = [100 * parts[name] for name in LABELS]
        color = ["tab:gray", "tab:blue"][place]
        drawn = axes[0, 1].bar(at, heights, 0.38, label=when, color=color)
        axes[0, 1].bar_label(drawn, fmt="%.1f", fontsize=8)
    if accuracies:
        axes[0, 1].set_xticks(np.arange(len(LABELS)) + 0.2, list(LABELS.values()))
        highest = max(max(parts.values()) for parts in accuracies.values())
        axes[0, 1].set_ylim(0, max(1, 130 * highest))
        axes[0, 1].set_ylabel(f"right of {items} generated, %")
        axes[0, 1].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _columns(path: pathlib.Path) -> tuple[list[int], list[float]]:
    rows = train_log.read(path)
    return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
