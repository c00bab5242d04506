"""Compiles the whole training step of Llama 3 for real TPU pods, here, without a TPU.

    python3 examples/benchmarks/pod.py --json pod.json         # half an hour on two cores
    python3 examples/benchmarks/pod.py --models 8b --pods v5p-128 --schemes sharing
    python3 examples/benchmarks/pod.py --tiny                  # eight devices of the CPU, seconds

The first two want an environment with `jax[tpu]`, whose compiler needs no chip. No parameter is
ever allocated: shapes and shardings go in, a compiled program comes out.

A step is embedding, scanned layers with remat, head, cross-entropy, and AdamW on the adapters,
which every chip holds whole (or with --split in parts); the base is bfloat16, sharded as
examples/llama/mesh.py says. The *frozen baseline* is the same step with the base frozen
and no adapter, gradients of the embedded tokens included.
Attention is written in XLA, softmax and all; a kernel of its own would make every step shorter.

Columns, all for one chip: memory of the arguments and at most in use, in GB; products in TFLOP; the
compiler's own estimate for its kernels in millions of cycles, loops multiplied out, and over the
baseline's; its other estimate (`optimal_seconds`, in ms), which counts the body of each loop once
and cannot be taken apart, over the baseline's ("-" where it comes out negative, as on v6e);
collectives of the forward pass alone and of the step, how often each kind runs and GB that enter
it; seconds to compile. Neither estimate has the time of the collectives on the links.

*merge* is `merge_and_reset` on the same shardings, its inputs donated.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
import time
from importlib import metadata
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# The compiler for TPUs is asked for by name; nothing here runs but on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from flax import linen as nn
from tqdm import tqdm

import mora_jax
from benchmarks.compiled import KINDS, Program
from benchmarks.pod_programs import MODELS, PODS, TENSOR, Variant, make_mesh
from benchmarks.step import SCHEMES
from llama.mesh import RULES, batch_sharding
from llama.model import Llama


def measure(lowered: Any) -> tuple[dict[str, Any], Any]:
    """(what one chip holds, sends and computes, compiled program)."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = {
        "argument_gb": arguments / 1e9,
        "temp_gb": temp / 1e9,
        "peak_gb": (arguments + temp + results) / 1e9,
        "tflop": program.product_flops() / 1e12,
        "mcycles": program.cycles() / 1e6,
        "optimal_ms": max(compiled.cost_analysis().get("optimal_seconds", 0), 0) * 1e3,
        "collectives": program.collectives(),
        "compile_s": seconds,
    }
    return found, compiled


def rows_of(variant: Variant, memory_gb: float) -> dict[str, Any]:
    """All figures of one variant."""
    try:
        step, _ = measure(variant.step())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "error": str(error).split("\n")[0]}
    forward, _ = measure(variant.forward())
    row = {"fits": step["peak_gb"] < memory_gb, "forward": forward["collectives"], "step": step}
    if variant.plan is not None:
        lowered, places = variant.merge()
        merge, compiled = measure(lowered)
        alike = jax.tree.map(
            lambda place, out, leaf: place.is_equivalent_to(out, leaf.ndim),
            places, compiled.output_shardings, lowered.out_info,
        )  # fmt: skip
        row["merge"] = {**merge, "shardings_kept": all(jax.tree.leaves(alike))}
    return row


def describe(collectives: dict[str, dict[str, int]]) -> str:
    """Kinds, counts and GB, on one line."""
    items = [
        f"{collectives[kind]['count']} {kind} {collectives[kind]['bytes'] / 1e9:.3g}"
        for kind in KINDS
        if kind in collectives
    ]
    return ", ".join(items) or "none"


def show(title: str, rows: list[dict[str, Any]], memory_gb: float) -> None:
    """Prints the table of one setting."""
    tqdm.write(f"\n{title}")
    tqdm.write(
        f"{'':16}{'args GB':>8}{'peak GB':>8}{'of':>5}{'TFLOP':>9}{'x':>6}{'Mcycles':>9}{'x':>6}"
        f"{'ms, once':>9}{'x':>6}{'compile':>9}"
    )
    frozen = rows[0].get("step")
    for row in rows:
        if "error" in row:
            tqdm.write(f"{row['variant']:16}{row['error']}")
            continue
        step = row["step"]
        ratio = lambda key, step=step: (
            f"{step[key] / frozen[key]:6.3f}"
            if frozen and frozen[key] and step[key]
            else f"{'-':>6}"
        )
        tqdm.write(
            f"{row['variant']:16}{step['argument_gb']:8.2f}{step['peak_gb']:8.2f}{memory_gb:5g}"
            f"{step['tflop']:9.3g}{ratio('tflop')}{step['mcycles']:9.4g}{ratio('mcycles')}"
            f"{step['optimal_ms']:9.4g}{ratio('optimal_ms')}{step['compile_s']:8.1f}s"
        )
    for row in rows:
        if "error" not in row:
            tqdm.write(f"{row['variant']:16}forward: {describe(row['forward'])}")
            tqdm.write(f"{'':16}step:    {describe(row['step']['collectives'])}")
        if merge := row.get("merge"):
            kept = "kept" if merge["shardings_kept"] else "CHANGED"
            tqdm.write(
                f"{'':16}merge:   {describe(merge['collectives'])}; peak {merge['peak_gb']:.2f} GB "
                f"of which arguments {merge['argument_gb']:.2f}; shardings {kept}"
            )


