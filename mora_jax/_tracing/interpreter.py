"""Runs a traced function with adapters on its kernels, whatever library it is written in.

A function is traced to a jaxpr and run again, equation by equation. On its way from the parameters
a kernel stays a `View`, its base and its adapter apart: through casts, transposes, slices of
stacked layers, `jit`, `remat` and `scan`. The product that contracts it becomes an adapted product
of its own; what is no product takes the kernel as an array.

Two kinds of view share these rules (`kernel_views.py`): one records how parameters are used, and
one adapts them. Quantised kernels are a third (`quantized/_kernels.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._product.call import FROZEN_KERNEL
from mora_jax._tracing.view import Taken, View, as_array

#: The parameters of an equation, and what a rule gives: its outputs, or None.
Params = Mapping[str, Any]
Outputs = Sequence[Any] | None


def trace(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Traced:
    """Traces a function; of its arguments and results, those that are no arrays are static."""
    arrays, restore = _arrays_of((args, kwargs))
    put_together = []

    def call(*arrays: Any) -> Any:
        args, kwargs = restore(arrays)
        results, outputs = _arrays_of(function(*args, **kwargs))
        put_together.append(outputs)
        return results

    closed = jax.make_jaxpr(call)(*arrays)
    return Traced(closed, arrays, put_together[-1])


def _arrays_of(tree: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """The arrays among a tree's leaves, and the tree with others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    dynamic = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def restore(arrays: Any) -> Any:
        arrays = iter(arrays)
        merged = [next(arrays) if d else leaf for d, leaf in zip(dynamic, leaves, strict=True)]
        return structure.unflatten(merged)

    return [leaf for d, leaf in zip(dynamic, leaves, strict=True) if d], restore


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced function and the arrays it was called with."""

    closed: core.ClosedJaxpr
    arrays: list[Any]
    outputs: Callable[[Iterable[Any]], Any]

    def run(self, arrays: Sequence[Any]) -> Any:
        """Runs it on arrays and views."""
        return self.outputs(map(as_array, _run_closed(self.closed, arrays)))


def _run_closed(closed: Any, inputs: Sequence[Any]) -> list[Any]:
    return _run(closed.jaxpr, closed.consts, inputs)


def _run(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        rule = None
        if any(isinstance(value, View | Taken) for value in inputs):
            rule = _RULES.get(equation.primitive.name)
        with equation.ctx.manager:
            outputs = None if rule is None else rule(equation.params, *inputs)
            if outputs is None:
                outputs = _bind(equation, map(as_array, inputs))
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(equation: Any, inputs: Iterator[Any]) -> Sequence[Any]:
    primitive = equation.primitive
    outputs = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
    return outputs if primitive.multiple_results else [outputs]


# Each rule gives the outputs, or None where the view must become an array.


def _transpose(params: Params, view: Any) -> Outputs:
    return [view.transpose(params["permutation"])] if isinstance(view, View) else None


def _convert(params: Params, view: Any) -> Outputs:
    dtype = np.dtype(params["new_dtype"])
    floating = jnp.issubdtype(dtype, np.floating)
    return [dataclasses.replace(view, dtype=dtype)] if isinstance(view, View) and floating else None


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


def _squeeze(params: Params, taken: Any) -> Outputs:
    whole = isinstance(taken, Taken) and tuple(params["dimensions"]) == (taken.axis,)
    return [taken.view] if whole else None


def _dot_general(params: Params, lhs: Any, rhs: Any) -> Outputs:
    params = dict(params)
    (contract_l, contract_r), (batch_l, batch_r) = params.pop("dimension_numbers")
    if isinstance(rhs, View):
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


def _jit(params: Params, *inputs: Any) -> Outputs:
    return _run_closed(params["jaxpr"], inputs)


def _custom_jvp(params: Params, *inputs: Any) -> Outputs:
    """The base product of a layer that is adapted already; its view knows how to differentiate.

    The mark in it tells it from a function of the user's, whatever its name: that keeps its own
    derivatives, and sees arrays.
    """
    closed = params["call_jaxpr"]
    ours = any(equation.primitive is FROZEN_KERNEL for equation in closed.jaxpr.eqns)
    return _run_closed(closed, inputs) if ours else None


def _mark(params: Params, view: Any) -> Outputs:
    del params
    return [view]


def _remat(params: Params, *inputs: Any) -> Outputs:
    leaves, rebuild = _open_all(inputs)

    def body(leaves: Any) -> Any:
        return [as_array(out) for out in _run(params["jaxpr"], (), rebuild(leaves))]

    # What is differentiated already is recomputed where it stands.
    body = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return body(leaves)


def scan_parts(params: Params) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries = (len(part) for part in params["ft_in"].elts[:2])
    return consts, carries


def _scan(params: Params, *inputs: Any) -> Outputs:
    consts, carries = scan_parts(params)
    constant, rebuild_constant = _open_all(inputs[:consts])
    carry = [as_array(value) for value in inputs[consts : consts + carries]]
    stacked, rebuild_element = _open_all(inputs[consts + carries :], axis=0)

    def body(carry: Any, stacked: Any) -> Any:
        inputs = [*rebuild_constant(constant), *carry, *rebuild_element(stacked)]
        outputs = [as_array(out) for out in _run_closed(params["jaxpr"], inputs)]
        return outputs[:carries], outputs[carries:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = lax.scan(body, carry, stacked, **options)
    return [*carry, *outputs]


_RULES = {
    "transpose": _transpose,
    "convert_element_type": _convert,
    "stop_gradient": _stop_gradient,
    "reshard": _reshard,
    "sharding_constraint": _reshard,
    "pvary": _vary,
    "slice": _slice,
    "squeeze": _squeeze,
    "unstack": _unstack,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "custom_jvp_call": _custom_jvp,
    FROZEN_KERNEL.name: _mark,
    "jit": _jit,
    "pjit": _jit,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
}


def _element(view: View, axis: int, index: int) -> View | jax.Array:
    leaves, rebuild = view.open(axis)
    return rebuild(jax.tree.map(lambda leaf: leaf[index], leaves))


def _open_all(values: Sequence[Any], axis: int | None = None) -> tuple[list[Any], Callable]:
    """Leaves of arrays and views, and how to put them together again."""
    opened = [
        value.open(axis) if isinstance(value, View) else (as_array(value), None) for value in values
    ]

    def rebuild(leaves: Any) -> Any:
        return [
            leaf if again is None else again(leaf)
            for leaf, (_, again) in zip(leaves, opened, strict=True)
        ]

    return [leaves for leaves, _ in opened], rebuild
