"""How a kernel of any rank is read as matrices of I input by O output features.

Shape letters: I input features, O output features, B batch axes (experts, stacked layers).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from mora_jax._arrays.dtypes import widen_for
from mora_jax._schemes.base import Adapter, Scheme

DotDimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """Which axes of a kernel are contracted (I), free (O) and batched (B), in flattening order."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def sizes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """(B, I, O) of a kernel of this shape."""
        return (
            tuple(shape[axis] for axis in self.batch),
            math.prod(shape[axis] for axis in self.inputs),
            math.prod(shape[axis] for axis in self.outputs),
        )

    def replaced(self, new: Callable[[int], Iterable[int]]) -> KernelAxes:
        """The axes after a change of layout: `new` gives what an axis has become, none or more."""
        parts = (self.inputs, self.outputs, self.batch)
        return KernelAxes(*(tuple(n for axis in part for n in new(axis)) for part in parts))

    def delta(
        self, adapter: Adapter, shape: Sequence[int], scheme: Scheme, dtype: Any = np.float32
    ) -> jax.Array:
        """The delta, laid out like the kernel; adapter leaves are [B..., rows, columns].

        It is formed, and given, in the widest of float32, the kernel's `dtype` and the adapter's.
        """
        adapter = widen_for(dtype, adapter)
        batch, in_features, out_features = self.sizes(shape)
        one = {
            name: jax.ShapeDtypeStruct(leaf.shape[len(batch) :], leaf.dtype)
            for name, leaf in adapter.items()
        }
        scheme.check(one, in_features, out_features)
        kernel = functools.partial(
            scheme.delta_kernel, in_features=in_features, out_features=out_features
        )
        for _ in batch:
            kernel = jax.vmap(kernel)
        order = self.batch + self.inputs + self.outputs
        value = kernel(adapter).reshape([shape[axis] for axis in order])
        return value.transpose([order.index(axis) for axis in range(len(shape))])

    def columns(self, value: jax.Array, shape: Sequence[int]) -> jax.Array:
        """[B..., 1, O] laid out like the kernel, the axes of inputs of size 1."""
        order = self.batch + self.inputs + self.outputs
        value = value.reshape([1 if axis in self.inputs else shape[axis] for axis in order])
        return value.transpose([order.index(axis) for axis in range(len(shape))])


def kernel_axes(kernel: jax.Array, dimension_numbers: DotDimensionNumbers) -> KernelAxes:
    """The axes of the right-hand side of a `jax.lax.dot_general`."""
    (_, inputs), (_, batch) = dimension_numbers
    inputs, batch = tuple(inputs), tuple(batch)
    outputs = tuple(axis for axis in range(kernel.ndim) if axis not in inputs + batch)
    return KernelAxes(inputs, outputs, batch)


def einsum_axes(equation: str) -> KernelAxes | None:
    """The axes of an einsum's second operand; None where it is no kernel.

    >>> einsum_axes("btd,ndh->btnh")
    KernelAxes(inputs=(1,), outputs=(0, 2), batch=())
    """
    operands, _, result = equation.replace(" ", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    if "..." in kernel or "," in kernel:
        return None
    axes = range(len(kernel))
    contracted = tuple(a for a in axes if kernel[a] not in result)
    batch = tuple(a for a in axes if kernel[a] in result and kernel[a] in inputs)
    outputs = tuple(a for a in axes if a not in contracted + batch)
    return KernelAxes(contracted, outputs, batch) if contracted and outputs else None
