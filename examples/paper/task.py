"""What a run of pretrain.py does: adapters, step, merges, the rank of what was learned.

Shape letters: B sequences, T tokens of a sequence.
"""

import argparse
import dataclasses
import functools
import os
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from recipes import Groups, Recipe, inverse, permuted

import mora_jax
from llama import Llama
from train_flags import FROM_SCRATCH
from train_state import TrainState, part
from train_step import next_token_loss


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
        return TrainState(*parted(params, plan, opt_state)), plan


def parted(params: Any, plan: mora_jax.Plan | None, opt_state: Any) -> tuple[Any, Any, Any]:
    """(trainable, opt_state, frozen): the fields of a `TrainState`."""
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


def ranks(before: Any, after: Any) -> dict[str, float]:
    """How much of full rank the whole update has: means over the matrices of all layers.

    `rank` counts singular values above a thousandth of the largest; `effective_rank` is the
    exponential of the entropy of their shares (Roy and Vetterli, 2007).
    """
    old, new = (traverse_util.flatten_dict(jax.device_get(t), sep="/") for t in (before, after))
    found = []
    for path in (path for path in old if path.endswith("_proj/kernel")):
        for update in np.asarray(new[path]) - np.asarray(old[path]):
            values = np.linalg.svd(update, compute_uv=False)
            share = values / max(values.sum(), 1e-30)
            entropy = -(share * np.log(np.maximum(share, 1e-30))).sum()
            full = len(values)
            found.append(((values > 1e-3 * values[0]).sum() / full, np.exp(entropy) / full))
    rank, effective = np.mean(found, 0)
    return {"rank": float(rank), "effective_rank": float(effective)}
