"""What a traced function does with its parameters: who reads them, and as what.

An adapter changes the products of one layer, while a merge changes the stored kernel. The two are
the same where the layer multiplies by the stored kernel itself, and where nothing else reads it.
Layers mark the kernel that they multiply by (`mark`). The function is traced, and each parameter is
followed through whatever moves it: casts, transposes, `jit`, `remat`, `scan`, `cond` and so on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import dce_jaxpr

from mora_jax._tracing.interpreter import scan_parts

#: Marks the kernel of a layer where the layer multiplies by it; it is the identity. Its parameter
#: `path` is the path of the kernel among the parameters.
KERNEL_OF_LAYER = Primitive("mora_kernel_of_layer")
KERNEL_OF_LAYER.def_impl(lambda kernel, path: kernel)
KERNEL_OF_LAYER.def_abstract_eval(lambda kernel, path: kernel)
mlir.register_lowering(KERNEL_OF_LAYER, lambda _, kernel, path: [kernel])
batching.primitive_batchers[KERNEL_OF_LAYER] = lambda args, axes, path: (
    KERNEL_OF_LAYER.bind(*args, path=path),
    *axes,
)
# Tangents are no kernels.
ad.primitive_jvps[KERNEL_OF_LAYER] = lambda primals, tangents, path: (
    KERNEL_OF_LAYER.bind(*primals, path=path),
    *tangents,
)


def mark(kernel: jax.Array, path: str) -> jax.Array:
    """The kernel, marked as what the layer of the parameter at `path` multiplies by."""
    return KERNEL_OF_LAYER.bind(kernel, path=path)


@dataclasses.dataclass
class Uses:
    """What became of the parameters of a traced function.

    Attributes:
      computed: paths of kernels whose layer multiplied by something else than the stored kernel.
      others: path of a parameter -> the first operation that reads it beside its layer, as JAX
        names it; "" where the function returns it.
    """

    computed: set[str] = dataclasses.field(default_factory=set)
    others: dict[str, str] = dataclasses.field(default_factory=dict)


def find_uses(function: Callable[[Any], Any], arguments: Any, paths: Mapping[int, str]) -> Uses:
    """Traces a function of one tree, and follows the parameters in it.

    Args:
      function: the function.
      arguments: its argument, a tree of arrays or of their shapes.
      paths: number of a leaf of `arguments` -> path of the parameter.
    """
    leaves = jax.tree.leaves(arguments)
    closed = jax.make_jaxpr(function)(arguments)
    # Without what is computed in vain.
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    walk = _Walk({path: np.dtype(leaves[index].dtype) for index, path in paths.items()})
    for path in walk.run(jaxpr, [paths.get(index) for index in range(len(leaves))]):
        walk.note(path, "")
    return walk.uses


class _Walk:
    """Goes through a jaxpr; each value is the parameter at some path, or None.

    Attributes:
      uses: what was found.
    """

    def __init__(self, dtypes: Mapping[str, np.dtype]) -> None:
        self._dtypes = dtypes
        self.uses = Uses()

    def note(self, path: str | None, what: str) -> None:
        """A parameter is read by `what`."""
        if path is not None:
            self.uses.others.setdefault(path, what)

    def run(self, jaxpr: Any, inputs: Sequence[str | None]) -> list[str | None]:
        """The paths of a jaxpr's outputs, where these are parameters as they are."""
        values = dict(zip(jaxpr.invars, inputs, strict=True))
        # Literals do not hash, and are no parameters.
        read = lambda atoms: [None if hasattr(a, "val") else values.get(a) for a in atoms]
        for equation in jaxpr.eqns:
            outputs = self._equation(equation, read(equation.invars))
            values.update(zip(equation.outvars, outputs, strict=True))
        return read(jaxpr.outvars)

    def _equation(self, equation: Any, inputs: list[str | None]) -> Sequence[str | None]:
        name, params = equation.primitive.name, equation.params
        if equation.primitive is KERNEL_OF_LAYER:
            self._arrive(params["path"], inputs[0])
            return [None]
        if name in _CONTROL_FLOW:
            return _CONTROL_FLOW[name](self, params, inputs)
        if name in _MOVES or (name == "convert_element_type" and self._keeps(equation, inputs[0])):
            return inputs
        sizes = len(equation.invars), len(equation.outvars)
        for inner in _jaxprs_in(params):
            if (len(inner.invars), len(inner.outvars)) == sizes:
                return self.run(inner, inputs)
        for path in inputs:
            self.note(path, name)
        return [None] * len(equation.outvars)

    def _arrive(self, path: str, value: str | None) -> None:
        if value != path:
            self.uses.computed.add(path)
            self.note(value, "another layer")

    def _keeps(self, equation: Any, path: str | None) -> bool:
        """Whether a cast is one to the dtype that the layer computes in, not a rounding."""
        if path is None:
            return False
        old, new = (np.dtype(v.aval.dtype) for v in (equation.invars[0], equation.outvars[0]))
        rounded = old.itemsize < min(new.itemsize, self._dtypes[path].itemsize)
        return jnp.issubdtype(new, np.floating) and not rounded

    def _scan(self, params: Mapping[str, Any], inputs: list[str | None]) -> list[str | None]:
        consts, carries = scan_parts(params)
        outputs = self.run(params["jaxpr"].jaxpr, inputs)
        carried = self._carried(inputs[consts : consts + carries], outputs[:carries], "scan")
        return [*carried, *outputs[carries:]]

    def _while(self, params: Mapping[str, Any], inputs: list[str | None]) -> list[str | None]:
        first, second = params["cond_nconsts"], params["body_nconsts"]
        carry = inputs[first + second :]
        for output in self.run(params["cond_jaxpr"].jaxpr, [*inputs[:first], *carry]):
            self.note(output, "while")
        outputs = self.run(params["body_jaxpr"].jaxpr, [*inputs[first : first + second], *carry])
        return self._carried(carry, outputs, "while")

    def _carried(
        self, before: Sequence[str | None], after: Sequence[str | None], name: str
    ) -> list[str | None]:
        """A loop's carry: a parameter stays one where every turn hands it on."""
        for ours, theirs in zip(before, after, strict=True):
            if ours != theirs:
                self.note(ours, name)
                self.note(theirs, name)
        return [a if a == b else None for a, b in zip(before, after, strict=True)]

    def _cond(self, params: Mapping[str, Any], inputs: list[str | None]) -> list[str | None]:
        self.note(inputs[0], "cond")
        branches = [self.run(branch.jaxpr, inputs[1:]) for branch in params["branches"]]
        outputs = []
        for values in zip(*branches, strict=True):
            same = len(set(values)) == 1
            for path in () if same else values:
                self.note(path, "cond")
            outputs.append(values[0] if same else None)
        return outputs


#: Operations that move their operands, or leave them as they are, one output for each.
_MOVES = {
    "copy",
    "copy_p",
    "mora_frozen_kernel",
    "name",
    "optimization_barrier",
    "pvary",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
    "transpose",
}

_CONTROL_FLOW = {"scan": _Walk._scan, "while": _Walk._while, "cond": _Walk._cond}


def _jaxprs_in(params: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters: of `jit`, `remat`, `custom_vjp` and so on."""
    for value in params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner
