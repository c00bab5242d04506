"""What any run here does: adapters, the step of AdamW, ReMoRA's merges.

Everything is trained alike: rows of tokens, of which some are learned, and the mean cross-entropy
of these. A learning rate is an argument of the step, and an evaluation sees merged parameters, so
that a method compiles its step once for all rates and seeds, and all methods share an evaluation.

Shape letters: N rows, B rows of a step, T tokens of a row that are read.
"""

import argparse
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mora_jax
from llama.model import Llama
from paper.recipes import Recipe
from train.state import TrainState, part


class Rows(NamedTuple):
    """Sequences padded on the right, which none of their own tokens attends to.

    Attributes:
      tokens: [N, T + 1] int32, the last of which is only predicted.
      learned: [N, T + 1] bool, False at what is only read.
    """

    tokens: Any
    learned: Any

    @classmethod
    def whole(cls, tokens: np.ndarray) -> "Rows":
        """Of which every token is learned."""
        return cls(tokens, np.ones(tokens.shape, bool))


def losses(model: Llama, params: Any, rows: Rows) -> jax.Array:
    """Cross-entropy of each token after the one before it, 0 where not learned: [B, T]."""
    logits: Any = model.apply({"params": params}, rows.tokens[:, :-1])
    found = optax.softmax_cross_entropy_with_integer_labels(logits, rows.tokens[:, 1:])
    return jnp.where(rows.learned[:, 1:], found, 0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def held_out_loss(model: Llama, params: Any, rows: Rows, batch: int) -> jax.Array:
    """Mean over all learned tokens of the rows, `batch` of them at a time."""
    missing = -len(rows.tokens) % batch
    fill = lambda x: jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, batch, x.shape[1])
    sums = jax.lax.map(lambda part: losses(model, params, part).sum(), jax.tree.map(fill, rows))
    return sums.sum() / rows.learned[:, 1:].sum()


def make_plan(
    recipe: Recipe, base_model: Llama, rank: int, also_train: str | None
) -> mora_jax.Plan | None:
    """The adapters of a recipe at its start; `rank` where the recipe has none of its own."""
    if recipe.scheme is None:
        return None
    config = mora_jax.MoRAConfig(
        rank=recipe.rank or rank, scheme=recipe.scheme, cycle=recipe.cycle, targets=".*_proj",
        also_train=also_train, dora=recipe.dora, schemes=recipe.schemes,
    )  # fmt: skip
    model = mora_jax.adapt(base_model, config)
    return mora_jax.plan(model, jax.ShapeDtypeStruct((1, 8), jnp.int32))


@dataclasses.dataclass(frozen=True)
class Training:
    """One method's training, but for its rate and its seed; what is compiled depends on it alone.

    Attributes:
      base_model: the model.
      recipe: what is trained.
      optimizer: at a learning rate of one, which each step multiplies.
    """

    base_model: Llama
    recipe: Recipe
    optimizer: Any

    def loss(self, params: Any, rows: Rows, plan: Any) -> jax.Array:
        """Mean cross-entropy of what is learned: rows of a step -> scalar."""
        model = self.base_model if plan is None else mora_jax.adapt(self.base_model, plan)
        return losses(model, params, rows).sum() / rows.learned[:, 1:].sum()

    @functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=1)
    def step(self, trained, frozen, data, index, rate, plan):
        """One step of AdamW on rows [B] of the data: ((trainable, optimizer's state), loss)."""
        trainable, opt_state = trained
        rows = jax.tree.map(lambda x: x[index], data)

        def loss_of(trainable):
            return self.loss(mora_jax.join(trainable, frozen), rows, plan)

        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        updates, opt_state = self.optimizer.update(gradients, opt_state, trainable)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return (optax.apply_updates(trainable, updates), opt_state), loss

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def merged(self, state: TrainState, plan: Any) -> Any:
        """Parameters of the base model that compute the same, as new arrays."""
        params = mora_jax.join(state.trainable, state.frozen)
        return params if plan is None else mora_jax.merge(params, plan)

    def restart(self, state: TrainState, plan: Any, key: Any) -> tuple[TrainState, Any]:
        """(state, plan) after ReMoRA's restart."""
        params = mora_jax.join(state.trainable, state.frozen)
        params, opt_state, plan, _ = mora_jax.merge_and_reset(
            params, state.opt_state, plan, key=key, donate=True
        )
        return TrainState(*parted(params, plan, opt_state)), plan


class CompiledSteps:
    """The step of a method, compiled ahead for each grouping.

    Attributes:
      seconds: that compilations took.
      bytes: that a step needs at most: arguments, results and all between.
    """

    def __init__(self, training: Training):
        self._training, self._compiled = training, {}
        self.seconds, self.bytes = 0.0, 0

    def of(self, trained, frozen, data, index, rate, plan):
        """The compiled step for such arguments; it takes all of them but the plan."""
        case = plan, tuple(x.shape for x in data)
        if case not in self._compiled:
            began = time.monotonic()
            lowered = Training.step.lower(self._training, trained, frozen, data, index, rate, plan)
            compiled = lowered.compile()
            if (memory := compiled.memory_analysis()) is not None:
                used = memory.argument_size_in_bytes + memory.output_size_in_bytes
                used += memory.temp_size_in_bytes - memory.alias_size_in_bytes
                self.bytes = max(self.bytes, used)
            self._compiled[case] = compiled
            self.seconds += time.monotonic() - began
        return self._compiled[case]


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number is."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def parted(params: Any, plan: mora_jax.Plan | None, opt_state: Any) -> tuple[Any, Any, Any]:
    """(trainable, opt_state, frozen): the fields of a `TrainState`."""
    trains = lambda path: plan is None or plan.role(path) != "frozen"
    trainable, frozen = part(params, trains)
    return trainable, opt_state, frozen


def make_optimizer(clip: float, plan: mora_jax.Plan | None) -> Any:
    """AdamW at a rate of one: its updates are linear in it, so that no rate is compiled in."""
    optimizer = optax.adamw(1.0, weight_decay=0.0)
    if plan is not None:
        optimizer = mora_jax.freeze_base(optimizer, plan)
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


def merges_of(args: argparse.Namespace, recipe: Recipe) -> tuple[int, ...]:
    """After which steps the recipe merges."""
    if not recipe.merges:
        return ()
    return mora_jax.merge_steps(args.steps, args.merge_every * int(recipe.merges))


def make_rates(args: argparse.Namespace, recipe: Recipe, rate: float) -> np.ndarray:
    """The rate of every step, [steps]: cosine to a tenth, and jagged where the recipe merges."""
    schedule: Any = mora_jax.jagged_cosine_schedule(
        rate, args.steps, merges_of(args, recipe), warmup_steps=args.warmup,
        rewarm_steps=args.rewarm, end_value=rate / 10,
    )  # fmt: skip
    # At once: a schedule asked at every step would wait for the device each time.
    return np.asarray(jax.vmap(schedule)(jnp.arange(args.steps)), np.float32)
