"""DoRA: a magnitude for each output feature, beside a direction that the adapter turns.

    W' = m (W + delta) / ||W + delta||        equation (5) of arXiv 2402.09353

with a norm over the inputs for each column, so m and the norms have one number for each output. As
in section 4.3 there, the norm is a constant for the gradient, which then takes no more memory than
the adapter's own. Equivalent to PEFT's `use_dora`, for every scheme. One departure:

1. What is trained is `g = m / ||W||`, the magnitude relative to the base's, and it starts at one.
   The function is the same; but a new adapter changes no bit, is made without the base, and starts
   anew after a merge, by ones alone. By Adam a step changes each magnitude by the same share, not
   by the same amount; a gradient of g is `||W||` times that of m. A column of zeros stays zero.

In the model the magnitude goes into the sum of kernel and delta where there is one (`call.py`)
and is rounded with it, as by a merge: a bfloat16 kernel feels no change below half a step between
its numbers. Elsewhere it multiplies the product's outputs. A norm is one more pass over W, and the
gradient of g one over the outputs, which are kept for it. Under remat they are made again, also
those of a block's last product, which nothing else would need.

Shape letters: I input features, O output features, B batch axes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax._arrays.dtypes import wide_dtype
from mora_jax._arrays.mesh import may_be_sharded
from mora_jax._product.axes import KernelAxes
from mora_jax._schemes.base import Adapter, Leaf, Scheme, ones

T = TypeVar("T")

#: The leaf of DoRA among an adapter's leaves.
MAGNITUDE = "magnitude"


def split_magnitude(adapter: Mapping[str, T]) -> tuple[dict[str, T], T | None]:
    """The leaves that make the delta, and the magnitude g, None where there is no DoRA."""
    direction = dict(adapter)
    return direction, direction.pop(MAGNITUDE, None)


def magnitude_leaf(out_features: int) -> Leaf:
    """A new magnitude: ones, for it is relative to that of the base."""
    return Leaf((1, out_features), ones)


def column_scale(
    kernel: jax.Array, adapter: Adapter, axes: KernelAxes, scheme: Scheme, after: Any = None
) -> jax.Array:
    """`m / ||W + delta|| = g ||W|| / ||W + delta||`, what each column is multiplied by.

    Args:
      kernel: the base's, W.
      adapter: leaves [B..., rows, columns], the magnitude among them.
      axes: of the kernel.
      scheme: the scheme.
      after: what the norms are to wait for, where compilers can hold them back.

    Returns:
      Laid out like the kernel, its axes of inputs of size 1; float32 or better. Differentiable by
      the magnitude alone.
    """
    direction, magnitude = split_magnitude(adapter)
    assert magnitude is not None
    held, wide = lax.stop_gradient((direction, after)), wide_dtype(kernel.dtype)
    if after is not None and not may_be_sharded():
        # Norms need the weights alone, and a scheduler would begin with those of all layers, whose
        # deltas some schemes make of a matrix for each block.
        held = lax.optimization_barrier(held)
    value = axes.delta(held[0], kernel.shape, scheme, kernel.dtype).astype(wide)
    base = lax.stop_gradient(kernel).astype(wide)
    sums = functools.partial(jnp.sum, axis=axes.inputs, keepdims=True)
    # ||W + D||^2 = ||W||^2 + <2 W + D, D>: of a delta of zero exactly ||W||^2, in whatever order
    # sums are made, and exact to the last digits of a small one.
    size, change = sums(base * base), sums((2 * base + value) * value)
    ratio = 1 + change / jnp.where(size > 0, size, 1)
    # What is left of a column that is all but gone is rounding, which may be negative.
    ratio = jnp.maximum(ratio, jnp.finfo(wide).eps)
    # A result that is exactly zero would not tell the gradient of what it was scaled by.
    magnitude = magnitude.astype(wide) + jnp.where(magnitude == 0, 1e-30, 0)
    scale = axes.columns(magnitude, kernel.shape) / jnp.sqrt(ratio)
    return jnp.where(size > 0, scale, 0)


def kernel_delta(
    kernel: jax.Array, adapter: Adapter, axes: KernelAxes, scheme: Scheme
) -> jax.Array:
    """What an adapter adds to its kernel, laid out like it; with DoRA `W' - W`.

    Args:
      kernel: the base's, W.
      adapter: leaves [B..., rows, columns].
      axes: of the kernel.
      scheme: the scheme.
    """
    direction, magnitude = split_magnitude(adapter)
    value = axes.delta(direction, kernel.shape, scheme, kernel.dtype)
    if magnitude is None:
        return value
    scale, wide = column_scale(kernel, adapter, axes, scheme), wide_dtype(kernel.dtype)
    return (scale - 1) * kernel.astype(wide) + scale * value.astype(wide)


@functools.partial(jax.checkpoint, prevent_cse=False)  # or the gradient keeps wide outputs
def scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    """`y * scale`, in float32 or better and rounded to the dtype of `y`."""
    if jnp.issubdtype(y.dtype, jnp.complexfloating):
        return lax.complex(scaled(y.real, scale), scaled(y.imag, scale))
    wide = wide_dtype(y.dtype)
    return (y.astype(wide) * scale.astype(wide)).astype(y.dtype)
