"""Pruned moments: what a restart may keep of an optimizer's memory, as ReLoRA does.

Section 3 of arXiv 2307.05695; `optimizer_magnitude_pruning` and `optimizer_random_pruning` of its
code. Nothing is sorted or reshaped here, so that arrays stay split over devices as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax._arrays.mesh import explicit_mesh
from mora_jax._arrays.paths import path_seed
from mora_jax._arrays.rounding import as_bits

By = Literal["magnitude", "random"]


@dataclasses.dataclass(frozen=True)
class Prune:
    """A restart that sets only a share of the adapters' moments to zero, for `merge_and_reset`.

    By magnitude, the largest numbers of every moment stay, of each matrix of a stack by itself. At
    random, each number stays with the same probability, and the moments of one adapter stay at the
    same places: a first moment without its second would make a step many times too long.

    Args:
      share: of the numbers, set to zero: ReLoRA's code has ratios of 0.8 to 0.999.
      by: "magnitude" or "random", which needs a key.

    Raises:
      ValueError: for a share outside of [0, 1], and for another name.
    """

    share: float
    by: By = "magnitude"

    def __post_init__(self):
        number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not number or not 0 <= self.share <= 1:
            raise ValueError(f"Prune: share must lie in [0, 1], got {self.share!r}.")
        if self.by not in get_args(By):
            raise ValueError(f"Prune: by must be one of {get_args(By)}, got {self.by!r}.")


Reset = Literal["zero"] | Prune


def check_reset(reset: Reset, key: jax.Array | None) -> None:
    """Raises ValueError for what is no reset, and where a random one has no key."""
    if isinstance(reset, Prune):
        if reset.by == "random" and key is None:
            raise ValueError(f"key is missing: {reset} draws. Pass key=jax.random.key(...).")
    elif reset != "zero":
        raise ValueError(f"reset={reset!r}; there are 'zero' and Prune(share, by).")


def pruned(
    moment: jax.Array,
    prune: Prune,
    path: str,
    stacks: tuple[int, ...],
    key: jax.Array | None,
    start: jax.Array | None = None,
) -> jax.Array:
    """The moment with a share of its numbers set to zero, or to where they start.

    Args:
      moment: in the shape of an adapter's leaf, or in another (Adafactor's), and then without
        stacks.
      prune: which share.
      path: of the adapter's leaf, which all its moments draw by.
      stacks: the leaf's axes of stacked layers; each of their elements is pruned by itself.
      key: for a random share.
      start: what the moment starts with; None: zeros.
    """
    axes = tuple(axis for axis in range(moment.ndim) if axis not in stacks)
    if prune.by == "magnitude":
        count = 1
        for axis in axes:
            count *= moment.shape[axis]
        keep = _largest(moment, count - round(prune.share * count), axes)
    else:
        assert key is not None
        # A key of its own: adapters are drawn by the path, and so are the bits of rounding.
        own = jax.random.fold_in(jax.random.fold_in(key, path_seed("moments")), path_seed(path))
        keep = jax.random.uniform(own, moment.shape) >= prune.share
        if explicit_mesh(moment) is not None:
            keep = jax.sharding.reshard(keep, jax.typeof(moment).sharding)
    return jnp.where(keep, moment, jnp.zeros_like(moment) if start is None else start)


def _largest(x: jax.Array, count: int, axes: tuple[int, ...]) -> jax.Array:
    """Which numbers are the `count` largest in magnitude along some axes; equal ones together.

    The smallest of them is found bit by bit, for positive numbers are in the order of their bits.
    """
    if count == 0:
        return jnp.zeros_like(x, bool)
    bits = as_bits(abs(x))
    width = 8 * x.dtype.itemsize

    def next_bit(index, least):
        # A number of Python's where jit is disabled.
        place = jnp.asarray(width - 1 - index).astype(least.dtype)
        tried = least | (jnp.ones_like(least) << place)
        enough = (bits >= tried).sum(axes, keepdims=True, dtype=jnp.int32) >= count
        return jnp.where(enough, tried, least)

    return bits >= lax.fori_loop(0, width, next_bit, jnp.zeros_like(bits.min(axes, keepdims=True)))
