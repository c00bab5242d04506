"""The view that records: which axes of a parameter products contract, and what else it enters."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mora_jax._product.axes import KernelAxes
from mora_jax._tracing.reshaping import ReshapedView
from mora_jax._tracing.view import Pairs, dot_general, ragged_axes


class Factor(NamedTuple):
    """A part of one axis of a parameter: what a reshape makes of it, most often all of it.

    An axis of heads * head_dim has two: heads, of stride head_dim, and head_dim, of stride 1.

    Attributes:
      axis: of the parameter.
      stride: how far apart along that axis two neighbours of the part are.
      size: how many numbers it has.
    """

    axis: int
    stride: int
    size: int


Factors = tuple[Factor, ...]


@dataclasses.dataclass
class Record:
    """What was found of the parameters, by their paths.

    Attributes:
      axes: of those that products contract; the first product counts.
      uses: what else they enter: primitives, or why a product is no layer's.
    """

    axes: dict[str, KernelAxes] = dataclasses.field(default_factory=dict)
    uses: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def reason(self, path: str) -> str:
        """Why a parameter is not adapted that no product contracts."""
        uses = dict.fromkeys(self.uses.get(path, ()))
        if not uses:
            return "is not used"
        return f"enters no product that can be adapted, only {', '.join(uses)}"


@dataclasses.dataclass(frozen=True)
class RecordingView(ReshapedView):
    """Notes the axes of the products that a parameter enters.

    Attributes:
      path: the parameter's.
      record: where to note.
      parameter_shape: of the parameter.
      origin: axis i of `value` is made of the factors `origin[i]`; none where the model added it.
      stacks: factors of the parameter along which it was taken apart.
    """

    path: str
    record: Record
    parameter_shape: tuple[int, ...]
    origin: tuple[Factors, ...]
    stacks: Factors = ()

    @classmethod
    def of(cls, parameter: jax.Array, path: str, record: Record) -> RecordingView:
        """The view of a whole parameter."""
        shape = tuple(parameter.shape)
        origin = tuple((Factor(axis, 1, size),) for axis, size in enumerate(shape))
        return cls(
            parameter, tuple(range(len(shape))), parameter.dtype, path, record, shape, origin
        )

    def note(self, use: str) -> None:
        self.record.uses.setdefault(self.path, []).append(use)

    def cast(self, dtype: np.dtype) -> RecordingView:
        return dataclasses.replace(self, dtype=dtype)

    def scale(self, by: Callable[[jax.Array], jax.Array]) -> RecordingView:
        return dataclasses.replace(self, value=by(self.value.astype(self.dtype)))

    def open(self, axis: int | None = None) -> tuple[Any, Callable[[Any], Any]]:
        if axis is None:
            return self.value, lambda value: dataclasses.replace(self, value=value)
        stored = self.order[axis]

        def rebuild(value: Any) -> Any:
            return dataclasses.replace(
                self,
                value=value,
                order=tuple(a - (a > stored) for a in self.order if a != stored),
                origin=self.origin[:stored] + self.origin[stored + 1 :],
                stacks=self.stacks + self.origin[stored],
            )

        return jnp.moveaxis(self.value, stored, 0), rebuild

    # Reshapes, see `ReshapedView`.

    def settled(self) -> RecordingView:
        return dataclasses.replace(
            self,
            value=self.value.transpose(self.order),
            order=tuple(range(len(self.order))),
            origin=tuple(self.origin[axis] for axis in self.order),
        )

    def drop(self, axis: int) -> RecordingView:
        return self._with_origin(axis, 1)

    def insert(self, axis: int, size: int) -> RecordingView:
        del size
        return self._with_origin(axis, 0, ())

    def join(self, axis: int, count: int) -> RecordingView | None:
        parts = self.origin[axis : axis + count]
        if any(parts) and not all(parts):
            return None
        return self._with_origin(axis, count, sum(parts, ()))

    def split(self, axis: int, sizes: tuple[int, ...]) -> RecordingView | None:
        factors = self.origin[axis]
        parts = _distribute(factors, sizes) if factors else [()] * len(sizes)
        return None if parts is None else self._with_origin(axis, 1, *parts)

    def _with_origin(self, axis: int, count: int, *new: Factors) -> RecordingView:
        origin = (*self.origin[:axis], *new, *self.origin[axis + count :])
        return dataclasses.replace(self, origin=origin)

    # Products.

    def product(self, lhs: jax.Array, contracting: Pairs, batch: Pairs, **params: Any) -> jax.Array:
        self._note_product([axis for _, axis in contracting], [axis for _, axis in batch])
        return dot_general(lhs, self.array(), contracting, batch, **params)

    def ragged_product(self, lhs: jax.Array, group_sizes: jax.Array, **params: Any) -> jax.Array:
        if found := ragged_axes(params, lhs):
            group, inputs, _ = found
            self._note_product([inputs], [group])
        else:
            self.note("ragged_dot_general in another layout")
        return lax.ragged_dot_general(lhs, self.array(), group_sizes, **params)

    def _note_product(self, contracted: Sequence[int], batched: Sequence[int]) -> None:
        sides = ([], [], [])  # contracted, batched, free
        for axis, stored in enumerate(self.order):
            side = 0 if axis in contracted else 1 if axis in batched else 2
            if not self.origin[stored] and self.value.shape[stored] > 1 and side != 1:
                self.note("a product over an axis that it was repeated along")
                return
            sides[side].append(self.origin[stored])
        found = _kernel_axes(*sides, self.stacks, self.parameter_shape)
        if isinstance(found, str):
            self.note(found)
        else:
            self.record.axes.setdefault(self.path, found)


def _kernel_axes(
    inputs: list[Factors],
    batched: list[Factors],
    outputs: list[Factors],
    stacks: Factors,
    shape: tuple[int, ...],
) -> KernelAxes | str:
    """The axes of a kernel that a product contracts so, or why it is no layer's kernel."""
    if not any(inputs) or not any(outputs):
        return f"a product over {'all' if any(inputs) else 'none'} of its axes"
    runs = all(_are_runs(side) for side in (inputs, batched, outputs))
    ins, outs = sorted(_axes(inputs)), sorted(_axes(outputs))
    batch = list(dict.fromkeys([*_axes([stacks]), *sorted(_axes(batched))]))
    if not runs or len({*ins, *outs, *batch}) < len(ins + outs + batch):
        return "a product after a reshape that mixes its axes"
    # Those of size 1 that the model dropped make no difference to the order of features.
    dropped = [axis for axis in range(len(shape)) if axis not in ins + outs + batch]
    if math.prod(shape[axis] for axis in dropped) != 1:
        return "a product with a part of it"
    return KernelAxes(tuple(sorted([*ins, *dropped])), tuple(outs), tuple(batch))


