"""Pretrains a small Llama from scratch in every way there is, each at its own best learning rate.

    python3 examples/paper/pretrain.py train --model 60m --steps 4000 --minutes 9
    python3 examples/paper/pretrain.py plot          # from the JSON alone

Table 3 of arXiv 2405.12130 in small, and what it leaves open: which cycle of groupings ReMoRA
should have. As there, norms and embeddings are trained in full beside the adapters, and every
method sees the same tokens in the same order. The first seed chooses each method's learning rate,
the others give its result. Runs that are done stand in the JSON; one that was cut off, by the
time allowed or by a kill, goes on from its last checkpoint. So the same command is given again
until it says that all is done.

Shape letters: B sequences, T tokens of a sequence.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys
import time
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from recipes import RECIPES, Groups, draw_groups, inverse, permuted
from results import Results, draw, table
from task import (
    Pretraining,
    make_optimizer,
    make_plan,
    make_schedule,
    parted,
    random_params,
    ranks,
)  # fmt: skip

import mora_jax
import text
from llama import Llama
from train_checkpoints import Checkpoints
from train_flags import PRESETS
from train_state import TrainState

#: What the losses do not depend on.
FREE = {"mode", "methods", "rates", "minutes", "json", "picture", "out", "save_every", "text"}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = argparse.ArgumentParser(
        description="Pretrains a small Llama in every way there is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    here = pathlib.Path(__file__).with_suffix("")
    add = parser.add_argument
    add("mode", choices=["train", "plot"])
    add("--methods", nargs="+", choices=RECIPES, default=[*RECIPES])
    add("--model", choices=["tiny", "20m", "60m"], default="20m")
    add("--rank", type=int, default=16, help="LoRA's; MoRA trains as much")
    add("--steps", type=int, default=2000)
    add("--batch", type=int, default=64, help="sequences in a step")
    add("--length", type=int, default=256, help="tokens in a sequence")
    add("--merge-every", type=int, default=250, help="steps; only of the methods that merge")
    add("--warmup", type=int, default=100, help="steps")
    add("--rewarm", type=int, default=25, help="steps of the climb after a merge")
    add("--clip", type=float, default=1.0, help="norm that gradients are clipped to")
    add("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="learning rates to try")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="the first chooses the rate")
    add("--dtype", default="float32", help="of the computation")
    add("--evaluate-every", type=int, default=250, help="steps")
    add("--held-out", type=int, default=256, help="sequences that are measured, not trained on")
    add("--text", type=pathlib.Path, nargs="+", help="files, .jsonl too; by default Python's own")
    add("--minutes", type=float, default=1e9, help="after these, save and end")
    add("--save-every", type=int, default=1000, help="steps between checkpoints of a run")
    add("--out", default="results/pretrain", help="a directory for the run that is under way")
    add("--json", type=pathlib.Path, default=here.with_suffix(".json"))
    add("--picture", type=pathlib.Path, default=here.with_suffix(".png"))
    args = parser.parse_args(arguments)
    if args.steps % args.evaluate_every:
        parser.error(f"--steps {args.steps} is no multiple of --evaluate-every")
    return args


def pretrain(
    args: argparse.Namespace,
    task: Pretraining,
    start: mora_jax.Plan | None,
    name: tuple[str, float, int],
    tokens: tuple[np.ndarray, np.ndarray],
    deadline: float,
) -> dict[str, Any] | None:
    """One run, from its start or its last checkpoint; None where the time is over before its end.

    Args:
      args: the flags.
      task: what is trained.
      start: its adapters at the start.
      name: method, learning rate, seed.
      tokens: windows to train on and to measure on, [N, T + 1].
      deadline: by `time.monotonic`.
    """
    method, rate, seed = name
    windows = text.Windows(tokens[0], seed)
    held_out = tokens[1].reshape(-1, min(args.batch, len(tokens[1])), args.length + 1)
    initial, plan = random_params(task.base_model, seed), start
    key = jax.random.fold_in(jax.random.key(seed), 1)
    steps = mora_jax.merge_steps(args.steps, args.merge_every) if task.recipe.merges else ()
    schedule = make_schedule(args, task.recipe, rate)

    def groups_at(step: int) -> Groups:
        merges = sum(merge <= step for merge in steps)
        return draw_groups(start, seed, merges) if start and task.recipe.random else {}

    def begin() -> TrainState:
        # A copy, for merges give up the kernels that they change.
        params: Any = permuted(jax.tree.map(jnp.copy, initial), inverse(groups_at(0)))
        if start is not None:
            params = mora_jax.attach(start, params, key=key)
        trainable, _, frozen = parted(params, start, None)
        return TrainState(trainable, task.optimizer.init(trainable), frozen)

    folder = pathlib.Path(args.out).absolute() / f"{method} {rate:g} {seed}".replace(" ", "_")
    run = settings(args) | {"method": method, "rate": rate, "seed": seed}
    state, curve, first, seconds = begin(), [], 0, 0.0
    curve_file = folder / "curve.npy"
    with Checkpoints(
        epath.Path(folder), run=run, keeps_base=True, keep=1, say=tqdm.tqdm.write
    ) as saved:
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        if (restored := saved.restore(jax.eval_shape(lambda: state), places)) is not None:
            first, state, plan = restored
            curve = [row for row in np.load(curve_file).tolist() if row[0] <= first]
            seconds = curve.pop(0)[1]
        began, groups = time.monotonic(), groups_at(first)
        for step in tqdm.trange(first + 1, args.steps + 1, desc=f"{method}, {rate:g}, seed {seed}",
                                initial=first, total=args.steps, mininterval=5):  # fmt: skip
            rows = windows.rows((step - 1) * args.batch, args.batch)
            (trainable, opt_state), _ = task.step(
                (state.trainable, state.opt_state), state.frozen, windows.tokens[rows],
                jnp.asarray(schedule(step - 1), jnp.float32), plan, groups,
            )  # fmt: skip
            state = TrainState(trainable, opt_state, state.frozen)
            if step % args.evaluate_every == 0:
                loss = task.evaluate(state.trainable, state.frozen, held_out, plan, groups)
                curve.append([step, float(loss)])
            if step in steps:
                after = groups_at(step)
                merge_key = jax.random.fold_in(key, step)
                state, plan = task.merge(state, plan, groups, after, merge_key)
                groups = after
            over = time.monotonic() > deadline
            if step < args.steps and (over or step % args.save_every == 0):
                spent = seconds + time.monotonic() - began
                folder.mkdir(parents=True, exist_ok=True)
                np.save(curve_file, np.array([[0, spent], *curve]))
                saved.save(step, state, plan)
                if over:
                    return None
    params = mora_jax.join(state.trainable, state.frozen)
    if plan is not None:
        params = task.effective(params, plan, groups)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "method": method, "rate": rate, "seed": seed, "loss": curve[-1][1], "curve": curve,
        **ranks(initial, params),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(state.trainable)),
        "seconds": seconds + time.monotonic() - began,
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
    }  # fmt: skip


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the losses depend on, by name."""
    files = [str(path) for path in args.text or ["Python's own"]]
    return {name: x for name, x in vars(args).items() if name not in FREE} | {"text": files}


