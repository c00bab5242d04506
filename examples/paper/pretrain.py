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
import functools
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from recipes import RECIPES, Groups, Recipe, draw_groups, inverse, permuted
from results import Results, draw, table

import mora_jax
import text
from llama import Llama
from train_checkpoints import Checkpoints
from train_flags import FROM_SCRATCH, PRESETS
from train_state import TrainState, part
from train_step import next_token_loss

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


def make_plan(recipe: Recipe, base_model: Llama, rank: int) -> mora_jax.Plan | None:
    """The adapters of a recipe at its start."""
    if recipe.scheme is None:
        return None
    config = mora_jax.MoRAConfig(
        rank=rank, scheme=recipe.scheme, cycle=recipe.cycle, targets=".*_proj",
        also_train=FROM_SCRATCH,
    )  # fmt: skip
    model = mora_jax.adapt(base_model, config)
    return mora_jax.plan(model, jax.ShapeDtypeStruct((1, 8), jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def random_params(base_model: Llama, seed: jax.Array) -> Any:
    """A base model's parameters."""
    return base_model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """One method's training, but for its rate and its seed; what is compiled depends on it alone.

    Attributes:
      base_model: the model.
      recipe: what is trained.
      optimizer: at a learning rate of one, which each step multiplies.
    """

    base_model: Llama
    recipe: Recipe
    optimizer: Any

    def effective(self, params: Any, plan: mora_jax.Plan, groups: Groups) -> Any:
        """The base model's parameters with what its adapters add."""
        return permuted(mora_jax.merge(params, plan), groups)

    def loss(self, params: Any, tokens: jax.Array, plan: Any, groups: Groups) -> jax.Array:
        """Mean cross-entropy: [B, T + 1] int32 -> scalar."""
        if self.recipe.random:
            params = self.effective(params, plan, groups)
            plan = None
        model = self.base_model if plan is None else mora_jax.adapt(self.base_model, plan)
        return next_token_loss(model, params, tokens, None)

    @functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=1)
    def step(self, trained, frozen, tokens, rate, plan, groups):
        """One step of AdamW: ((trainable, optimizer's state), loss)."""
        trainable, opt_state = trained

        def loss_of(trainable):
            return self.loss(mora_jax.join(trainable, frozen), tokens, plan, groups)

        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        updates, opt_state = self.optimizer.update(gradients, opt_state, trainable)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return (optax.apply_updates(trainable, updates), opt_state), loss

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def evaluate(self, trainable, frozen, tokens, plan, groups):
        """The loss of held-out tokens, [batches, B, T + 1]."""
        params = mora_jax.join(trainable, frozen)
        return jax.lax.map(lambda batch: self.loss(params, batch, plan, groups), tokens).mean()

    def merge(self, state: TrainState, plan: Any, groups: Groups, after: Groups, key: Any):
        """(state, plan) after ReMoRA's restart, and where groups are random, in other ones."""
        params = mora_jax.join(state.trainable, state.frozen)
        params, opt_state, plan, _ = mora_jax.merge_and_reset(
            params, state.opt_state, plan, key=key
        )
        params = permuted(permuted(params, groups), inverse(after))
        return TrainState(*_parted(params, plan, opt_state)), plan


def _parted(params: Any, plan: mora_jax.Plan | None, opt_state: Any) -> tuple[Any, Any, Any]:
    trains = lambda path: plan is None or plan.group(path) != "frozen"
    trainable, frozen = part(params, trains)
    return trainable, opt_state, frozen


def make_optimizer(clip: float, plan: mora_jax.Plan | None) -> Any:
    """AdamW at a rate of one: its updates are linear in it, so that no rate is compiled in."""
    optimizer = optax.adamw(1.0, weight_decay=0.0)
    if plan is not None:
        optimizer = mora_jax.freeze_base(optimizer, plan)
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


def make_schedule(args: argparse.Namespace, recipe: Recipe, rate: float) -> optax.Schedule:
    """Cosine to a tenth, and jagged where the recipe merges."""
    merges = mora_jax.merge_steps(args.steps, args.merge_every) if recipe.merges else ()
    return mora_jax.jagged_cosine_schedule(
        rate, args.steps, merges, warmup_steps=args.warmup, rewarm_steps=args.rewarm,
        end_value=rate / 10,
    )  # fmt: skip


def ranks(before: Any, after: Any, kernels: list[str]) -> dict[str, float]:
    """How much of full rank the whole update has: means over all matrices.

    `rank` counts singular values above a thousandth of the largest; `effective_rank` is the
    exponential of the entropy of their shares (Roy and Vetterli, 2007).
    """
    found = []
    for path in kernels:
        names = path.split("/")
        old, new = (functools.reduce(lambda t, name: t[name], names, t) for t in (before, after))
        for update in np.asarray(new, np.float32) - np.asarray(old, np.float32):
            values = np.linalg.svd(update, compute_uv=False)
            share = values / max(values.sum(), 1e-30)
            entropy = -(share * np.log(np.maximum(share, 1e-30))).sum()
            full = len(values)
            found.append(((values > 1e-3 * values[0]).sum() / full, np.exp(entropy) / full))
    rank, effective = np.mean(found, 0)
    return {"rank": float(rank), "effective_rank": float(effective)}


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
        trainable, _, frozen = _parted(params, start, None)
        return TrainState(trainable, task.optimizer.init(trainable), frozen)

    folder = pathlib.Path(args.out).absolute() / f"{method} {rate:g} {seed}".replace(" ", "_")
    run = settings(args) | {"method": method, "rate": rate, "seed": seed}
    state, curve, first, seconds = begin(), [], 0, 0.0
    curve_file = folder / "curve.npy"
    with Checkpoints(
        _epath(folder), run=run, keeps_base=True, keep=1, say=tqdm.tqdm.write
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
    kernels = [path for path in _kernels(initial) if path.endswith("_proj/kernel")]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "method": method, "rate": rate, "seed": seed, "loss": curve[-1][1], "curve": curve,
        **ranks(initial, params, kernels),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(state.trainable)),
        "seconds": seconds + time.monotonic() - began,
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
    }  # fmt: skip


def _epath(folder: pathlib.Path) -> Any:
    from etils import epath

    return epath.Path(folder)


def _kernels(params: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [
        path
        for name, leaf in params.items()
        for path in (
            _kernels(leaf, f"{prefix}{name}/") if isinstance(leaf, Mapping) else [prefix + name]
        )
    ]


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
