"""What is true of whole arrays, wherever they lie: checksums of their bits, and finiteness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mora_jax._arrays.rounding import as_bits


def checksums(values: Mapping[str, Any]) -> dict[str, int]:
    """Path -> a checksum, the same however the array lies on devices.

    >>> checksums({"a": jnp.ones(2), "b": jnp.array([1.0, 1.0000001])})
    {'a': 3650401655, 'b': 2744832581}
    """
    sums = {path: _checksum(value) for path, value in values.items()}
    return {path: int(number) for path, number in jax.device_get(sums).items()}


@jax.jit
def all_finite(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Path -> whether all numbers are finite."""
    return {path: jnp.isfinite(value).all() for path, value in values.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """The sum of a hash of every number's bits and its position, modulo 2**32.

    Bits times a number for the position would not do: where the first bit, the sign, differs, that
    product changes by one and the same 2**31, and an even number of signs would cancel out.
    """
    x, size = jnp.atleast_1d(x), 1
    position = jnp.zeros(x.shape, np.uint32)
    for axis in reversed(range(x.ndim)):
        place = lax.broadcasted_iota(np.uint32, x.shape, axis)
        position, size = position + place * np.uint32(size % 2**32), size * x.shape[axis]
    bits = as_bits(x)
    hashed = _mix(position)
    for half in (bits, bits >> 32) if bits.dtype == np.uint64 else (bits,):
        hashed = _mix(hashed + half.astype(np.uint32))
    return jnp.sum(hashed, dtype=np.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit depends on all: the last step of MurmurHash3."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