def train(args: argparse.Namespace) -> Results:
    """Does what there is left to do, for as long as it may."""
    deadline = time.monotonic() + 60 * args.minutes
    results = Results.open(args.json, settings(args))
    documents = text.read_documents(args.text) if args.text else text.python_documents()
    windows = text.Windows.cut(documents, text.encode_bytes, 0, args.length, 0)
    shuffled = np.random.default_rng(0).permutation(windows.tokens)
    batch = min(args.batch, args.held_out)
    held_out = args.held_out // batch * batch
    tokens = shuffled[held_out:], shuffled[:held_out]
    print(f"{len(tokens[0]):,} windows to train on, {len(tokens[1]):,} held out", flush=True)
    config = dataclasses.replace(PRESETS[args.model], vocab_size=256)
    base_model = Llama(config, dtype=args.dtype, param_dtype="float32")
    for method in args.methods:
        plan = make_plan(RECIPES[method], base_model, args.rank)
        task = Pretraining(base_model, RECIPES[method], make_optimizer(args.clip, plan))
        while (todo := results.next_of(method, args.rates, args.seeds)) is not None:
            run = pretrain(args, task, plan, (method, *todo), tokens, deadline)
            if run is None:
                print("the time is over; the same command goes on")
                return results
            results.add(run)
    print("all is done")
    return results


def main() -> None:
    """Trains, or draws what was trained."""
    args = parse_args()
    if args.mode == "train":
        results = train(args)
    else:
        results = Results.open(args.json)
        draw(results, args.picture)
    if results.runs:
        print(table(results))


if __name__ == "__main__":
    main()
