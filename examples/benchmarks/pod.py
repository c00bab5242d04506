"""Compiles the whole training step of Llama 3 for real TPU pods, here, without a TPU.

    python3 examples/benchmarks/pod.py --json pod.json         # half an hour on two cores
    python3 examples/benchmarks/pod.py --models 8b --pods v5p-128 --schemes sharing
    python3 examples/benchmarks/pod.py --tiny                  # eight devices of the CPU, seconds

The first two want an environment with `jax[tpu]`, whose compiler needs no chip. No parameter is
ever allocated: shapes and shardings go in, a compiled program comes out.

A step is embedding, scanned layers with remat, head, cross-entropy, and AdamW on the adapters,
which every chip holds whole; the base is bfloat16, sharded as examples/llama_mesh.py says. *Floor*
is the same step with the base frozen and no adapter, gradients of the embedded tokens included.
Attention is written in XLA, softmax and all; a kernel of its own would make every step shorter.

Columns, all for one chip: memory of the arguments and at most in use, in GB; products in TFLOP; the
compiler's own estimate for its kernels in millions of cycles, loops multiplied out, and over the
floor's; its other estimate (`optimal_seconds`, in ms), which counts the body of each loop once and
cannot be taken apart, over the floor's ("-" where it comes out negative, as on v6e); collectives of
the forward pass alone and of the step, how often each kind runs and GB that enter it; seconds to
compile. Neither estimate has the time of the collectives on the links.

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
import time
from importlib import metadata
from typing import Any

# The compiler for TPUs is asked for by name; nothing here runs but on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compiled import KINDS, Program
from flax import linen as nn
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layers import LLAMA_3_8B, TINY
from step import SCHEMES
from tqdm import tqdm

import mora_jax
from llama import Llama
from llama_mesh import BATCH_AXES, RULES, batch_sharding, param_shardings
from mora_jax import _remora, sharding

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Pod:
    """Chips to compile for.

    Attributes:
      topology: its name to `jax.experimental.topologies`, or None for devices of the CPU.
      chips: how many.
      memory_gb: of one chip.
    """

    topology: str | None
    chips: int
    memory_gb: float


#: v5p pods are named after their TensorCores, of which a chip has two.
PODS = {
    "v5e-64": Pod("v5e:8x8", 64, 16),
    "v5p-128": Pod("v5p:4x4x4", 64, 95),
    "v6e-256": Pod("v6e:16x16", 256, 32),
    "cpu-8": Pod(None, 8, 16),
}

MODELS = {
    "8b": dataclasses.replace(LLAMA_3_8B, vocab_size=128256, num_layers=32),
    "70b": dataclasses.replace(
        LLAMA_3_8B,
        vocab_size=128256,
        features=8192,
        hidden_features=28672,
        num_layers=80,
        num_heads=64,
    ),
    "tiny": dataclasses.replace(TINY, vocab_size=256),
}

#: Parts of heads and hidden features; the other chips are parts of the batch and of every kernel.
TENSOR = {"8b": 4, "70b": 8, "tiny": 2}


def make_mesh(pod: Pod, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of the pod's chips with the axes of examples/llama_mesh.py."""
    sizes = (data, fsdp, tensor)
    if pod.topology is None:
        devices = np.asarray(jax.devices()).reshape(sizes)
    else:
        topology = topologies.get_topology_desc(pod.topology, "tpu")
        # An axis may be a part of a ring: 32 x 8 on 16 x 16 chips.
        devices = mesh_utils.create_device_mesh(
            sizes, topology.devices, allow_split_physical_axes=True
        )
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def placed(tree: Any, sharding: Any) -> Any:
    """The tree's arrays as shapes that lie as the sharding, or the tree of them, says."""
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(lambda a, s: Shape(a.shape, a.dtype, sharding=s), tree, sharding)


