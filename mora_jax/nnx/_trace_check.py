"""Whether a model's forward pass, traced on inputs, uses its adapted kernels in their layers alone.

What `_guard.py` refuses, it refuses by a layer's attributes. Here the arrays themselves are
followed through the trace, however the model comes by them: `nnx.state(layer)`, `nnx.update`. Every
adapted kernel must reach the product of its own layer as it is stored, and nothing else.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from mora_jax._arrays.paths import join_path
from mora_jax._tracing.interpreter import scan_parts, trace
from mora_jax.nnx._guard import LEAVE_OUT

_CHECKING: contextvars.ContextVar[bool] = contextvars.ContextVar("checking", default=False)

#: Marks the kernel where its own layer multiplies by it. Only a check binds it.
_USE = core.Primitive("mora_kernel_use")
_USE.def_impl(lambda kernel, path: kernel)
_USE.def_abstract_eval(lambda kernel, path: kernel)
mlir.register_lowering(_USE, lambda _, kernel, path: [kernel])
ad.deflinear(_USE, lambda cotangent, path: [cotangent])
batching.primitive_batchers[_USE] = lambda args, axes, path: (_USE.bind(*args, path=path), *axes)

#: What leaves the axes of a kernel where they are.
_KEEPS_AXES = {
    "convert_element_type", "copy", "copy_p", "dynamic_slice", "optimization_barrier", "pvary",
    "reshard", "sharding_constraint", "slice", "stop_gradient",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Origin:
    """A kernel on its way through a trace.

    Attributes:
      path: the kernel's.
      stacks: its axes of stacked layers.
      order: axis i of the array is axis `order[i]` of the kernel.
      scanned: axes that scans have taken apart, the innermost first.
    """

    path: str
    stacks: tuple[int, ...]
    order: tuple[int, ...]
    scanned: tuple[int, ...] = ()

    @property
    def is_stored(self) -> bool:
        """Whether the layer sees the axes in the order in which they are stored."""
        own = [axis for axis in self.order if axis not in self.stacks]
        return own == sorted(own)

    def moved(self, name: str, params: Mapping[str, Any]) -> Origin | None:
        """The kernel after an equation that moves its axes; None after any other."""
        if name in _KEEPS_AXES:
            return self
        if name == "transpose":
            return self._with(self.order[axis] for axis in params["permutation"])
        if name in ("squeeze", "gather", "unstack"):
            gone = {
                "squeeze": lambda: params["dimensions"],
                "gather": lambda: params["dimension_numbers"].collapsed_slice_dims,
                "unstack": lambda: (params["axis"],),
            }[name]()
            return self._with(of for axis, of in enumerate(self.order) if axis not in gone)
        return None

    def _with(self, order: Iterable[int]) -> Origin:
        return dataclasses.replace(self, order=tuple(order))

    def element(self) -> Origin:
        """An element, inside a scan over the first axis."""
        scanned = (self.order[0], *self.scanned)
        return dataclasses.replace(self, order=self.order[1:], scanned=scanned)

    def stack(self) -> Origin | None:
        """What a scan makes of its elements."""
        if not self.scanned:
            return None
        first, *rest = self.scanned
        return dataclasses.replace(self, order=(first, *self.order), scanned=tuple(rest))


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
    stacks_of = {path: layer.mora.kernel_stacks for path, layer, _ in _places(copy, kernels)}

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
    origins: list[Origin | None] = [
        Origin(path, stacks_of[path], tuple(range(len(kernels[path].shape))))
        for path in sorted(kernels)
    ]
    outputs = _follow(jaxpr, origins + [None] * (len(jaxpr.invars) - len(origins)))
    if used := next((origin for origin in outputs if origin is not None), None):
        raise _used_elsewhere(used.path, "returns it")


def _places(model: nnx.Module, kernels: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for _, layer in nnx.iter_modules(model):
        if (mora := vars(layer).get("mora")) is not None and hasattr(mora, "kernel_name"):
            path = join_path(mora.layer_path.path, mora.kernel_name)
            if path in kernels:
                yield path, layer, mora.kernel_name


def _follow(jaxpr: Any, origins: Sequence[Origin | None]) -> list[Origin | None]:
    """Which kernel each output of a jaxpr is, None for others, from the same of its inputs."""
    known = {var: of for var, of in zip(jaxpr.invars, origins, strict=True) if of is not None}

    def origin(atom: Any) -> Origin | None:
        return None if isinstance(atom, core.Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        inputs, name = [origin(atom) for atom in equation.invars], equation.primitive.name
        if equation.primitive is _USE:
            _check_use(inputs[0], equation.params["path"])
            continue
        kernel = next((of for of in inputs if of is not None), None)
        outputs = _inner(equation, inputs)
        if outputs is None:
            moved = None if kernel is None else kernel.moved(name, equation.params)
            outputs = [moved] * len(equation.outvars)
            if kernel is not None and moved is None:
                raise _used_elsewhere(kernel.path, f"has it in {name!r}")
        known |= {v: of for v, of in zip(equation.outvars, outputs, strict=True) if of is not None}
    return [origin(atom) for atom in jaxpr.outvars]


def _inner(equation: Any, inputs: Sequence[Origin | None]) -> Sequence[Origin | None] | None:
    """Origins of the outputs of an equation that runs another jaxpr; None if it runs none."""
    params, name = equation.params, equation.primitive.name
    if name == "cond":
        found = [_follow(branch.jaxpr, inputs[1:]) for branch in params["branches"]]
        return [_the_same(of) for of in zip(*found, strict=True)]
    if name == "while":
        consts = params["cond_nconsts"], params["body_nconsts"]
        carry = inputs[sum(consts) :]
        _follow(params["cond_jaxpr"].jaxpr, [*inputs[: consts[0]], *carry])
        after = _follow(params["body_jaxpr"].jaxpr, [*inputs[consts[0] : sum(consts)], *carry])
        return [_the_same(pair) for pair in zip(carry, after, strict=True)]
    if name == "scan":
        consts, carries = scan_parts(params)
        lead = consts + carries
        elements = [None if of is None else of.element() for of in inputs[lead:]]
        outputs = _follow(params["jaxpr"].jaxpr, [*inputs[:lead], *elements])
        stacked = [None if of is None else of.stack() for of in outputs[carries:]]
        kept = zip(inputs[consts:lead], outputs[:carries], strict=True)
        return [*map(_the_same, kept), *stacked]
    for field in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := params.get(field)) is not None:
            inner = getattr(inner, "jaxpr", inner)
            if len(inner.invars) == len(inputs) and len(inner.outvars) == len(equation.outvars):
                return _follow(inner, inputs)
    return None


def _the_same(origins: Sequence[Origin | None]) -> Origin | None:
    """What several branches, or the rounds of a loop, agree on."""
    if len(set(origins)) == 1:
        return origins[0]
    kernel = next(origin for origin in origins if origin is not None)
    raise _used_elsewhere(kernel.path, "takes it in one branch or round and not in another")


def _check_use(origin: Origin | None, path: str) -> None:
    if origin is None or origin.path != path or not origin.is_stored:
        raise ValueError(
            f"the layer of {path!r}, which is adapted, multiplies by another array than the kernel "
            f"that is stored: the forward pass overwrites it. {_REMEDY}"
        )


_REMEDY = f"A merged model would compute something else. {LEAVE_OUT}"


def _used_elsewhere(path: str, how: str) -> ValueError:
    return ValueError(
        f"the forward pass uses {path!r}, the kernel of an adapted layer, outside that layer: it "
        f"{how}. {_REMEDY}"
    )
