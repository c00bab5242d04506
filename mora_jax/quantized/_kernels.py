"""Quantised kernels: making one, a product with one, adding a delta to one.

A kernel becomes integers of its shape and a scale for each tile of it, a `qwix.QArray`. In a model
that is traced and run again it is a view, as a kernel with an adapter is. Adding a delta means
dequantising, adding and quantising again; the sum is seldom on a level, and `MergeLoss` says how
far off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax import lax

from mora_jax._arrays.dtypes import wide_dtype
from mora_jax._merging.losses import MergeLoss, as_numbers, loss_of_sums, loss_sums
from mora_jax._plans.layer import AdapterSpec
from mora_jax._product.dora import kernel_delta
from mora_jax._tracing.view import View

#: The largest number, in units of the scale, that qwix rounds to a level and does not clip.
BOUNDS = {"int8": 127.5, "int4": 7.5, "nf4": 1.0}


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of the parameters is quantised."""
    return isinstance(leaf, qwix.QArray)


def qtype_of(kernel: qwix.QArray) -> str:
    """The name of its type; some are dtypes, and some have a name alone."""
    return kernel.qtype if isinstance(kernel.qtype, str) else jnp.dtype(kernel.qtype).name


@dataclasses.dataclass(frozen=True)
class QuantizedView(View):
    """A quantised array, which every product dequantises for itself."""

    value: Any

    @classmethod
    def of(cls, value: qwix.QArray) -> QuantizedView:
        """The whole array, as it is stored."""
        return cls(value, tuple(range(value.ndim)), value.dtype)

    def array(self):
        return qwix.dequantize(self.value).astype(self.dtype).transpose(self.order)

    def open(self, axis=None):
        if axis is None:
            return self.value, lambda value: dataclasses.replace(self, value=value)
        stored = self.order[axis]
        order = tuple(a - (a > stored) for a in self.order if a != stored)
        count = self.value.shape[stored]

        def lead(leaf):
            return jnp.moveaxis(jnp.repeat(leaf, count // leaf.shape[stored], stored), stored, 0)

        return jax.tree.map(lead, self.value), lambda value: dataclasses.replace(
            self, value=value, order=order
        )

    def product(self, lhs, contracting, batch, **params):
        (inputs, inputs_r), (batches, batches_r) = (
            tuple(zip(*pairs, strict=True)) or ((), ()) for pairs in (contracting, batch)
        )
        numbers = ((inputs, inputs_r), (batches, batches_r))

        return self._within(
            lambda lhs, kernel: lax.dot_general(lhs, kernel, numbers, **params), lhs
        )

    def ragged_product(self, lhs, group_sizes, **params):
        return self._within(
            lambda lhs, kernel: lax.ragged_dot_general(lhs, kernel, group_sizes, **params), lhs
        )

    def _within(self, product, lhs):
        # Recomputed in the backward pass, or the floating kernels of all layers would be kept.
        @jax.checkpoint
        def call(lhs, value):
            # Held back until the inputs are there, or they could all be made at the start.
            lhs, value = lax.optimization_barrier((lhs, value))
            return product(lhs, dataclasses.replace(self, value=value).array())

        return call(lhs, lax.stop_gradient(self.value))


@functools.partial(jax.jit, static_argnames=("qtype", "tiles"))
def quantize_kernel(kernel: jax.Array, qtype: str, tiles: tuple[int, ...]) -> qwix.QArray:
    """Quantises by the largest number of each tile; `tiles` has the tile's size along each axis."""
    return qwix.quantize(kernel, qtype, tiled_axes=dict(enumerate(tiles)))


dequantize_kernel = jax.jit(qwix.dequantize)


def merge_kernel(
    kernel: qwix.QArray, adapter: Mapping[str, jax.Array], spec: AdapterSpec
) -> tuple[qwix.QArray, MergeLoss]:
    """The kernel plus its adapter's delta, quantised as before, and what that lost."""
    # Calls of their own, so that all three are rounded to what they are elsewhere: within one, the
    # compiler would join a product and a sum, and find a loss where there is none.
    before = dequantize_kernel(kernel)
    delta = _delta(before, adapter, spec)
    merged = _add(kernel, before, delta)
    return merged, as_numbers(_loss(before, delta, dequantize_kernel(merged)))


@functools.partial(jax.jit, static_argnames="spec")
def _delta(kernel: jax.Array, adapter: Mapping[str, jax.Array], spec: AdapterSpec) -> jax.Array:
    return kernel_delta(kernel, spec.batch_first(adapter), spec.kernel_axes, spec.scheme)


@jax.jit
def _add(kernel: qwix.QArray, before: jax.Array, delta: jax.Array) -> qwix.QArray:
    """The sum, each tile with the scale that it had or a new one, whichever comes closer."""
    wide = wide_dtype(before.dtype)
    total = before.astype(wide) + delta.astype(wide)
    tiles = tuple(n // m for n, m in zip(kernel.shape, kernel.scale.shape, strict=True))
    split = [size for n, tile in zip(total.shape, tiles, strict=True) for size in (n // tile, tile)]
    within = tuple(range(1, len(split), 2))

    def spread(per_tile):
        return jnp.broadcast_to(jnp.expand_dims(per_tile, within), split).reshape(total.shape)

    bound = BOUNDS[qtype_of(kernel)]

    def rounded(scale):
        levels = total / spread(scale).astype(wide)
        # Of a fixed range as large as the type's, the scale is 1.
        levels = qwix.quantize(levels, kernel.qtype, calibration_method=f"fixed,{-bound},{bound}")
        value = dataclasses.replace(kernel, qvalue=levels.qvalue, scale=scale)
        error = qwix.dequantize(value).astype(wide) - total
        return value.qvalue, jnp.square(error).reshape(split).sum(within)

    scale = quantize_kernel(total, kernel.qtype, tiles).scale.astype(kernel.dtype)
    (old, old_error), (new, new_error) = rounded(kernel.scale), rounded(scale)
    closer = new_error < old_error
    return dataclasses.replace(
        kernel,
        qvalue=jnp.where(spread(closer), new, old),
        scale=jnp.where(closer, scale, kernel.scale),
    )


@jax.jit
def _loss(before: jax.Array, delta: jax.Array, after: jax.Array) -> MergeLoss:
    wide = wide_dtype(before.dtype)
    return loss_of_sums(loss_sums(*(value.astype(wide) for value in (before, delta, after))))
