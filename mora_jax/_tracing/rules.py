"""Rules of primitives that move a kernel, cast it or multiply it, or multiply with it.

Each rule takes the parameters of an equation and its inputs, some of them views, and gives the
outputs; None where the views must become arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._product.call import FROZEN_KERNEL
from mora_jax._tracing.view import Taken, View, as_array, note_all

#: The parameters of an equation, and what a rule gives: its outputs, or None.
Params = Mapping[str, Any]
Outputs = Sequence[Any] | None


def _transpose(params: Params, view: Any) -> Outputs:
    return [view.transpose(params["permutation"])] if isinstance(view, View) else None


def _convert(params: Params, view: Any) -> Outputs:
    dtype = np.dtype(params["new_dtype"])
    if not isinstance(view, View) or not jnp.issubdtype(dtype, np.floating):
        return None
    if (cast := view.cast(dtype)) is not None:
        return [cast]
    # The model rounds its kernel and widens it again: all that the kernel is here is rounded.
    whole = dataclasses.replace(view, dtype=view.value.dtype).array()
    return [whole.astype(view.dtype).astype(dtype)]


def _reshape(params: Params, view: Any, *sizes: Any) -> Outputs:
    # What is taken out of a stack differs from its view by an axis of size 1.
    view = view.view if isinstance(view, Taken) else view
    if not isinstance(view, View) or sizes or params["dimensions"] is not None:
        return None
    return _followed(view.reshape(params["new_sizes"], params.get("sharding")))


def _broadcast(params: Params, view: Any, *sizes: Any) -> Outputs:
    if not isinstance(view, View) or sizes:
        return None
    shape, axes = params["shape"], params["broadcast_dimensions"]
    return _followed(view.broadcast(shape, axes, params.get("sharding")))


def _followed(view: View | None) -> Outputs:
    return None if view is None else [view]


def _identity(bind: Callable[..., Any]) -> Callable[..., Outputs]:
    """The rule of a primitive whose result is its operand, or which copies it."""

    def rule(params: Params, view: Any) -> Outputs:
        if not isinstance(view, View):
            return None
        value = jax.tree.map(lambda leaf: bind(leaf, params), view.value)
        return [dataclasses.replace(view, value=value)]

    return rule


def _barrier(params: Params, *inputs: Any) -> Outputs:
    del params
    held = [value.value if isinstance(value, View) else as_array(value) for value in inputs]
    return [
        dataclasses.replace(value, value=after) if isinstance(value, View) else after
        for value, after in zip(inputs, lax.optimization_barrier(held), strict=True)
    ]


def _multiply(params: Params, a: Any, b: Any) -> Outputs:
    del params
    view, by = (a, b) if isinstance(a, View) else (b, a)
    if not isinstance(view, View) or not _is_constant(by):
        return None
    return _followed(view.scale(lambda leaf: leaf * jnp.asarray(by, leaf.dtype)))


def _divide(params: Params, view: Any, by: Any) -> Outputs:
    del params
    if not isinstance(view, View) or not _is_constant(by):
        return None
    return _followed(view.scale(lambda leaf: leaf / jnp.asarray(by, leaf.dtype)))


def _is_constant(value: Any) -> bool:
    """Whether it is one number that nothing is differentiated by."""
    return not isinstance(value, View | Taken | Tracer) and np.ndim(value) == 0


def _stop_gradient(params: Params, view: Any) -> Outputs:
    del params
    return [view.map(lax.stop_gradient)] if isinstance(view, View) else None


def _reshard(params: Params, view: Any) -> Outputs:
    """A kernel that is moved, or told where to lie, is still a kernel."""
    if not isinstance(view, View):
        return None
    sharding = params.get("dst_sharding", params.get("sharding"))
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [*sharding.spec, *[None] * (len(view.order) - len(sharding.spec))]
    stored = [spec[view.order.index(axis)] for axis in range(len(spec))]
    own = NamedSharding(sharding.mesh, PartitionSpec(*stored))
    move = jax.sharding.reshard if "dst_sharding" in params else lax.with_sharding_constraint
    return [dataclasses.replace(view, value=move(view.value, own))]


def _vary(params: Params, view: Any) -> Outputs:
    """Inside `shard_map`, a kernel that all devices have in common meets what differs."""
    if not isinstance(view, View):
        return None
    return [view.map(lambda leaf: lax.pcast(leaf, tuple(params["axes"]), to="varying"))]


def _slice(params: Params, view: Any) -> Outputs:
    if not isinstance(view, View) or not set(params["strides"] or ()) <= {1}:
        return None
    bounds = zip(params["start_indices"], params["limit_indices"], view.shape, strict=True)
    cut = [(axis, start, stop) for axis, (start, stop, n) in enumerate(bounds) if stop - start < n]
    if len(cut) != 1 or cut[0][2] - cut[0][1] != 1:
        return None
    axis, index, _ = cut[0]
    element = _element(view, axis, index)
    return [Taken(element, axis)] if isinstance(element, View) else None


def _unstack(params: Params, view: Any) -> Outputs:
    if not isinstance(view, View):
        return None
    axis = params["axis"]
    return [_element(view, axis, index) for index in range(view.shape[axis])]


def _squeeze(params: Params, value: Any) -> Outputs:
    axes = tuple(params["dimensions"])
    if isinstance(value, View):
        return _followed(value.squeeze(axes))
    return [value.view] if isinstance(value, Taken) and axes == (value.axis,) else None


def _dot_general(params: Params, lhs: Any, rhs: Any) -> Outputs:
    params = dict(params)
    (contract_l, contract_r), (batch_l, batch_r) = params.pop("dimension_numbers")
    if isinstance(rhs, View):
        note_all([lhs], "a product with another parameter")
        pairs = tuple(zip(contract_l, contract_r, strict=True))
        batch = tuple(zip(batch_l, batch_r, strict=True))
        return [rhs.product(as_array(lhs), pairs, batch, **params)]
    if not isinstance(lhs, View):
        return None
    pairs = tuple(zip(contract_r, contract_l, strict=True))
    batch = tuple(zip(batch_r, batch_l, strict=True))
    rhs = as_array(rhs)
    # Results lead with the batch axes, then come those of the first operand.
    lead, free = len(batch), rhs.ndim - len(pairs) - len(batch)
    own = len(lhs.order) - len(pairs) - lead
    if (sharding := params.get("out_sharding")) is not None:
        spec = [*sharding.spec, *[None] * (lead + own + free - len(sharding.spec))]
        spec = [*spec[:lead], *spec[lead + own :], *spec[lead : lead + own]]
        params["out_sharding"] = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    if isinstance(params.get("precision"), tuple):
        params["precision"] = params["precision"][::-1]
    swapped = lhs.product(rhs, pairs, batch, **params)
    return [jnp.moveaxis(swapped, range(len(batch), len(batch) + free), range(-free, 0))]


def _ragged_dot_general(
    params: Params, lhs: Any, rhs: Any, group_sizes: Any, *others: Any
) -> Outputs:
    if not isinstance(rhs, View) or others:
        return None
    params = {name: value for name, value in params.items() if value is not None}
    return [rhs.ragged_product(as_array(lhs), group_sizes, **params)]


def _element(view: View, axis: int, index: int) -> View | jax.Array:
    leaves, rebuild = view.open(axis)
    return rebuild(jax.tree.map(lambda leaf: leaf[index], leaves))


MOVING_RULES: dict[str, Callable[..., Outputs]] = {
    "transpose": _transpose,
    "convert_element_type": _convert,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "slice": _slice,
    "unstack": _unstack,
    "stop_gradient": _stop_gradient,
    "copy": _identity(lambda leaf, _: jnp.copy(leaf)),
    "copy_p": _identity(lambda leaf, _: leaf),
    "name": _identity(lambda leaf, params: checkpoint_name(leaf, params["name"])),
    FROZEN_KERNEL.name: _identity(lambda leaf, _: leaf),
    "optimization_barrier": _barrier,
    "mul": _multiply,
    "div": _divide,
    "reshard": _reshard,
    "sharding_constraint": _reshard,
    "pvary": _vary,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
}
