"""Whether a model's forward pass, traced on inputs, uses its adapted kernels in their layers alone.

What `_guard.py` refuses, it refuses by a layer's attributes. Here the arrays themselves are
followed through the trace, however the model comes by them: `nnx.state(layer)`, `nnx.update`. Every
adapted kernel must reach the product of its own layer as it is stored, and nothing else.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from mora_jax._arrays.paths import join_path
from mora_jax._tracing.interpreter import trace

_CHECKING: contextvars.ContextVar[bool] = contextvars.ContextVar("checking", default=False)

#: Marks the kernel where its own layer multiplies by it. Only a check binds it.
_USE = core.Primitive("mora_kernel_use")
_USE.def_impl(lambda kernel, path: kernel)
_USE.def_abstract_eval(lambda kernel, path: kernel)
mlir.register_lowering(_USE, lambda _, kernel, path: [kernel])
ad.deflinear(_USE, lambda cotangent, path: [cotangent])
batching.primitive_batchers[_USE] = lambda args, axes, path: (_USE.bind(*args, path=path), *axes)

#: What moves a kernel, or takes an element out of a stack of them.
_MOVES = {
    "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dynamic_slice", "gather",
    "optimization_barrier", "pvary", "reshard", "reshape", "sharding_constraint", "slice",
    "squeeze", "stop_gradient",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CheckedPath:
    """As `LayerPath`, but of layers that are told apart, so that none takes another's trace."""

    path: str


def note_use(mora: Any, kernel: jax.Array) -> jax.Array:
    """The kernel, marked as used by its own layer while a check runs."""
    if not _CHECKING.get():
        return kernel
    return _USE.bind(kernel, path=join_path(mora.layer_path.path, mora.kernel_name))


def check_uses(
    copy: nnx.Module, kernels: Mapping[str, nnx.Variable], call: Callable[..., Any], inputs: Any
) -> None:
    """Raises ValueError for an adapted kernel that something else than its layer uses.

    Args:
      copy: a copy of the model, of which every layer has a `CheckedPath`.
      kernels: path -> variable, of its adapted kernels.
      call: a function of a model and these inputs, one forward pass.
      inputs: a tree of arrays, shapes and static values.
    """
    graph, state = nnx.split(copy)

    def run(values: dict[str, jax.Array], inputs: Any) -> Any:
        model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
        for path, layer, name in _places(model, kernels):
            vars(layer)[name].set_value(values[path])
        return jax.tree.leaves(call(model, inputs))

    token = _CHECKING.set(True)
    try:
        stored = {path: kernel.get_raw_value() for path, kernel in kernels.items()}
        jaxpr = trace(run, stored, inputs).closed.jaxpr
    finally:
        _CHECKING.reset(token)
    paths: list[str | None] = [*sorted(kernels)]
    origins = _follow(jaxpr, paths + [None] * (len(jaxpr.invars) - len(paths)))
    if used := next((path for path in origins if path is not None), None):
        raise _used_elsewhere(used, "returns it")


def _places(model: nnx.Module, kernels: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for _, layer in nnx.iter_modules(model):
        if (mora := vars(layer).get("mora")) is not None and hasattr(mora, "kernel_name"):
            path = join_path(mora.layer_path.path, mora.kernel_name)
            if path in kernels:
                yield path, layer, mora.kernel_name


def _follow(jaxpr: Any, origins: list[str | None]) -> list[str | None]:
    """Which kernel each output of a jaxpr is, None for others, from the same of its inputs."""
    known = {var: of for var, of in zip(jaxpr.invars, origins, strict=True) if of is not None}

    def origin(atom: Any) -> str | None:
        return None if isinstance(atom, core.Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        inputs = [origin(atom) for atom in equation.invars]
        name = equation.primitive.name
        if equation.primitive is _USE:
            if inputs != [path := equation.params["path"]]:
                raise _overwritten(path)
            continue
        if not any(inputs):
            inner = _inner(equation, inputs)
            outputs = [None] * len(equation.outvars) if inner is None else inner
        elif name in _MOVES:
            outputs = [inputs[0]] * len(equation.outvars)
        elif (inner := _inner(equation, inputs)) is not None:
            outputs = inner
        else:
            raise _used_elsewhere(next(of for of in inputs if of), f"has it in {name!r}")
        known |= {v: of for v, of in zip(equation.outvars, outputs, strict=True) if of is not None}
    return [origin(atom) for atom in jaxpr.outvars]


def _inner(equation: Any, inputs: list[str | None]) -> list[str | None] | None:
    """Origins of the outputs of an equation that runs another jaxpr; None if it runs none."""
    params = equation.params
    if equation.primitive.name == "cond":
        found = [_follow(branch.jaxpr, inputs[1:]) for branch in params["branches"]]
        return [of[0] if len(set(of)) == 1 else None for of in zip(*found, strict=True)]
    if equation.primitive.name == "while":
        consts = params["cond_nconsts"], params["body_nconsts"]
        carry = inputs[sum(consts) :]
        _follow(params["cond_jaxpr"].jaxpr, inputs[: consts[0]] + carry)
        return _follow(params["body_jaxpr"].jaxpr, inputs[consts[0] : sum(consts)] + carry)
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := params.get(name)) is not None:
            inner = getattr(inner, "jaxpr", inner)
            if len(inner.invars) == len(inputs) and len(inner.outvars) == len(equation.outvars):
                return _follow(inner, inputs)
    return None


_REMEDY = (
    "A merged model would compute something else. Leave the layer out with MoRAConfig.exclude, or "
    "adapt the model as a function of its parameters, mora_jax.adapt(function, config)."
)


def _used_elsewhere(path: str, how: str) -> ValueError:
    return ValueError(
        f"the forward pass uses {path!r}, the kernel of an adapted layer, outside that layer: it "
        f"{how}. {_REMEDY}"
    )


def _overwritten(path: str) -> ValueError:
    return ValueError(
        f"the layer of {path!r}, which is adapted, multiplies by another array than the kernel "
        f"that is stored: the forward pass overwrites it. {_REMEDY}"
    )
