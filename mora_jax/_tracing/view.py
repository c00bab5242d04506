"""A parameter on its way through a traced function: what a view of one must be able to do."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from mora_jax._arrays.dtypes import holds_all

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class View(abc.ABC):
    """A parameter as an array that has been cast, moved or taken out of a stack.

    Subclasses say what a product with it is. Where a method gives None, the view cannot follow the
    model and becomes an array.

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

    def note(self, use: str) -> None:
        """Takes note of what the view becomes an array for: a primitive, by its name."""
        del use

    def transpose(self, permutation: Sequence[int]) -> View:
        """The view with its axes permuted."""
        return dataclasses.replace(self, order=tuple(self.order[axis] for axis in permutation))

    def cast(self, dtype: np.dtype) -> View | None:
        """The view in another floating dtype.

        None where it was rounded before: a view rounds once, from its value's dtype to its own.
        """
        if dtype != self.dtype and self.is_rounded:
            return None
        return dataclasses.replace(self, dtype=dtype)

    @property
    def is_rounded(self) -> bool:
        """Whether the view's dtype lacks numbers that the value's has."""
        return not holds_all(self.dtype, self.value.dtype)

    def reshape(self, shape: Sequence[int], out_sharding: Any = None) -> View | None:
        """`lax.reshape` of the view."""
        del shape, out_sharding
        return None

    def squeeze(self, axes: Sequence[int]) -> View | None:
        """`lax.squeeze` of the view."""
        del axes
        return None

    def broadcast(
        self, shape: Sequence[int], axes: Sequence[int], out_sharding: Any = None
    ) -> View | None:
        """`lax.broadcast_in_dim` of the view."""
        del shape, axes, out_sharding
        return None

    def scale(self, by: Callable[[jax.Array], jax.Array]) -> View | None:
        """The view times a constant, which `by` multiplies an array with."""
        del by
        return None

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


def note_all(values: Iterable[Any], use: str) -> None:
    """Lets views among the values take note of what they become arrays for."""
    for value in values:
        if isinstance(value, View | Taken):
            value.note(use)


@dataclasses.dataclass(frozen=True)
class Taken:
    """An element of a stack of which the axis, of size 1, is still there."""

    view: View
    axis: int

    def array(self) -> jax.Array:
        """The element as an array, the axis of size 1 in its place."""
        return lax.expand_dims(self.view.array(), (self.axis,))

    def note(self, use: str) -> None:
        """As for the view."""
        self.view.note(use)


def dot_general(
    lhs: jax.Array, rhs: jax.Array, contracting: Pairs, batch: Pairs, **params: Any
) -> jax.Array:
    """`lax.dot_general` by pairs of axes."""

    def axes(side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(pair[side] for pair in contracting), tuple(pair[side] for pair in batch)

    (contract_l, batch_l), (contract_r, batch_r) = axes(0), axes(1)
    numbers = ((contract_l, contract_r), (batch_l, batch_r))
    return lax.dot_general(lhs, rhs, numbers, **params)


def ragged_axes(params: Any, lhs: jax.Array) -> tuple[int, ...]:
    """Axes (group, inputs, outputs) of experts whose rows are one after the other; else none."""
    numbers = params["ragged_dot_dimension_numbers"]
    contracting, batch = numbers.dot_dimension_numbers
    (left, (inputs, *_)), groups = contracting, tuple(numbers.rhs_group_dimensions)
    rows = tuple(numbers.lhs_ragged_dimensions)
    if lhs.ndim != 2 or len(left) != 1 or any(batch) or rows != (1 - left[0],) or len(groups) != 1:
        return ()
    (group,) = groups
    return (group, inputs, 3 - group - inputs) if left == (1,) else ()
