"""Trains a Llama on a mesh: fine-tuning or ReMoRA, on a laptop, on GPUs or on a TPU pod.

    python3 run.py train                                   # SmolLM2-135M, 2 CPU cores
    python3 examples/train/train_llama.py --model 8b --fsdp 4 --dtype bfloat16 \
        --param-dtype bfloat16 --remat
    srun python3 examples/train/train_llama.py --distributed --fsdp 8    # one process for each GPU

The mesh is data x fsdp x tensor, see `llama/mesh.py`. Started again with the same flags, it resumes
at its newest whole checkpoint, on as many devices as there are then, and goes on with the same
losses.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data import text
from llama.mesh import RULES, batch_sharding, make_mesh, param_shardings
from llama.model import Llama, LlamaConfig
from mora_jax.sharding import optimizer_shardings
from train.checkpoints import Checkpoints, OtherRunError
from train.flags import of_the_run, parse_args, sizes
from train.log import TrainLog
from train.state import TrainState, part, place
from train.step import Method, make_method, make_optimizer, merge, step_by_plan


def load(args: argparse.Namespace) -> tuple[LlamaConfig, Any, text.Windows]:
    """(sizes, pretrained parameters or None, text)."""
    pretrained, config, encode, end = None, None, text.encode_bytes, 0
    if "smollm2" in (args.model, args.tokenizer):
        from llama import smollm2  # needs packages that bytes do not

        dtype = "float32" if args.method == "full" else args.param_dtype
        config, pretrained, tokenizer = smollm2.load(smollm2.fetch(), dtype)
        if args.tokenizer == "smollm2":
            encode = lambda document: tokenizer.encode(document).ids
            end = tokenizer.token_to_id("<|endoftext|>")
    if args.model != "smollm2":
        vocabulary = config.vocab_size if config and args.tokenizer == "smollm2" else 256
        pretrained, config = None, sizes(args, vocabulary)
    assert config is not None
    documents = (
        text.read_documents(args.text, args.text_fields) if args.text else text.python_documents()
    )
    return config, pretrained, text.Windows.cut(documents, encode, end, args.length, args.seed)


def mesh_of(args: argparse.Namespace) -> Mesh:
    """The mesh that the flags name, over all devices of all processes.

    A single process may leave devices out.
    """
    there, parts = jax.device_count(), args.fsdp * args.tensor
    copies = args.data or there // parts
    taken = copies * parts
    if not 0 < taken <= there or (taken < there and (not args.data or jax.process_count() > 1)):
        raise SystemExit(
            f"data x fsdp x tensor is {copies} x {args.fsdp} x {args.tensor}; there are {there} "
            f"devices in {jax.process_count()} processes."
        )
    return make_mesh(copies, args.fsdp, args.tensor)


def random_params(base_model: Llama, key: jax.Array) -> Any:
    """A base model's parameters, drawn."""
    return base_model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]


def base_places(base_model: Llama, mesh: Mesh) -> Any:
    """Where a base model's parameters lie: a tree of shardings."""
    draw = functools.partial(random_params, base_model)
    return param_shardings(jax.eval_shape(draw, jax.random.key(0)), mesh)


def lay_out(args, base_shardings, base_model: Llama, pretrained: Any, method: Method, optimizer):
    """(shapes, shardings, make): the whole state as shapes, where it lies, and how it begins."""
    keys = jax.random.split(jax.random.key(args.seed))

    def random_base():
        return random_params(base_model, keys[0])

    def begin(base):
        base = random_base() if base is None else base
        params = method.add(base, base_model.config.features, keys[1])
        trainable, frozen = part(params, method.trains)
        # What is trained is float32 whatever the rest is: small updates are not to be lost.
        trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
        return TrainState(trainable, optimizer.init(trainable), frozen)

    shapes = jax.eval_shape(begin, None)
    trainable, frozen = part(method.shardings(base_shardings), method.trains)
    opt_state = optimizer_shardings(optimizer, shapes.trainable, trainable)
    shardings = TrainState(trainable, opt_state, frozen)

    def make() -> TrainState:
        base = pretrained and place(pretrained, base_shardings)
        # Donated, the frozen kernels stay where they are.
        return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(base)

    return shapes, shardings, make


