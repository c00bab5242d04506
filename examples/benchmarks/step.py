"""Times the whole training step of Llama-3-8B-shaped layers, adapted, over the frozen baseline.

    python3 examples/benchmarks/step.py                  # half an hour of compiling on a large GPU
    python3 examples/benchmarks/step.py --tokens 4096 --rank 8 --no-remat --placements auto
    python3 run.py step --tiny --tokens 64 --rank 2      # any machine: does it run?

The first two want an environment with JAX for the accelerator; `run.py` makes one for the CPU.

The *frozen baseline* is the same step with the base frozen and no adapter: forward and input
gradients, which every method that trains through a frozen model pays. All variants of a row run in
one process on the same weights, one after the other, several times; each figure is the median of
these repeats.

Columns: ms a step; its ratio to the baseline of the same repeat (median, lowest and highest);
temp memory of the compiled step in GB; seconds to compile it, the tuning of its products included;
trained parameters.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from tqdm import tqdm

import mora_jax
from benchmarks.layers import Layers, Variant, make_layers, make_params, make_step

SCHEMES = {
    "lora": mora_jax.LowRank(),
    "sharing": mora_jax.Sharing(),
    "shift": mora_jax.Sharing(shift=1),
    "rotation": mora_jax.Rotation(),
    "cycled": mora_jax.Rotation(wrap=True),
}
PLACEMENTS = ("kernel", "activation", "auto")
LONGEST_SEQUENCE = 4096


def machine() -> dict[str, str]:
    """What a figure depends on besides the code."""
    return {
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "mora_jax": mora_jax.__version__,
    }


class Run:
    """One compiled variant with its own adapters and optimizer state."""

    def __init__(self, base: Layers, variant: Variant, params: Any, x: jax.Array):
        """Traces the step; `params` are shared with the other variants and never donated."""
        step, plan, optimizer = make_step(base, variant, x)
        self.frozen, trainable = params, {"params": {}}
        if plan is not None:
            full = mora_jax.attach(plan, params, key=jax.random.key(1))
            trainable["params"], self.frozen = mora_jax.split(full, plan)
        self.name, self.x = variant.name, x
        self.trained = 0 if plan is None else plan.trained_parameters
        self.state = (trainable, optimizer.init(trainable))
        self.lowered = step.lower(*self.state, self.frozen, x)

    def compile(self) -> "Run":
        """Compiles what was traced."""
        start = time.perf_counter()
        self.step = self.lowered.compile()
        self.compile_s = time.perf_counter() - start
        memory = self.step.memory_analysis()
        self.temp_gb = memory.temp_size_in_bytes / 1e9 if memory else float("nan")
        return self

    def seconds(self, steps: int) -> float:
        """Mean seconds a step over some steps in a row."""
        start = time.perf_counter()
        value = None
        for _ in range(steps):
            *self.state, value, _ = self.step(*self.state, self.frozen, self.x)
        jax.block_until_ready((self.state, value))
        return (time.perf_counter() - start) / steps


def variants(args: argparse.Namespace, rank: int) -> list[Variant]:
    """The baseline first, then every scheme in every placement, plain and with DoRA if asked."""
    found = [Variant("baseline", None)]
    for scheme, placement, path in itertools.product(args.schemes, args.placements, args.paths):
        config = mora_jax.MoRAConfig(
            rank=rank, scheme=SCHEMES[scheme], placement=placement, targets=".*_proj",
            size_multiple=args.size_multiple,
        )  # fmt: skip
        name = placement if path == "module" else f"{placement}, {path}"
        found.append(Variant(f"{scheme} {name}", config, path))
        if args.dora:
            config = dataclasses.replace(config, dora=True)
            found.append(Variant(f"{scheme} {name}, DoRA", config, path))
    return found


def measure(args: argparse.Namespace, tokens: int, rank: int, remat: bool) -> list[dict[str, Any]]:
    """Rows of the table for one setting."""
    base = make_layers(args.tiny, remat=remat, scan=args.scan)
    length = min(tokens, LONGEST_SEQUENCE)
    shape = (tokens // length, length, base.config.features)
    params = make_params(base, jax.ShapeDtypeStruct(shape, base.dtype))
    x = jax.random.normal(jax.random.key(2), shape, base.dtype)
    title = f"{tokens} tokens, rank {rank}, {'remat' if remat else 'no remat'}"
    if args.size_multiple > 1:
        title += f", sizes in multiples of {args.size_multiple}"
    runs = [Run(base, v, params, x) for v in tqdm(variants(args, rank), f"{title}: trace")]
    with concurrent.futures.ThreadPoolExecutor(args.compile_threads) as pool:
        compiled = pool.map(Run.compile, runs)
        runs = list(tqdm(compiled, f"{title}: compile", len(runs)))
    for run in runs:
        run.seconds(1)
    steps = max(1, round(args.repeat_seconds / runs[0].seconds(2)))
    times = collections.defaultdict(list)
    for _ in tqdm(range(args.repeats), f"{title}: time"):
        for run in runs:
            times[run.name].append(run.seconds(steps))
    rows = []
    for run in runs:
        ratios = [a / b for a, b in zip(times[run.name], times["baseline"], strict=True)]
        scheme, _, placement = run.name.partition(" ")
        row = {
            "tokens": tokens,
            "rank": rank,
            "remat": remat,
            "size_multiple": args.size_multiple,
            "scheme": scheme,
            "placement": placement,
            "ms": statistics.median(times[run.name]) * 1e3,
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "temp_gb": run.temp_gb,
            "temp_ratio": run.temp_gb / runs[0].temp_gb,
            "compile_s": run.compile_s,
            "trained": run.trained,
        }
        rows.append(row)
    print(f"\n{title}; {args.repeats} repeats of {steps} steps")
    print(
        f"{'':30}{'ms':>9}{'x baseline':>12}{'low':>7}{'high':>7}{'temp GB':>9}{'x':>6}"
        f"{'compile':>9}{'trained':>12}"
    )
    for row in rows:
        print(
            f"{row['scheme'] + ' ' + row['placement']:30}{row['ms']:9.2f}{row['ratio']:12.3f}"
            f"{row['low']:7.3f}{row['high']:7.3f}{row['temp_gb']:9.2f}{row['temp_ratio']:6.2f}"
            f"{row['compile_s']:8.1f}s{row['trained']:12,}"
        )
    return rows


def draw(rows: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """Bars of time over the baseline: a group for each setting, a bar for each scheme in "auto"."""
    from matplotlib import pyplot as plt

    settings = sorted({(r["tokens"], r["rank"], r["remat"]) for r in rows})
    bars = [r for r in rows if r["placement"] == "auto"]
    schemes = list(dict.fromkeys(r["scheme"] for r in bars))
    figure, axes = plt.subplots(figsize=(1.2 + 1.5 * len(settings), 3.6), layout="constrained")
    width = 0.8 / max(len(schemes), 1)
    for place, scheme in enumerate(schemes):
        at = {(r["tokens"], r["rank"], r["remat"]): r for r in bars if r["scheme"] == scheme}
        chosen = [(i, at[s]) for i, s in enumerate(settings) if s in at]
        heights = [100 * (r["ratio"] - 1) for _, r in chosen]
        spread = [
            [100 * (r["ratio"] - r["low"]) for _, r in chosen],
            [100 * (r["high"] - r["ratio"]) for _, r in chosen],
        ]
        label = "LoRA" if scheme == "lora" else scheme
        x = [i + (place - (len(schemes) - 1) / 2) * width for i, _ in chosen]
        axes.bar(x, heights, width * 0.9, yerr=spread, label=label)
    labels = [f"{t // 1024}k tokens\nrank {r}{', remat' if m else ''}" for t, r, m in settings]
    axes.set_xticks(range(len(settings)), labels)
    axes.set_ylabel("% of the frozen step, added")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(schemes))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Reads the flags, measures every setting, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--remat", action=argparse.BooleanOptionalAction, help="default: both")
    parser.add_argument("--size-multiple", type=int, default=1, help="as in MoRAConfig")
    parser.add_argument("--scan", action="store_true", help="scan over the layers")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS), choices=PLACEMENTS)
    parser.add_argument(
        "--paths", nargs="+", default=["module"], choices=["module", "function", "merge"],
        help="how adapters get into the model",
    )  # fmt: skip
    parser.add_argument("--dora", action="store_true", help="each also with a magnitude (DoRA)")
    parser.add_argument("--repeats", "--turns", type=int, default=5)
    parser.add_argument(
        "--repeat-seconds", "--turn-seconds", type=float, default=0.5, help="of each variant"
    )
    parser.add_argument(
        "--compile-threads", type=int, default=1, help="more is sooner, but tunes products badly"
    )
    parser.add_argument("--tiny", action="store_true", help="two layers of 64 features")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all rows")
    parser.add_argument("--picture", type=pathlib.Path, help="where to draw them")
    args = parser.parse_args()
    if any(tokens % min(tokens, LONGEST_SEQUENCE) for tokens in args.tokens):
        parser.error(f"--tokens: more than {LONGEST_SEQUENCE} are whole sequences of as many")
    remats = [False, True] if args.remat is None else [args.remat]
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    rows = []
    for tokens, rank, remat in itertools.product(args.tokens, args.rank, remats):
        rows += measure(args, tokens, rank, remat)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    if args.picture:
        draw(rows, args.picture, f"A training step over the frozen baseline, {machine()['device']}")


if __name__ == "__main__":
    main()
