"""Along which axes a kernel is stacked: `nnx.vmap` gives every parameter of a layer one more axis.

A layer still says the shape of one of its kernels, so the other axes of the full kernel are the
stack's. Where layers are as many as heads, more than one axis fits, and the other parameters of the
stack decide: a stack has one axis for all of them, counted from the front or from the back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from flax import nnx

from mora_jax._arrays.paths import join_path
from mora_jax._product.axes import KernelAxes

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A parameter of a layer of Flax's.

    Attributes:
      layer: the layer's path.
      full: the parameter's shape.
      own: its shape as the layer says it, without the axes of stacks.
    """

    layer: str
    full: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many axes are stacks'."""
        return len(self.full) - len(self.own)

    def fitting(self) -> list[Axes]:
        """The axes that may be the stacks'."""
        if self.count < 0:
            return []
        return [
            stacks
            for stacks in itertools.combinations(range(len(self.full)), self.count)
            if tuple(n for axis, n in enumerate(self.full) if axis not in stacks) == self.own
        ]

    def allows(self, stacks: Axes, ndim: int) -> bool:
        """Whether it can be stacked as a parameter of `ndim` axes is along `stacks`."""
        from_back = tuple(axis - ndim for axis in stacks)
        return any(
            own == stacks or tuple(axis - len(self.full) for axis in own) == from_back
            for own in self.fitting()
        )


def stack_axes(
    name: str, kernel: Stacked, axes: KernelAxes, others: list[Stacked], declared: Axes | None
) -> Axes:
    """The axes that a kernel has more than its layer knows of.

    Args:
      name: the kernel's, in its layer.
      kernel: the kernel.
      axes: the kernel's, as its layer sees it.
      others: the model's other parameters.
      declared: what the config or a plan says.

    Raises:
      ValueError: if no axes fit, or several do and nothing decides.
    """
    fitting, path = kernel.fitting(), join_path(kernel.layer, name)
    if not fitting:
        raise ValueError(
            f"{path!r} is a kernel of shape {kernel.full}, which does not fit its layer: that says "
            f"{kernel.own}."
        )
    if len(fitting) == 1 or declared in fitting:
        return fitting[0] if len(fitting) == 1 else declared or ()
    for prefix in _prefixes(kernel.layer):
        stack = [other for other in others if _is_within(other.layer, prefix)]
        if any(other.count != kernel.count for other in stack):
            break  # A parameter that is not of this stack.
        left = [
            stacks
            for stacks in fitting
            if all(other.allows(stacks, len(kernel.full)) for other in stack)
        ]
        if len(left) == 1:
            return left[0]
    example = full_axes(axes, fitting[0], len(kernel.full))
    raise ValueError(
        f"{path!r} is a kernel of shape {kernel.full} in a layer that says {kernel.own}: it is "
        f"stacked along one of the axes {fitting}, and no other parameter tells which. "
        f"Say it in the config: kernels={{{path!r}: {example}}} if that is {fitting[0]}."
    )


def full_axes(axes: KernelAxes, stacks: Axes, ndim: int) -> KernelAxes:
    """The axes of a stacked kernel, from those that its layer sees."""
    rest = [axis for axis in range(ndim) if axis not in stacks]
    inputs, outputs, batch = (
        tuple(rest[axis] for axis in part) for part in (axes.inputs, axes.outputs, axes.batch)
    )
    return KernelAxes(inputs, outputs, stacks + batch)


def known_parameters(modules: Iterator[tuple[str, Any]]) -> list[Stacked]:
    """The parameters of which their layers say the shape; `modules` are pairs of path and layer."""
    return [
        Stacked(path, tuple(value.shape), own)
        for path, layer in modules
        for name, own in _own_shapes(layer).items()
        if isinstance(value := vars(layer).get(name), nnx.Param)
    ]


def _own_shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape, of the parameters of a layer that is not stacked."""
    match layer:
        case nnx.Linear():
            outputs = (layer.out_features,)
            return {"kernel": (layer.in_features, *outputs), "bias": outputs}
        case nnx.LinearGeneral():
            batch = tuple(layer.batch_axis.values())
            outputs = (*batch, *layer.out_features)
            return {"kernel": (*batch, *layer.in_features, *layer.out_features), "bias": outputs}
        case nnx.Einsum():
            return {"kernel": tuple(layer.kernel_shape), "bias": tuple(layer.bias_shape or ())}
        case nnx.Conv():
            return {"kernel": tuple(layer.kernel_shape), "bias": (layer.out_features,)}
        case nnx.Embed():
            return {"embedding": (layer.num_embeddings, layer.features)}
        case nnx.BatchNorm() | nnx.LayerNorm() | nnx.RMSNorm():
            return dict.fromkeys(("scale", "bias"), (layer.num_features,))
    return {}


def _prefixes(path: str) -> Iterator[str]:
    """The path, its parent and so on, the root last."""
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def _is_within(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + "/")
