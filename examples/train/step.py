"""What is trained and how: the method as data, the optimizer, the jitted step, ReMoRA's merge.

Shape letters: A microbatches, B sequences of a step, T tokens of a sequence, D features.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mora_jax
from llama.mesh import BATCH_AXES
from llama.model import Llama
from mora_jax.sharding import on_mesh, param_shardings
from train.state import TrainState, part


@dataclasses.dataclass(frozen=True)
class Method:
    """What is added to a base model's parameters, and what of them is trained.

    Attributes:
      plan: of the adapters, in the scheme of their cycle that is current; None without adapters.
      split: mesh axis that adapters and their optimizer's state are kept in parts over, or None.
      baseline: a vector [D] added to the embeddings is trained and nothing else, so that every
        layer goes forward and back as it does under adapters.
    """

    plan: mora_jax.Plan | None
    baseline: bool = False
    split: str | None = None

    def adapt(self, base_model: Llama) -> Llama:
        """The model that has what is added."""
        return base_model if self.plan is None else mora_jax.adapt(base_model, self.plan)

    def add(self, base: Mapping[str, Any], features: int, key: jax.Array) -> dict[str, Any]:
        """The base's parameters with what is added, at its start."""
        if self.plan is not None:
            return mora_jax.attach(self.plan, base, key=key)
        return {**base, "shift": jnp.zeros(features)} if self.baseline else {**base}

    def shardings(self, base_shardings: Mapping[str, Any]) -> dict[str, Any]:
        """Where these parameters lie."""
        if self.plan is not None:
            return param_shardings(self.plan, base_shardings, split=self.split)
        everywhere = NamedSharding(jax.tree.leaves(base_shardings)[0].mesh, P())
        return {**base_shardings, "shift": everywhere} if self.baseline else {**base_shardings}

    def on_mesh(self, base_shardings: Mapping[str, Any]) -> "Method":
        """The method, told which features are split over devices."""
        if self.plan is None:
            return self
        plan = on_mesh(self.plan, base_shardings, BATCH_AXES)
        return dataclasses.replace(self, plan=plan)

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` is trained."""
        if self.plan is not None:
            return self.plan.role(path) != "frozen"
        return path == "shift" or not self.baseline


def make_method(args: argparse.Namespace, base_model: Llama, cycle: Any = "auto") -> Method:
    """The method that the flags name; `cycle` as in `MoRAConfig`."""
    if args.method in ("full", "baseline"):
        return Method(None, baseline=args.method == "baseline")
    scheme = mora_jax.LowRank() if args.method == "lora" else args.scheme
    config = mora_jax.MoRAConfig(
        rank=args.rank,
        scheme=scheme,
        targets=args.targets,
        dropout=args.dropout,
        also_train=args.also_train or None,
        cycle=cycle,
        keep_sums=args.remat,
        size_multiple=args.size_multiple,
    )
    model = mora_jax.adapt(base_model, config)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    rngs = {name: jax.random.key(0) for name in ("params", "mora")} if args.dropout else None
    split = "fsdp" if args.split_adapters else None
    return Method(mora_jax.plan(model, tokens, rngs=rngs), split=split)


def make_optimizer(args: argparse.Namespace, plan: mora_jax.Plan | None):
    """(optimizer, schedule): AdamW over the trained half; step from 0 -> learning rate."""
    warmup = min(args.warmup, args.steps // 2)
    if args.remora_every:
        schedule = mora_jax.jagged_cosine_schedule(
            args.lr,
            args.steps + 1,
            args.remora_every,
            warmup_steps=warmup,
            rewarm_steps=max(1, min(50, args.remora_every // 4)),
        )
    else:
        schedule = optax.warmup_cosine_decay_schedule(
            args.lr / (warmup + 1), args.lr, warmup, args.steps + 1
        )
    optimizer = optax.adamw(schedule, weight_decay=args.weight_decay)
    if plan is not None:
        # Adapters and what is trained beside them count their steps apart: ReMoRA restarts one.
        optimizer = mora_jax.freeze_base(optimizer, plan)
    return optax.chain(optax.clip_by_global_norm(args.clip), optimizer), schedule


def next_token_loss(model: Llama, params: Any, tokens: jax.Array, rngs: Any) -> jax.Array:
    """Mean cross-entropy of each token after the one before it: [B, T + 1] int32 -> scalar."""
    logits: Any = model.apply({"params": params}, tokens[:, :-1], rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make_step(
    optimizer: Any,
    schedule: optax.Schedule,
    shardings: TrainState,
    loss: Callable[..., jax.Array] = next_token_loss,
) -> Callable:
    """The jitted step, compiled once for each model: ReMoRA has one for each of its groupings.

    It takes (model, trainable, opt_state, frozen, batch, step, key): batch [A, B / A, T + 1] int32,
    or what else `loss` takes, its leaves with a leading axis of microbatches; step from 0, key for
    dropout or None. It gives (trainable, opt_state, metrics), the metrics float32 scalars, and
    gives up the trainable and opt_state that it took.

    Args:
      optimizer: as `make_optimizer` gives it.
      schedule: likewise.
      shardings: where the state lies.
      loss: (model, params, microbatch, rngs) -> scalar; a step's is the mean of its microbatches.
    """

    def loss_of(trainable, frozen, model, item, key):
        trainable = dict(trainable)
        shift = trainable.pop("shift", None)
        rngs = None if key is None else {"mora": key}
        params = mora_jax.join(trainable, frozen)
        with nn.intercept_methods(_shifted(shift)):
            return loss(model, params, item, rngs)

    def step(model, trainable, opt_state, frozen, batch, step, key):
        count = len(jax.tree.leaves(batch)[0])

        def accumulate(total, microbatch):
            item, key = microbatch
            one = jax.value_and_grad(loss_of)(trainable, frozen, model, item, key)
            return jax.tree.map(jnp.add, total, one), None

        keys = None if key is None else jax.random.split(jax.random.fold_in(key, step), count)
        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
        total, _ = jax.lax.scan(accumulate, nothing, (batch, keys))
        mean_loss, gradients = jax.tree.map(lambda x: x / count, total)
        updates, opt_state = optimizer.update(gradients, opt_state, trainable)
        metrics = {
            "loss": mean_loss,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(step), jnp.float32),
        }
        return optax.apply_updates(trainable, updates), opt_state, metrics

    mesh = jax.tree.leaves(shardings)[0].mesh
    return jax.jit(
        step,
        static_argnums=0,
        donate_argnums=(1, 2),
        out_shardings=(shardings.trainable, shardings.opt_state, NamedSharding(mesh, P())),
    )


def step_by_plan(
    optimizer: Any, schedule: optax.Schedule, shardings: TrainState, plan: mora_jax.Plan | None
) -> Callable[[mora_jax.Plan | None], Callable]:
    """`make_step` for each plan that ReMoRA comes to; `shardings` have the names of `plan`."""

    @functools.cache
    def make(current: mora_jax.Plan | None) -> Callable:
        names = {} if plan is None or current is None else plan.renamed(current)
        return make_step(optimizer, schedule, mora_jax.rename_leaves(shardings, names))

    # A step does not depend on merges that the base has behind it.
    return lambda current: make(current and current.before_merges())


def _shifted(shift: jax.Array | None):
    """An interceptor that adds a vector to what is looked up in the embeddings."""

    def intercept(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        looked_up = isinstance(context.module, nn.Embed) and context.method_name == "__call__"
        return y + shift.astype(y.dtype) if shift is not None and looked_up else y

    return intercept


def merge(
    state: TrainState,
    method: Method,
    key: jax.Array,
    rounding: Literal["nearest", "stochastic"] = "nearest",
) -> tuple[TrainState, Method, mora_jax.ResetReport]:
    """ReMoRA's restart: the state with merged kernels and new adapters, and the next grouping."""
    assert method.plan is not None
    params, opt_state, plan, report = mora_jax.merge_and_reset(
        mora_jax.join(state.trainable, state.frozen),
        state.opt_state,
        method.plan,
        key=key,
        rounding=rounding,
        donate=True,  # a second copy of the base would not fit
    )
    method = dataclasses.replace(method, plan=plan)
    trainable, frozen = part(params, method.trains)
    return TrainState(trainable, opt_state, frozen), method, report
