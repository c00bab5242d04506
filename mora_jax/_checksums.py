"""What is true of whole arrays, wherever they lie: checksums of their bits, and finiteness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mora_jax._rounding import as_bits


def checksums(values: Mapping[str, Any]) -> dict[str, int]:
    """Path -> a checksum, the same however the array lies on devices.

    >>> checksums({"a": jnp.ones(2), "b": jnp.array([1.0, 1.0000001])})
    {'a': 2650800128, 'b': 2024172819}
    """
    sums = {path: _checksum(value) for path, value in values.items()}
    return {path: int(number) for path, number in jax.device_get(sums).items()}


@jax.jit
def all_finite(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Path -> whether all numbers are finite."""
    return {path: jnp.isfinite(value).all() for path, value in values.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum of all numbers' bits, each times an odd number for its position, modulo 2**32."""
    x, size = jnp.atleast_1d(x), 1
    position = jnp.zeros(x.shape, np.uint32)
    for axis in reversed(range(x.ndim)):
        place = lax.broadcasted_iota(np.uint32, x.shape, axis)
        position, size = position + place * np.uint32(size % 2**32), size * x.shape[axis]
    bits = as_bits(x)
    if bits.dtype == np.uint64:
        bits = bits ^ (bits >> 32)
    # Odd, so that no bit is multiplied away; times a large number, so that positions look random.
    odd = (position * np.uint32(2) + np.uint32(1)) * np.uint32(2654435761)
    return jnp.sum(bits.astype(np.uint32) * odd, dtype=np.uint32)
