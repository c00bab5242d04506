"""A parameter on its way through a traced function: what a view of one must be able to do."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class View(abc.ABC):
    """A parameter as an array that has been cast, transposed or taken out of a stack.

    Subclasses say what a product with it is.

    Attributes:
      value: the array as it is stored.
      order: axis i of the view is axis `order[i]` of `value`.
      dtype: the view's.
    """

    value: jax.Array
    order: tuple[int, ...]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The view's shape."""
        return tuple(self.value.shape[axis] for axis in self.order)

    def array(self) -> jax.Array:
        """The array itself, for whatever is no product."""
        return self.value.astype(self.dtype).transpose(self.order)

    def transpose(self, permutation: Sequence[int]) -> View:
        """The view with its axes permuted."""
        return dataclasses.replace(self, order=tuple(self.order[axis] for axis in permutation))

    def map(self, function: Callable[[jax.Array], jax.Array]) -> View:
        """The view with a function applied to its arrays."""
        leaves, rebuild = self.open()
        return rebuild(jax.tree.map(function, leaves))

    @abc.abstractmethod
    def open(self, axis: int | None = None) -> tuple[Any, Callable[[Any], Any]]:
        """(leaves, rebuild): its arrays, for the inside of a transformation.

        With an axis, every leaf leads with it, and `rebuild` takes leaves without it: one element
        of a stack. It gives an array where the axis is no stack's.
        """

    @abc.abstractmethod
    def product(self, lhs: jax.Array, contracting: Pairs, batch: Pairs, **params: Any) -> jax.Array:
        """`lax.dot_general(lhs, view)`; pairs are of an axis of `lhs` and one of the view."""

    @abc.abstractmethod
    def ragged_product(self, lhs: jax.Array, group_sizes: jax.Array, **params: Any) -> jax.Array:
        """`lax.ragged_dot_general(lhs, view, group_sizes)`."""


def as_array(value: Any) -> Any:
    """The array of a view; anything else as it is."""
    return value.array() if isinstance(value, View | Taken) else value


@dataclasses.dataclass(frozen=True)
class Taken:
    """An element of a stack of which the axis, of size 1, is still there."""

    view: View
    axis: int

    def array(self) -> jax.Array:
        """The element as an array, the axis of size 1 in its place."""
        return lax.expand_dims(self.view.array(), (self.axis,))
