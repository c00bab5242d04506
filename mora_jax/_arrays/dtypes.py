"""Dtypes to sum in: what is narrower than float32 is added up in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._arrays.mesh import vary_alike


def wide_dtype(dtype) -> np.dtype:
    """The dtype to sum in: float32, or float64 for float64."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def summable(x: jax.Array) -> jax.Array:
    """`x`, in float32 if it is float16, whose range a group's sum can leave."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def widen(x: jax.Array) -> jax.Array:
    """`x` in the dtype to sum in; integers stay as they are."""
    return x.astype(wide_dtype(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def widen_for(kernel_dtype: Any, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """An adapter's leaves in the dtype that its delta is formed in.

    At least float32, and at least as wide as the kernel: a product of two bfloat16 matrices that
    was rounded before it is added to a float32 kernel would be off by a hundredth of itself.
    """
    kernel = wide_dtype(kernel_dtype)
    return {
        name: leaf.astype(np.promote_types(kernel, wide_dtype(leaf.dtype)))
        for name, leaf in leaves.items()
    }


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


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in a's dtype, accumulated and returned in at least float32."""
    wide = wide_dtype(a.dtype)
    return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=wide)


def linear_transpose(
    function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], y: jax.Array
) -> jax.Array:
    """The transpose of a linear function of arrays of this shape, summed in float32 or better."""
    wide = wide_dtype(y.dtype)
    # Inside `shard_map` what is differentiated must vary over devices as the gradient does.
    zeros, wide_y = vary_alike((jnp.zeros(shape, wide), y.astype(wide)))
    _, transpose = jax.vjp(lambda x: function(x).astype(wide), zeros)
    return transpose(wide_y)[0].astype(y.dtype)