def preempted(step: int) -> bool:
    """Whether a process was told to end (SIGTERM), and this is the step that all save at."""
    return jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the training and gives its summary."""
    mesh = mesh_of(args)
    config, pretrained, windows = load(args)
    shape = (args.accumulate, args.batch // args.accumulate)
    if shape[1] % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise SystemExit(
            f"--batch {args.batch} in {shape[0]} microbatches leaves {shape[1]} sequences, which "
            f"data x fsdp = {parts} devices cannot share alike."
        )
    base_dtype = "float32" if args.method == "full" else args.param_dtype
    base_model = Llama(config, dtype=args.dtype, param_dtype=base_dtype, remat=args.remat)
    base_shardings = base_places(base_model, mesh)
    method = make_method(args, base_model, args.cycle).on_mesh(base_shardings)
    optimizer, schedule = make_optimizer(args, method.plan)
    shapes, shardings, make = lay_out(
        args, base_shardings, base_model, pretrained, method, optimizer
    )
    step_for = step_by_plan(optimizer, schedule, shardings, method.plan)
    batch_place = NamedSharding(mesh, P(None, *batch_sharding(mesh).spec))
    key = jax.random.fold_in(jax.random.key(args.seed), 1)
    dropout_key = jax.random.fold_in(key, 0) if args.dropout else None
    out, leads = epath.Path(args.out).absolute(), jax.process_index() == 0
    say = print if leads else lambda *_: None
    if method.plan is not None:
        say(method.plan)
    say(
        f"{jax.process_count()} processes, {jax.device_count()} devices "
        f"({jax.devices()[0].device_kind}), mesh {dict(mesh.shape)}; "
        f"{len(windows.tokens):,} windows of {args.length} tokens"
    )

    checkpoints = Checkpoints(
        out / "checkpoints",
        run=of_the_run(args, windows.digest),
        keeps_base=bool(args.remora_every),
        keep=args.keep,
        say=say,
    )
    last = min(args.steps, args.stop_at or args.steps)
    with checkpoints:
        state, first = None, 0
        if (restored := checkpoints.restore(shapes, shardings, method.plan)) is not None:
            first, state, plan = restored
            method = dataclasses.replace(method, plan=plan).on_mesh(base_shardings)
        if state is None or state.frozen is None:
            begun = make()
            state = begun if state is None else state._replace(frozen=begun.frozen)
        with (
            TrainLog(args.csv if leads else None, first, args.steps,
                     args.batch * args.length) as log,
            jax.set_mesh(mesh),
            nn.logical_axis_rules(RULES),
        ):  # fmt: skip
            for step in range(first + 1, last + 1):
                trainable, opt_state, metrics = step_for(method.plan)(
                    method.adapt(base_model), state.trainable, state.opt_state, state.frozen,
                    windows.batch(step - 1, shape, batch_place), step - 1, dropout_key,
                )  # fmt: skip
                state = TrainState(trainable, opt_state, state.frozen)
                log.write(step, metrics)
                if args.remora_every and step % args.remora_every == 0 and step < args.steps:
                    merge_key = jax.random.fold_in(key, step)
                    state, method, report = merge(state, method, merge_key, args.rounding)
                    log.say(f"step {step}: merged and restarted, {report}")
                ends = preempted(step)
                if step % args.save_every == 0 or step == last or ends:
                    log.flush()
                    checkpoints.save(step, state, method.plan)
                if ends:
                    log.say(f"step {step}: told to end, saved")
                    break
    return {
        **{name: getattr(args, name) for name in ("model", "method", "scheme", "rank")},
        "trained_parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.trainable)),
        "steps": [first, first + len(log.losses)],
        "loss": log.losses[-1] if log.losses else None,
        **log.speed(),
        "batch": args.batch, "accumulate": args.accumulate, "length": args.length,
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
        "processes": jax.process_count(), "mesh": dict(mesh.shape), "jax": jax.__version__,
        "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }  # fmt: skip


def main() -> None:
    """Joins the other processes if there are any, trains, and prints a summary as JSON."""
    args = parse_args()
    if args.distributed or args.coordinator:
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            # Gloo matches messages by their order alone, and XLA's default schedule for CPUs was
            # seen to mix up those of a sharded step.
            flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    try:
        summary = json.dumps(train(args))
    except OtherRunError as error:
        raise SystemExit(str(error)) from None
    if jax.process_index() == 0:
        print(summary)
        if args.json:
            args.json.write_text(summary + "\n")


if __name__ == "__main__":
    main()
