"""Times greedy generation, one token a step, with adapters merged and unmerged, over the base.

    python3 run.py generate                    # a minute on a large GPU
    python3 run.py generate --tiny             # any machine, seconds: does it run?

Layers of Llama-3-8B's shape with a key-value cache, random weights. Merged parameters are those of
a base model, so their time is the frozen baseline's; unmerged adapters stay beside the frozen
kernels, as when many of them share one base. All variants run in one process, one after the other,
several times. The prompt is short, and its time is part of the tokens'.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from tqdm import tqdm

import mora_jax
from benchmarks.layers import LLAMA_3_8B, TINY
from benchmarks.step import PLACEMENTS, SCHEMES, machine
from llama.model import Llama, generate


def main() -> None:
    """Reads the flags, times every batch size, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=16, help="tokens before the first new one")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--placements", nargs="+", default=["auto"], choices=PLACEMENTS)
    parser.add_argument("--repeats", "--turns", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="two layers of 64 features")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all rows")
    args = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))

    # A small vocabulary, so that the layers are what is timed.
    config = dataclasses.replace(TINY if args.tiny else LLAMA_3_8B, vocab_size=512)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    base = Llama(config, dtype=dtype, param_dtype=dtype)
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(lambda: base.init(jax.random.key(0), tokens)["params"])()
    variants = {"baseline": (base, params)}
    for scheme in args.schemes:
        for placement in args.placements:
            chosen = mora_jax.MoRAConfig(
                rank=args.rank, scheme=SCHEMES[scheme], placement=placement, targets=".*_proj"
            )
            model = mora_jax.adapt(base, chosen)
            plan = mora_jax.plan(model, tokens)
            adapted = mora_jax.attach(plan, params, key=jax.random.key(1))
            variants[f"{scheme} {placement}"] = (model, adapted)
    # Any scheme merges into the same kind of tree.
    variants["merged"] = (base, mora_jax.merge(adapted, plan))  # pyright: ignore[reportPossiblyUnboundVariable]

    rows = []
    for batch in args.batch:
        prompts = jax.random.randint(jax.random.key(2), (batch, args.prompt), 0, 512)
        mask = jnp.ones(prompts.shape, bool)

        def seconds(name: str, prompts=prompts, mask=mask) -> float:
            model, parameters = variants[name]
            start = time.perf_counter()
            generate(model, parameters, prompts, mask, args.new).block_until_ready()
            return time.perf_counter() - start

        for name in tqdm(variants, f"batch {batch}: compile", leave=False):
            seconds(name)
        times = collections.defaultdict(list)
        for _ in tqdm(range(args.repeats), f"batch {batch}: time", leave=False):
            for name in variants:
                times[name].append(seconds(name) / args.new)
        print(f"\nbatch {batch}, {args.prompt} + {args.new} tokens, rank {args.rank}")
        print(f"{'':22}{'ms a token':>11}{'x baseline':>12}{'low':>7}{'high':>7}")
        for name, values in times.items():
            ratios = [a / b for a, b in zip(values, times["baseline"], strict=True)]
            row = {
                "batch": batch,
                "variant": name,
                "ms": statistics.median(values) * 1e3,
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
            rows.append(row)
            print(
                f"{name:22}{row['ms']:11.3f}{row['ratio']:12.3f}{row['low']:7.3f}{row['high']:7.3f}"
            )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
