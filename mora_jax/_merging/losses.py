"""What a merge loses: how much of each update is in its kernel afterwards, and a warning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

#: A merge warns where less of an update is kept. For normal numbers it is the update whose numbers
#: are a thousandth of their bfloat16 weights; one of a hundredth is kept whole.
LEAST_KEPT = 0.5


class MergeWarning(UserWarning):
    """Much of an update was lost to rounding in a merge."""


class MergeLoss(NamedTuple):
    """What rounding did to one layer's merge.

    With W the kernel before, D the delta and W' the kernel after (all dequantised, where they are
    quantised), and norms over the whole kernel: W' - W = kept D + (what is orthogonal to D). So
    |W' - (W + D)| / |D| is the hypotenuse of 1 - kept and noise. Rounding to the nearest number
    loses D, and kept falls to 0; stochastic rounding keeps it, and pays in noise.

    Attributes:
      error: |W' - (W + D)| / |W + D|.
      kept: how much of the delta is in W'; 1 where all of it is, 0 where none.
      noise: the norm of the orthogonal part, as a multiple of |D|.
    """

    error: float
    kept: float
    noise: float


def loss_sums(before: jax.Array, delta: jax.Array, after: jax.Array) -> jax.Array:
    """The four sums that a loss is made of; a stack's are the sums of its layers'."""
    residue = (after - before) - delta
    total = before + delta
    pairs = ((residue, delta), (residue, residue), (delta, delta), (total, total))
    return jnp.stack([jnp.sum(a * b) for a, b in pairs])


def loss_of_sums(sums: jax.Array) -> MergeLoss:
    """The loss, of scalars; a delta of zero is kept."""
    along, residue, delta, total = sums
    some = jnp.where(delta > 0, delta, 1)
    across = jnp.maximum(residue - along**2 / some, 0)
    error = jnp.sqrt(residue / jnp.maximum(total, jnp.finfo(sums.dtype).tiny))
    return MergeLoss(error, 1 + along / some, jnp.sqrt(across / some))  # pyright: ignore


def as_numbers(tree: Any) -> Any:
    """Scalars as Python's numbers, where their values are known."""
    known = not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
    return jax.tree.map(lambda leaf: leaf.item(), jax.device_get(tree)) if known else tree


def warn_of_losses(losses: Mapping[str, MergeLoss], *, stacklevel: int) -> None:
    """Warns of layers whose merge, rounded to the nearest number, lost most of the update."""
    if any(isinstance(loss.kept, Tracer) for loss in losses.values()):
        return
    lost = {path: loss.kept for path, loss in losses.items() if loss.kept < LEAST_KEPT}
    if not lost:
        return
    worst = sorted(lost.items(), key=lambda item: item[1])[:3]
    numbers = ", ".join(f"{path or '(root)'!r} {kept:.1%}" for path, kept in worst)
    warnings.warn(
        f"rounding to nearest loses most of the update in {len(lost)} of {len(losses)} layers with "
        f"kernels narrower than float32; what is kept in the worst: {numbers}. Merge with "
        'rounding="stochastic" and a key, which keeps updates in the mean, or into a float32 base.',
        MergeWarning,
        stacklevel=stacklevel + 1,
    )