def versions() -> dict[str, str]:
    """What a figure depends on besides the code."""
    found = {"jax": jax.__version__, "mora_jax": mora_jax.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["libtpu"] = metadata.version("libtpu")
    return found


def setting(args: argparse.Namespace, model: str, name: str, bar: tqdm) -> list[dict[str, Any]]:
    """Compiles all variants of a model on a pod, and prints them."""
    pod, config = PODS[name], MODELS[model]
    config = dataclasses.replace(config, num_layers=args.layers or config.num_layers)
    tensor = args.tensor or TENSOR[model]
    sizes = (args.data, args.fsdp or pod.chips // (args.data * tensor), tensor)
    if math.prod(sizes) != pod.chips:
        raise SystemExit(f"data x fsdp x tensor = {sizes} are not the {pod.chips} chips of {name}")
    mesh = make_mesh(pod, *sizes)
    base = Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=True)
    parts = sizes[0] * sizes[1]
    # One token more than are read, since each is what the one before it should give.
    tokens = jax.ShapeDtypeStruct(
        (args.batch * parts, args.length + 1), jnp.int32, sharding=batch_sharding(mesh)
    )
    shared = {
        "model": model,
        "layers": config.num_layers,
        "pod": name,
        "chips": pod.chips,
        "memory_gb": pod.memory_gb,
        "mesh": dict(zip(mesh.axis_names, sizes, strict=True)),
        "batch": args.batch * parts,
        "length": args.length,
        "split": args.split,
        "size_multiple": args.size_multiple,
    }
    rows = []
    for scheme, rank in [("baseline", 0), *itertools.product(args.schemes, args.ranks)]:
        label = f"{scheme} {rank}" if rank else scheme
        bar.set_description(f"{model} on {name}: {label}")
        chosen = None
        if rank:
            chosen = mora_jax.MoRAConfig(
                rank=rank,
                scheme=SCHEMES[scheme],
                placement=args.placement,
                size_multiple=args.size_multiple,
                targets=".*_proj",
            )
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            row = rows_of(Variant(base, chosen, mesh, tokens, args.split), pod.memory_gb)
        rows.append({**shared, "variant": label, "scheme": scheme, "rank": rank, **row})
        bar.update()
    title = (
        f"{model}, {config.num_layers} layers on {name}, {pod.chips} chips: data {sizes[0]} x "
        f"fsdp {sizes[1]} x tensor {sizes[2]}; {args.batch * parts} sequences of {args.length}, "
        f"{args.batch * parts * args.length // pod.chips} tokens a chip"
    )
    show(title, rows, pod.memory_gb)
    return rows


def main() -> None:
    """Reads the flags, compiles every setting, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["8b", "70b"], choices=MODELS)
    parser.add_argument("--pods", nargs="+", default=list(PODS)[:3], choices=PODS)
    parser.add_argument("--schemes", nargs="+", default=["lora", "sharing"], choices=SCHEMES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--placement", default="auto", choices=["kernel", "activation", "auto"])
    parser.add_argument("--split", help="mesh axis to keep adapters in parts over")
    parser.add_argument("--size-multiple", type=int, default=1, help="as in MoRAConfig")
    parser.add_argument("--data", type=int, default=1, help="copies of the model")
    parser.add_argument("--fsdp", type=int, help="default: all chips that are left")
    parser.add_argument("--tensor", type=int, help="default: 4 for 8b, 8 for 70b")
    parser.add_argument("--batch", type=int, default=2, help="sequences a part of the batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on devices of the CPU")
    parser.add_argument("--json", type=pathlib.Path, help="where to write all rows")
    args = parser.parse_args()
    if args.tiny:
        args.models, args.pods, args.length = ["tiny"], ["cpu-8"], 16
        jax.config.update("jax_num_cpu_devices", PODS["cpu-8"].chips)
    print(", ".join(f"{key} {value}" for key, value in versions().items()))
    settings = list(itertools.product(args.models, args.pods))
    rows = []
    with tqdm(total=len(settings) * (1 + len(args.schemes) * len(args.ranks))) as bar:
        for model, pod in settings:
            rows += setting(args, model, pod, bar)
            if args.json:
                args.json.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
