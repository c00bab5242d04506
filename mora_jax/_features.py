"""Moves along the feature axis: the pieces that compressions and decompressions are made of.

All are linear, and take any leading axes. Shape letters: I features, N blocks, R features a block.
"""

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


def resize(x: jax.Array, width: int, *, circular: bool) -> jax.Array:
    """Cuts the last axis to `width`, or extends it: by its own start if circular, else by zeros.

    >>> resize(jnp.arange(3), 5, circular=True)
    Array([0, 1, 2, 0, 1], dtype=int32)
    """
    missing = width - x.shape[-1]
    if missing <= 0:
        return x[..., :width]
    if circular:
        return jnp.concatenate([x] * -(-width // x.shape[-1]), axis=-1)[..., :width]
    return jnp.concatenate([x, jnp.zeros((*x.shape[:-1], missing), x.dtype)], axis=-1)


def split_blocks(x: jax.Array, size: int, count: int) -> jax.Array:
    """[..., I] -> [..., count, size], circularly extended or cut."""
    return resize(x, count * size, circular=True).reshape(*x.shape[:-1], count, size)


def merge_blocks(blocks: jax.Array, width: int) -> jax.Array:
    """[..., N, R] -> [..., width], cut or circularly extended."""
    return resize(blocks.reshape(*blocks.shape[:-2], -1), width, circular=True)


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


def regroup(blocks: jax.Array, signs: int, shift: int) -> jax.Array:
    """Multiplies block b of [..., N, R] by its Walsh sign and rolls it by `shift * b`."""
    count, size = blocks.shape[-2:]
    if signs:
        walsh = [(-1) ** (signs & block).bit_count() for block in range(count)]
        blocks = blocks * _expand(np.asarray(walsh)[:, None], blocks)
    if shift:
        rolled = [jnp.roll(blocks[..., b, :], shift * b % size, axis=-1) for b in range(count)]
        blocks = jnp.stack(rolled, axis=-2)
    return blocks


def sum_runs(x: jax.Array, size: int) -> jax.Array:
    """[..., I] -> [..., size]: sums of neighbours. The first `I mod size` runs are longer by one.

    >>> sum_runs(jnp.arange(5), 2)
    Array([3, 7], dtype=int32)
    """
    length, longer = divmod(x.shape[-1], size)
    cut, lead = longer * (length + 1), x.shape[:-1]
    long_runs = x[..., :cut].reshape(*lead, longer, length + 1).sum(-1)
    short_runs = x[..., cut:].reshape(*lead, size - longer, length).sum(-1)
    return jnp.concatenate([long_runs, short_runs], axis=-1)


def repeat_runs(z: jax.Array, width: int) -> jax.Array:
    """[..., R] -> [..., width]: the transpose of `sum_runs`.

    >>> repeat_runs(jnp.array([3, 7]), 5)
    Array([3, 3, 3, 7, 7], dtype=int32)
    """
    length, longer = divmod(width, z.shape[-1])
    long_runs = jnp.repeat(z[..., :longer], length + 1, axis=-1)
    short_runs = jnp.repeat(z[..., longer:], length, axis=-1)
    return jnp.concatenate([long_runs, short_runs], axis=-1)


def rotate(blocks: jax.Array) -> jax.Array:
    """Rotates block i of [..., N, R] by the angles `i theta_j`, equations (9) to (11).

    Feature j is paired with j + R/2 (the paper pairs neighbours), `theta_j = 10000^(-2 j / R)`,
    and block 0 stays as it is. Angles are computed in float64 and applied in at least float32.
    """
    count, size = blocks.shape[-2:]
    if size % 2:
        raise ValueError(f"a rotation pairs features, so its size must be even, got {size}.")
    theta = 10000.0 ** (-2.0 * np.arange(size // 2) / size)
    angles = np.arange(count)[:, None] * theta
    first, second = jnp.split(blocks.astype(wide_dtype(blocks.dtype)), 2, axis=-1)
    cos, sin = _expand(np.cos(angles), first), _expand(np.sin(angles), first)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(blocks.dtype)


def _expand(table: np.ndarray, like: jax.Array) -> jax.Array:
    """A constant of the last axes, in the dtype and with the number of axes of `like`."""
    return jnp.asarray(table.reshape((1,) * (like.ndim - table.ndim) + table.shape), like.dtype)
