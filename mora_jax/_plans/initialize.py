"""How an adapter starts: with a delta of exactly zero."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mora_jax._schemes.base import MAGNITUDE, LowRank, Scheme


def initialize(key, shape, dtype, *, name: str, fan_in: int) -> jax.Array:
    """A new leaf of an adapter: zeros, but for LoRA's `a`, which is drawn from `key`.

    DoRA's magnitude is one: it is that of the base.

    LoRA's `a` is uniform in +-1/sqrt(I), as in the LoRA authors' code and in PEFT.

    Args:
      key: a PRNG key; may be None where nothing is drawn.
      shape: shape of the leaf.
      dtype: dtype of the leaf.
      name: "matrix", "a", "b" or "magnitude".
      fan_in: I, the input features of the layer.

    >>> initialize(None, (1, 2), "float32", name="matrix", fan_in=8)
    Array([[0., 0.]], dtype=float32)
    """
    if name == MAGNITUDE:
        return jnp.ones(shape, dtype)
    if name != "a":
        return jnp.zeros(shape, dtype)
    limit = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, minval=-limit, maxval=limit)


def draws_numbers(scheme: Scheme) -> bool:
    """Whether new adapters of this scheme need a PRNG key."""
    return isinstance(scheme, LowRank)
