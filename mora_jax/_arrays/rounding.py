"""Rounding to a narrower dtype: to the nearest number, or at random so that the mean is right.

A bfloat16 number has 8 bits. Added to it, an update smaller than half a step between two of them is
lost by rounding to the nearest, however often it is added. Rounded at random it is lost most of
the time, and now and then counts as a whole step: up with a probability that is the distance from
the lower neighbour, in steps, so that the mean over the random bits is the exact number.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mora_jax._arrays.dtypes import wide_dtype

Rounding = Literal["nearest", "stochastic"]


def is_narrow(dtype: Any) -> bool:
    """Whether numbers of this dtype are summed in a wider one, and so rounded.

    >>> is_narrow(jnp.bfloat16), is_narrow(jnp.float32)
    (True, False)
    """
    return wide_dtype(dtype) != np.dtype(dtype)


def check_rounding(rounding: str, key: jax.Array | None) -> None:
    """Raises ValueError for another name, and where random bits have no key to come from."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding={rounding!r}; there are 'nearest' and 'stochastic'.")
    if rounding == "stochastic" and key is None:
        raise ValueError(
            'key is missing: rounding="stochastic" draws random bits. Pass '
            "key=jax.random.key(...), another one at every merge."
        )


def random_bits(key: jax.Array, shape: tuple[int, ...], axis: int | None = None) -> jax.Array:
    """Random uint32; along a stack's axis, each layer's are those of its own key.

    Bits are a function of key and position alone, so every device makes those of its part.
    """
    if axis is None:
        return jax.random.bits(key, shape)
    rest = shape[:axis] + shape[axis + 1 :]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[axis]))
    return jax.vmap(lambda key: jax.random.bits(key, rest), out_axes=axis)(keys)


def rounded(x: jax.Array, dtype: Any, bits: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """`x` in a narrower dtype: to nearest, or with random bits stochastically.

    A number that the dtype has is itself. Where the neighbour would be infinite, and for what is
    not finite, both roundings are the same; so they are where hardware flushes what is smaller
    than float32's smallest normal number.

    Args:
      x: float32 or float64.
      dtype: a floating dtype, narrower than that of `x` or the same.
      bits: random uint32 of the shape of `x`, or None.

    Returns:
      (narrow, value): the rounded numbers in `dtype`, and the same numbers in the dtype of `x`.
    """
    if x.dtype == dtype:
        return x, x
    near, value = _nearest(x, dtype)
    if bits is None:
        return near, value
    other = neighbour(near, jnp.where(abs(x) > abs(value), 1, -1))
    there = other.astype(x.dtype)
    # A quotient by a power of two, below one half, of at most 24 bits: exact. Not a number where
    # the neighbour is none, and then no bits are smaller.
    chance = (x - value) / (there - value)
    move = (bits >> 8).astype(np.float32) * np.float32(2**-24) < chance.astype(np.float32)
    return jnp.where(move, other, near), jnp.where(move, there, value)


def neighbour(x: jax.Array, steps: Any) -> jax.Array:
    """The number so many steps further from zero in the order of its dtype; negative: nearer.

    What is no number beyond the largest, and NaN nearer to zero than zero.

    >>> neighbour(jnp.ones(2, jnp.bfloat16), jnp.array([1, -1]))
    Array([1.00781, 0.996094], dtype=bfloat16)
    """
    # Floating numbers of one sign are ordered as the integers of the same bits.
    bits = as_bits(x)
    return lax.bitcast_convert_type(bits + jnp.asarray(steps).astype(bits.dtype), x.dtype)


def as_bits(x: jax.Array) -> jax.Array:
    """The same bits as unsigned integers."""
    return lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}"))


def _nearest(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    # Not two casts, there and back: XLA takes such a pair out, as it may keep excess precision.
    if dtype == jnp.bfloat16:
        value = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return value.astype(dtype), value
    # Of float16 and float8 it would flush the subnormal numbers.
    near = lax.optimization_barrier(x.astype(dtype))
    return near, near.astype(x.dtype)
