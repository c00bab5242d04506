"""optax transforms that train adapters and leave the base alone."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mora_jax._arrays.paths import flatten, is_adapter, list_paths, unflatten_like
from mora_jax._params.checks import check_plan
from mora_jax._plans.plan import Plan

#: States of optax that several optimizers share, which start them at different values.
AMBIGUOUS_STARTS = {
    "ScaleByAdamState", "ScaleByRmsState", "ScaleByRmsWithCountState", "ScaleByRStdDevState",
    "ScaleByRStdDevWithCountState",
}  # fmt: skip

#: The group that adapters are in.
_GROUP = "adapter"


class FrozenState(NamedTuple):
    """The state of what `freeze_base` freezes: nothing. It tells the state from others."""


class OwnStart(NamedTuple):
    """A state of adapters that starts elsewhere than at zero, where its class does not say so.

    Attributes:
      inner_state: the optimizer's own.
    """

    inner_state: Any


def freeze_base(
    optimizer: optax.GradientTransformation, plan: Plan
) -> optax.GradientTransformationExtraArgs:
    """Applies `optimizer` to what the plan trains, and an update of zero to everything else.

    Each group has a state of its own: the adapters, the parameters of `also_train` if there are
    any, and the frozen ones, which have none. So no moments are kept for the base, a clip by global
    norm inside `optimizer` sees no base gradient, and `merge_and_reset` can restart the adapters
    alone.

    `optimizer` runs once for each of the first two, so such a clip takes each norm by itself.
    Without `also_train` it does what it would do on the trainable half of `split` alone.

    Built on `optax.partition`. It takes whole trees and the trainable half of `split` alike.

    Args:
      optimizer: any optax transformation.
      plan: the plan.

    Returns:
      An optax transformation.

    Raises:
      ValueError: from its `init` and `update`, where the tree lacks what the plan trains.

    >>> import flax.linen as nn, jax, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 3)))["params"]
    >>> state = freeze_base(optax.sgd(1.0, momentum=0.9), plan).init(params)
    >>> [leaf.shape for leaf in jax.tree.leaves(state)]  # the momentum of the matrix, no other
    [(3, 3)]
    """

    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"freeze_base(optimizer, plan): expected an optax transformation, got a "
            f"{type(optimizer).__name__}."
        )
    check_plan(plan)
    # Where adapters stand, not their names: after a restart these say another scheme.
    wanted = {*map(_place, plan.adapter_leaves()), *dict(plan.also_train)}

    def labels(params):
        leaves = flatten(params)
        if missing := wanted - {_place(path) for path in leaves}:
            raise ValueError(
                f"the tree lacks what the plan trains: {list_paths(missing)}; it has "
                f"{list_paths(leaves)}. Give the parameters themselves, with adapters."
            )
        groups = unflatten_like({path: plan.role(path) for path in leaves}, params)
        # A FrozenDict wants labels in a FrozenDict.
        return groups if isinstance(groups, type(params)) else type(params)(groups)

    groups: dict[Hashable, optax.GradientTransformation] = {
        _GROUP: _with_start(optimizer),
        "frozen": _set_to_zero(),
    }
    if plan.also_train:
        groups["also_train"] = optimizer
    return optax.partition(groups, labels)


def _place(path: str) -> str:
    """The dict that an adapter's leaf stands in; the path itself of all else."""
    return path.rpartition("/")[0] if is_adapter(path) else path


def is_of_freeze_base(state: Any) -> bool:
    """Whether a node of an optimizer state is one that `freeze_base` made."""
    groups = getattr(state, "inner_states", None)
    frozen = groups.get("frozen") if isinstance(groups, dict) and _GROUP in groups else None
    return isinstance(getattr(frozen, "inner_state", None), FrozenState)


def _with_start(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, in an `OwnStart` if its state does not tell that it starts so."""
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        state = inner.init(params)
        return OwnStart(state) if _starts_elsewhere(optimizer, state, params) else state

    def update(updates, state, params=None, **extra_args):
        if not isinstance(state, OwnStart):
            return inner.update(updates, state, params, **extra_args)
        updates, new = inner.update(updates, state.inner_state, params, **extra_args)
        return updates, OwnStart(new)

    return optax.GradientTransformationExtraArgs(init, update)


def _starts_elsewhere(optimizer: optax.GradientTransformation, state: Any, params: Any) -> bool:
    """Whether moments in a state that optimizers share start elsewhere than at zero."""
    if not _ambiguous(state):
        return False
    # Where values are unknown, under jit, those of a tiny tree tell.
    try:
        with jax.ensure_compile_time_eval():
            tiny = jax.tree.map(lambda leaf: jnp.zeros((1,) * leaf.ndim, leaf.dtype), params)
            moments = jax.tree.leaves(_ambiguous(optimizer.init(tiny)))
            return any(np.any(np.asarray(leaf)) for leaf in moments)
    except Exception:
        return True  # an optimizer for these shapes alone; a restart asks for it then


def _ambiguous(state: Any) -> list[Any]:
    """The states of these classes within a state."""

    def is_one(node):
        return type(node).__name__ in AMBIGUOUS_STARTS

    return [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]


def _set_to_zero() -> optax.GradientTransformation:
    """`optax.set_to_zero`, shaped like the parameters also for gradients of each example."""

    def update(updates, state, params=None):
        like = updates if params is None else params
        return jax.tree.map(zeros, updates, like), state

    def zeros(update, param):
        same = update.shape == param.shape
        return jnp.zeros_like(update) if same else jnp.zeros(param.shape, update.dtype)

    return optax.GradientTransformation(lambda params: FrozenState(), update)