class Variant:
    """The programs of one method: a frozen base, with adapters or (the floor) without.

    Attributes:
      plan: what was adapted, None for the floor.
      arguments: (trainable, optimizer state, scale, frozen, tokens), all shapes.
    """

    def __init__(
        self,
        base: Llama,
        config: mora_jax.MoRAConfig | None,
        mesh: Mesh,
        tokens: Shape,
        split: str | None = None,
    ):
        """Makes shapes alone; to be called within the mesh and its rules."""
        everywhere = NamedSharding(mesh, P())
        draw = lambda tokens: base.init(jax.random.key(0), tokens)
        shapes = jax.eval_shape(draw, tokens)["params"]
        places = param_shardings(shapes, mesh)
        frozen = placed(shapes, places)
        trainable, self.model, self.plan = {}, base, None
        if config is not None:
            plan = mora_jax.plan(mora_jax.adapt(base, config), tokens)
            plan = self.plan = sharding.on_mesh(plan, frozen, BATCH_AXES)
            self.model = mora_jax.adapt(base, plan)
            attach = lambda params: mora_jax.attach(plan, params, key=jax.random.key(1))
            full = jax.eval_shape(attach, frozen)
            whole = placed(full, sharding.param_shardings(plan, frozen, split=split))
            trainable, _ = mora_jax.split(whole, plan)
            places = jax.tree.map(lambda a: a.sharding, trainable)
        self.used = jax.tree.map(lambda _: everywhere, trainable)
        self.optimizer = optax.adamw(2e-4)
        shapes = jax.eval_shape(self.optimizer.init, trainable)
        state = placed(shapes, sharding.optimizer_shardings(self.optimizer, trainable, places))
        scale = Shape((), jnp.float32, sharding=everywhere)
        self.arguments = (trainable, state, scale, frozen, tokens)

    def loss(self, trainable, scale, frozen, tokens):
        """Mean cross-entropy of each token but the first."""
        trainable = jax.lax.with_sharding_constraint(trainable, self.used)
        params = frozen if self.plan is None else mora_jax.join(trainable, frozen)

        def scaled(call, args, kwargs, context):
            # The gradient of this factor asks for that of all embedded tokens.
            value = call(*args, **kwargs)
            embeds = context.module.name == "embed_tokens" and context.method_name == "__call__"
            return value * scale.astype(value.dtype) if embeds else value

        with nn.intercept_methods(scaled):
            logits: Any = self.model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def forward(self) -> Any:
        """The forward pass as training runs it: its transpose holds what the backward needs."""
        trainable, _, scale, frozen, tokens = self.arguments

        def run(trainable, scale, frozen, tokens):
            return jax.vjp(lambda t, s: self.loss(t, s, frozen, tokens), trainable, scale)

        return jax.jit(run).lower(trainable, scale, frozen, tokens)

    def step(self) -> Any:
        """One step; the adapters and their optimizer's state are donated."""

        def run(trainable, state, scale, frozen, tokens):
            value, (gradients, slope) = jax.value_and_grad(self.loss, (0, 1))(
                trainable, scale, frozen, tokens
            )
            updates, state = self.optimizer.update(gradients, state, trainable)
            return optax.apply_updates(trainable, updates), state, value, slope

        trainable, state, scale, *_ = self.arguments
        places = jax.tree.map(lambda a: a.sharding, (trainable, state, scale, scale))
        run = jax.jit(run, donate_argnums=(0, 1), out_shardings=places)
        return run.lower(*self.arguments)

    def merge(self) -> tuple[Any, Any]:
        """`merge_and_reset`, and where its results should lie: where its inputs did."""
        assert self.plan is not None
        trainable, state, _, frozen, _ = self.arguments
        leaves = _remora.flatten(mora_jax.join(trainable, frozen))
        paths = (*self.plan.kernel_paths(), *self.plan.adapter_leaves())
        changing = {path: leaves[path] for path in paths}
        found = _remora.find_adapter_state(state, self.plan.adapter_leaves())
        flat = jax.tree.leaves(state)
        resetting = {str(index): flat[index] for index in (*found.moments, *found.counts)}
        key = jax.eval_shape(lambda: jax.random.key(0))
        places = tuple(
            tuple((path, leaf.sharding) for path, leaf in leaves.items())
            for leaves in (changing, resetting)
        )
        lowered = _remora._restart_donating.lower(changing, resetting, key, self.plan, places)
        return lowered, jax.tree.map(lambda a: a.sharding, (changing, resetting))


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
    floor = rows[0].get("step")
    for row in rows:
        if "error" in row:
            tqdm.write(f"{row['variant']:16}{row['error']}")
            continue
        step = row["step"]
        ratio = lambda key, step=step: (
            f"{step[key] / floor[key]:6.3f}" if floor and floor[key] and step[key] else f"{'-':>6}"
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
    tokens = Shape((args.batch * parts, args.length + 1), jnp.int32, sharding=batch_sharding(mesh))
    shared = {
        "model": model,
        "layers": config.num_layers,
        "pod": name,
        "chips": pod.chips,
        "memory_gb": pod.memory_gb,
        "mesh": dict(zip(mesh.axis_names, sizes, strict=True)),
        "batch": args.batch * parts,
        "length": args.length,
    }
    rows = []
    for scheme, rank in [("floor", 0), *itertools.product(args.schemes, args.ranks)]:
        label = f"{scheme} {rank}" if rank else scheme
        bar.set_description(f"{model} on {name}: {label}")
        chosen = None
        if rank:
            chosen = mora_jax.MoRAConfig(
                rank=rank,
                scheme=SCHEMES[scheme],
                placement=args.placement,
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
