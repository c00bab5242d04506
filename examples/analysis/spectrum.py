"""Prints and draws the singular values that adapters have learned, side by side.

    python3 run.py spectrum results/memorize/adapters          # what examples/memorize.py saved
    python3 run.py spectrum mora=results/mora/adapters lora=results/lora/adapters --out spectrum.png

Each argument is a directory of `mora_jax.checkpoint.save_adapters`, with a label before it or
without. The base is SmolLM2 or, with `--model`, a directory in Hugging Face's layout: the one that
the adapters were trained beside.
"""

import argparse
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import matplotlib
import numpy as np

import mora_jax
from llama import pretrained
from mora_jax import checkpoint


def parse_args() -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = argparse.ArgumentParser(
        description="Singular values of trained adapters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("adapters", nargs="+", help="a directory, or label=directory")
    parser.add_argument("--model", type=pathlib.Path, help="a directory in Hugging Face's layout")
    parser.add_argument("--dtype", default="bfloat16", help="of the base model")
    parser.add_argument("--threshold", type=float, default=0.1, help="what is counted lies above")
    parser.add_argument("--title", default="", help="of the figure")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/spectrum.png"))
    return parser.parse_args()


def draw(reports: dict[str, mora_jax.SpectrumReport], threshold: float, title: str):
    """A figure: counts above any threshold, and above the one by kind of layer.

    Layers whose paths differ in a number alone are of one kind.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (any_axis, one_axis) = pyplot.subplots(
        1, 2, figsize=(9, 3.6), layout="constrained", gridspec_kw={"width_ratios": [3, 4]}
    )
    spectra = {label: [*report.layers.values()] for label, report in reports.items()}
    top = max(layer.singular_values.max() for found in spectra.values() for layer in found)
    thresholds = np.geomspace(min(threshold, top) / 10, max(threshold, top), 200)
    width = 0.8 / len(reports)
    for number, (label, report) in enumerate(reports.items()):
        counts = [np.mean([x.count(t) for x in spectra[label]]) for t in thresholds]
        any_axis.plot(thresholds, counts, label=f"{label}: {report.mean_count:.1f}")
        kinds: dict[str, list[int]] = {}
        for name, layer in report.layers.items():
            kind = re.sub(r"\[?\d+\]?", "*", name).strip("*").rpartition("/")[-1] or "(root)"
            kinds.setdefault(kind, []).append(layer.count(threshold))
        mean, low, high = np.array([(np.mean(x), min(x), max(x)) for x in kinds.values()]).T
        at = np.arange(len(kinds)) + (number - (len(reports) - 1) / 2) * width
        one_axis.bar(at, mean, width, yerr=(mean - low, high - mean),
                     error_kw={"linewidth": 0.8, "alpha": 0.6}, label=label)  # fmt: skip
        one_axis.set_xticks(range(len(kinds)), kinds, rotation=30)
    any_axis.axvline(threshold, color="tab:gray", linestyle=":", linewidth=1)
    any_axis.set(xscale="log", xlabel="threshold", ylim=(0, None))
    any_axis.set_ylabel("singular values above it, mean of layers")
    any_axis.legend(fontsize=8, title=f"above {threshold:g}", title_fontsize=8)
    one_axis.set_ylabel(f"above {threshold:g}: mean, lowest, highest")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def main() -> None:
    """Loads, prints, draws."""
    args = parse_args()
    base = pretrained.load(args.model, args.dtype).params
    reports, summary = {}, {}
    for argument in args.adapters:
        label, found, directory = argument.partition("=")
        if not found:
            label, directory = argument, argument
        params, plan = checkpoint.load_adapters(directory, base)
        reports[label] = report = mora_jax.spectrum(params, plan, threshold=args.threshold)
        layers = report.layers.values()
        summary[label] = {
            "layers": len(report.layers),
            "trained_parameters": plan.trained_parameters,
            "count": report.mean_count,
            "effective_rank": float(np.mean([layer.effective_rank for layer in layers])),
            "norm": float(np.mean([layer.norm for layer in layers])),
            "relative_norm": float(np.mean([layer.relative_norm for layer in layers])),
        }
        print(f"{label}\n{report}\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(reports, args.threshold, args.title).savefig(args.out, dpi=150)
    print(json.dumps({"threshold": args.threshold, "jax": jax.__version__, **summary}))
    print(args.out)


if __name__ == "__main__":
    main()
