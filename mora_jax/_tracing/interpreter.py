"""Runs a traced function with adapters on its kernels, whatever library it is written in.

A function is traced to a jaxpr and run again, equation by equation. On its way from the parameters
a kernel stays a `View`, its base and its adapter apart: through what moves, casts or copies it
(`rules.py`), and into `jit`, `remat`, `scan`, `cond` and `while`. The product that contracts it
becomes an adapted product of its own; what is no product takes the kernel as an array.

Two kinds of view share these rules: one records how parameters are used (`recording.py`), and one
adapts them (`kernel_views.py`). Quantised kernels are a third (`quantized/_kernels.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from mora_jax._product.call import FROZEN_KERNEL
from mora_jax._tracing.rules import MOVING_RULES, Outputs, Params
from mora_jax._tracing.view import Taken, View, as_array, note_all


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
        outputs = _run_closed(self.closed, arrays)
        note_all(outputs, "the results")
        return self.outputs(map(as_array, outputs))


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
                note_all(inputs, equation.primitive.name)
                outputs = _bind(equation, map(as_array, inputs))
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(equation: Any, inputs: Iterator[Any]) -> Sequence[Any]:
    primitive = equation.primitive
    outputs = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
    return outputs if primitive.multiple_results else [outputs]


# Each rule gives the outputs, or None where the view must become an array.


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
    carry = inputs[consts : consts + carries]
    note_all(carry, "the carry of a scan")
    carry = [as_array(value) for value in carry]
    stacked, rebuild_element = _open_all(inputs[consts + carries :], axis=0)

    def body(carry: Any, stacked: Any) -> Any:
        inputs = [*rebuild_constant(constant), *carry, *rebuild_element(stacked)]
        outputs = [as_array(out) for out in _run_closed(params["jaxpr"], inputs)]
        return outputs[:carries], outputs[carries:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = lax.scan(body, carry, stacked, **options)
    return [*carry, *outputs]


def _cond(params: Params, index: Any, *inputs: Any) -> Outputs:
    if "branches_platforms" in params:
        return None  # the platform chooses
    leaves, rebuild = _open_all(inputs)

    def body(branch: Any) -> Callable[[Any], Any]:
        return lambda leaves: [as_array(out) for out in _run_closed(branch, rebuild(leaves))]

    return lax.switch(index, [body(branch) for branch in params["branches"]], leaves)


def _while(params: Params, *inputs: Any) -> Outputs:
    conds, bodies = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body = inputs[:conds], inputs[conds : conds + bodies]
    carry = inputs[conds + bodies :]
    note_all(carry, "the carry of a while loop")

    def condition(carry: Any) -> Any:
        (again,) = _run_closed(params["cond_jaxpr"], [*of_cond, *carry])
        return as_array(again)

    def body(carry: Any) -> Any:
        return [as_array(out) for out in _run_closed(params["body_jaxpr"], [*of_body, *carry])]

    return lax.while_loop(condition, body, [as_array(value) for value in carry])


_RULES = MOVING_RULES | {
    "custom_jvp_call": _custom_jvp,
    "jit": _jit,
    "pjit": _jit,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}


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
