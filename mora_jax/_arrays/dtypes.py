"""Dtypes to sum in: what is narrower than float32 is added up in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def wide_dtype(dtype) -> np.dtype:
    """The dtype to sum in: float32, or float64 for float64."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def summable(x: jax.Array) -> jax.Array:
    """`x`, in float32 if it is float16, whose range a group's sum can leave."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def widen(x: jax.Array) -> jax.Array:
    """`x` in the dtype to sum in; integers stay as they are."""
    return x.astype(wide_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def add_delta(kernel: jax.Array, value: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """`kernel + value`, times a scale if any, in at least float32, then in the kernel's dtype."""
    wide = wide_dtype(kernel.dtype)
    total = kernel.astype(wide) + value.astype(wide)
    return (total if scale is None else total * scale.astype(wide)).astype(kernel.dtype)


def holds_all(dtype, narrow) -> bool:
    """Whether every number of the floating dtype `narrow` is one of `dtype` too.

    >>> holds_all(np.float32, jnp.bfloat16), holds_all(jnp.bfloat16, np.float16)
    (True, False)
    """
    if dtype == narrow:
        return True
    own, other = jnp.finfo(dtype), jnp.finfo(narrow)
    # Of 8 bits some have no infinities, so that equal bits say nothing.
    wider = own.bits > other.bits and own.maxexp >= other.maxexp and own.minexp <= other.minexp
    return wider and own.nmant >= other.nmant
