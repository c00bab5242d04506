"""Truncation: the first features in, the first features out."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from mora_jax._arrays.blockwise import resize
from mora_jax._schemes.base import Scheme


@dataclasses.dataclass(frozen=True, repr=False)
class Truncation(Scheme):
    """The first R features in, the first R features out: equations (4) and (5)."""

    kind: ClassVar[str] = "truncation"

    def compress(self, x: jax.Array, size: int, *, out_features: int | None = None) -> jax.Array:
        del out_features
        return resize(x, size, circular=False)

    def decompress(self, z: jax.Array, out_features: int) -> jax.Array:
        return resize(z, out_features, circular=False)

    # Derived, these would be the same numbers, by longer programs.

    def blocks(self, in_features: int, out_features: int, size: int) -> tuple[int, ...]:
        del in_features, out_features, size
        return ()

    def compress_transpose(self, z: jax.Array, in_features: int, out_features: int) -> jax.Array:
        del out_features
        return resize(z, in_features, circular=False)

    def decompress_transpose(self, dy: jax.Array, size: int, in_features: int) -> jax.Array:
        del in_features
        return resize(dy, size, circular=False)
