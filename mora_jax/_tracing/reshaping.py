"""Kernels that a model reshapes before their product: views whose axes are split and joined.

T5X keeps a kernel as [features, heads * head_dim] and multiplies with [features, heads, head_dim].
As a reshape keeps the order of all numbers, it is a few steps along the axes as they are seen: axes
of size 1 are dropped, neighbours are joined, an axis is split, axes of size 1 are inserted. What a
step means for a view is the view's; one that cannot follow a step becomes an array.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
from jax import lax

from mora_jax._tracing.view import View


@dataclasses.dataclass(frozen=True)
class ReshapedView(View, abc.ABC):
    """A view of one array, which stays a view when a model reshapes it.

    Steps change all but `value` and `order`, which are set once, after the last one. They are asked
    of views whose axes are seen in the order in which they are stored.
    """

    value: jax.Array

    @abc.abstractmethod
    def settled(self) -> Self:
        """The view with `value` stored as it is seen."""

    @abc.abstractmethod
    def drop(self, axis: int) -> Self:
        """A step: an axis of size 1 goes."""

    @abc.abstractmethod
    def join(self, axis: int, count: int) -> Self | None:
        """A step: `count` axes from `axis` on become one; None where the view cannot follow."""

    @abc.abstractmethod
    def split(self, axis: int, sizes: tuple[int, ...]) -> Self | None:
        """A step: one axis becomes several; None where the view cannot follow."""

    @abc.abstractmethod
    def insert(self, axis: int, size: int) -> Self:
        """A step: a new axis, along which the numbers are repeated."""

    def reshape(self, shape: Sequence[int], out_sharding: Any = None) -> Self | None:
        if 0 in shape:
            return None
        start = self.settled()
        view = start._without_ones()
        sizes = [size for size in self.shape if size > 1]
        axis = 0
        for count, parts in _groups(sizes, [size for size in shape if size > 1]):
            view = view.join(axis, count) if view is not None and count > 1 else view
            view = view.split(axis, parts) if view is not None and len(parts) > 1 else view
            axis += len(parts)
        if view is None:
            return None
        for axis, size in enumerate(shape):
            view = view.insert(axis, 1) if size == 1 else view
        return view._stored(lax.reshape(start.value, shape, out_sharding=out_sharding))

    def squeeze(self, axes: Sequence[int]) -> Self:
        start = self.settled()
        view = start
        for axis in sorted(axes, reverse=True):
            view = view.drop(axis)
        return view._stored(lax.squeeze(start.value, axes))

    def broadcast(
        self, shape: Sequence[int], axes: Sequence[int], out_sharding: Any = None
    ) -> Self | None:
        if tuple(shape[axis] for axis in axes) != self.shape:
            return None  # an axis of size 1 that is repeated
        start = self.settled()
        view = start
        for axis, size in enumerate(shape):
            view = view if axis in axes else view.insert(axis, size)
        value = lax.broadcast_in_dim(start.value, shape, axes, out_sharding=out_sharding)
        return view._stored(value)

    def _without_ones(self) -> Self:
        view = self
        for axis in reversed(range(len(self.shape))):
            view = view.drop(axis) if self.shape[axis] == 1 else view
        return view

    def _stored(self, value: jax.Array) -> Self:
        return dataclasses.replace(self, value=value, order=tuple(range(value.ndim)))


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The least groups of axes that a reshape treats apart; all sizes are above 1.

    Returns:
      For each group how many old axes it joins, and the sizes of its new axes.

    >>> list(_groups([6, 4, 10], [6, 40])), list(_groups([6, 8], [2, 3, 8]))
    ([(1, (6,)), (2, (40,))], [(1, (2, 3)), (1, (8,))])
    """
    before, after = iter(old), iter(new)
    for size in before:
        joined, parts = [size], [next(after)]
        while (have := math.prod(joined)) != (want := math.prod(parts)):
            rest, missing = (before, joined) if have < want else (after, parts)
            missing.append(next(rest))
        yield len(joined), tuple(parts)