def _axes(side: Iterable[Factors]) -> list[int]:
    """The parameter's axes that some factors come from, each once."""
    return list(dict.fromkeys(factor.axis for part in side for factor in part))


def _are_runs(side: list[Factors]) -> bool:
    """Whether what was joined stands together, in that order, among all of its side's features."""
    place = {factor: i for i, factor in enumerate(sorted(sum(side, ()), key=_place))}
    return all(place[b] == place[a] + 1 for part in side for a, b in itertools.pairwise(part))


def _place(factor: Factor) -> tuple[int, int]:
    return factor.axis, -factor.stride


def _distribute(factors: Factors, sizes: Sequence[int]) -> list[Factors] | None:
    """Factors of axes of these sizes, made of those of one axis; None where they cut across.

    >>> _distribute((Factor(axis=1, stride=1, size=6),), (2, 3))
    [(Factor(axis=1, stride=3, size=2),), (Factor(axis=1, stride=1, size=3),)]
    """
    waiting, parts = list(factors), []
    for size in sizes:
        part: list[Factor] = []
        while (missing := size // math.prod(factor.size for factor in part)) > 1:
            axis, stride, have = waiting.pop(0)
            if have > missing and have % missing == 0:
                rest = have // missing
                waiting.insert(0, Factor(axis, stride, rest))
                axis, stride, have = axis, stride * rest, missing
            if missing % have:
                return None
            part.append(Factor(axis, stride, have))
        parts.append(tuple(part))
    return parts
