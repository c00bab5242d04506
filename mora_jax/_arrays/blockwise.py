"""Moves along the feature axis: the pieces that compressions and decompressions are made of.

All are linear, and take any leading axes. Shape letters: I features, N blocks, R features a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mora_jax._arrays.dtypes import widen


def resize(x: jax.Array, width: int, *, circular: bool, axis: int = -1) -> jax.Array:
    """Cuts an axis to `width`, or extends it: by its own start if circular, else by zeros.

    >>> resize(jnp.arange(3), 5, circular=True)
    Array([0, 1, 2, 0, 1], dtype=int32)
    """
    length = x.shape[axis]
    if width <= length:
        return lax.slice_in_dim(x, 0, width, axis=axis)
    if circular:
        copies = jnp.concatenate([x] * -(-width // length), axis=axis)
        return lax.slice_in_dim(copies, 0, width, axis=axis)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, width - length)
    return jnp.pad(x, padding)


def split_blocks(x: jax.Array, size: int, count: int) -> jax.Array:
    """[..., I] -> [..., count, size], circularly extended or cut."""
    return resize(x, count * size, circular=True).reshape(*x.shape[:-1], count, size)


def merge_blocks(blocks: jax.Array, width: int) -> jax.Array:
    """[..., N, R] -> [..., width], cut or circularly extended."""
    *lead, count, size = blocks.shape
    return tile(blocks.reshape(*lead, count * size), width)


def fold_blocks(blocks: jax.Array, count: int) -> jax.Array:
    """[..., N, R] -> [..., count, R]: block i is added to block `i mod count`; N >= count.

    >>> fold_blocks(jnp.arange(5).reshape(5, 1), 2).ravel()
    Array([6, 4], dtype=int32)
    """
    *whole, last = (blocks[..., i : i + count, :] for i in range(0, blocks.shape[-2], count))
    if not whole:
        return last
    total, rest = sum(whole[1:], whole[0]), last.shape[-2]
    return jnp.concatenate([total[..., :rest, :] + last, total[..., rest:, :]], axis=-2)


def blocks_of(x: jax.Array, size: int, *, circular: bool = False) -> list[jax.Array]:
    """[..., F] -> blocks [..., size], the last one filled by zeros or by the first features.

    Blocks are slices and not the rows of a reshape: to add them up is then one read of `x`, where a
    reshape is copied (TPU) or summed by a slower kernel (GPU).
    """
    blocks = [x[..., start : start + size] for start in range(0, x.shape[-1], size)]
    if missing := size - blocks[-1].shape[-1]:
        fill = resize(x if circular else jnp.zeros_like(x), missing, circular=True)
        blocks[-1] = jnp.concatenate([blocks[-1], fill], axis=-1)
    return blocks


def add_blocks(x: jax.Array, size: int) -> jax.Array:
    """[..., F] -> [..., size]: the sum of its blocks, in float32 or better.

    >>> add_blocks(jnp.arange(5), 2)
    Array([6, 4], dtype=int32)
    """
    first, *others = (widen(block) for block in blocks_of(x, size))
    return sum(others, first).astype(x.dtype)


def tile(z: jax.Array, width: int) -> jax.Array:
    """[..., R] -> [..., width]: copies side by side, the transpose of `add_blocks`.

    >>> tile(jnp.arange(2), 5)
    Array([0, 1, 0, 1, 0], dtype=int32)
    """
    copies = -(-width // z.shape[-1])
    tiled = jnp.broadcast_to(z[..., None, :], (*z.shape[:-1], copies, z.shape[-1]))
    return tiled.reshape(*z.shape[:-1], copies * z.shape[-1])[..., :width]


def fold(x: jax.Array, width: int, *, axis: int = -1) -> jax.Array:
    """[..., W] -> [..., width], W >= width: what stands beyond the end is added to the start.

    The transpose of `resize(circular=True)`.

    >>> fold(jnp.arange(5), 3)
    Array([3, 5, 2], dtype=int32)
    """
    chunks = []
    for start in range(0, length := x.shape[axis], width):
        chunk = lax.slice_in_dim(x, start, min(start + width, length), axis=axis)
        chunks.append(resize(chunk, width, circular=False, axis=axis))
    return sum(chunks[1:], chunks[0])


def expand(table: np.ndarray, like: jax.Array) -> jax.Array:
    """A constant of the last axes, in the dtype and with the number of axes of `like`."""
    return jnp.asarray(table.reshape((1,) * (like.ndim - table.ndim) + table.shape), like.dtype)
