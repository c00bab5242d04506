"""Banks: many adapters over one base, by name.

A bank is a tree of adapters in which those of one layer stand one below the other, and a name for
each. Which of them acts is a number in an array, so nothing is compiled again when adapters are
added, switched, combined, or mixed in a batch:

    bank.adapters                {"up": {"mora": {"matrix_sharing": [A R, R]}}}
    bank.select("french")        {"up": {"mora": {"matrix_sharing": [R, R]}}}
    join(bank.adapters, base)    parameters for a batch whose examples have adapters of their own

Shape letters: A adapters (the bank's capacity), E examples, R the square size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mora_jax._arrays.boxes import rebox, unbox
from mora_jax._arrays.dtypes import wide_dtype
from mora_jax._arrays.paths import flatten, is_adapter, list_paths, unflatten_like
from mora_jax._arrays.places import Places, constrain, places_of, sharding_of
from mora_jax._params.checks import check_adapters, check_in_range, refuse_dora
from mora_jax._params.split import Params
from mora_jax._plans.plan import Plan


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterBank:
    """Adapters by name, over one base. Made by `stack_adapters`.

    The methods change nothing: they give new banks, and trees of adapters that `join` puts together
    with the base. Names are no business of compiled code, so a bank is not a pytree; pass jitted
    functions its `adapters`, and numbers from `index` and `adapter_ids`. To train several adapters
    in one batch, differentiate by `adapters`; `dataclasses.replace(bank, adapters=new)` is the next
    bank.

    Attributes:
      plan: what all of them adapt, and how.
      adapters: a tree of adapters, as the first part of `split` is one; each leaf holds A of them
        one below the other. Free slots are zero, or what a removed adapter left.
      slots: the name at each index, None where the slot is free.
    """

    plan: Plan
    adapters: dict[str, Any]
    slots: tuple[str | None, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order of their indices."""
        return tuple(name for name in self.slots if name is not None)

    def index(self, name: str) -> int:
        """The index of an adapter.

        Raises:
          KeyError: for a name that the bank has not.
        """
        if name not in self.names:
            raise KeyError(f"no adapter {name!r} in the bank; there are: {list_paths(self.names)}.")
        return self.slots.index(name)

    def adapter_ids(self, names: Iterable[str | None]) -> jax.Array:
        """[E] int32: the index of each example's adapter, -1 where the name is None.

        The first axis of every adapted layer's inputs must be the examples. A layer refuses another
        number of elements there, but takes E tokens for E examples: to find layers that see tokens
        without their batch, trace the model once (`jax.eval_shape`) with a number of examples that
        is no other size of its inputs, and leave them out with `MoRAConfig.exclude`.

        Raises:
          KeyError: for a name that the bank has not.
        """
        found = [-1 if name is None else self.index(name) for name in names]
        return jnp.asarray(found, jnp.int32)

    def add(self, name: str, params: Params, plan: Plan, *, donate: bool = False) -> AdapterBank:
        """A bank with one more adapter, in the first free slot.

        Args:
          name: its name.
          params: parameters with the adapter, or the adapter alone.
          plan: the adapter's, as `load_adapters` gives it.
          donate: write into the arrays of this bank, which **cannot be used afterwards**, nor can
            parameters that hold them; otherwise there are two banks in memory.

        Raises:
          ValueError: where the name is taken or the bank is full, or where the plan is another one,
            every difference named.
          TypeError: where a leaf has another dtype than the bank's, which would round it.
        """
        if name in self.names:
            raise ValueError(f"the bank has an adapter {name!r} already; remove it first.")
        if None not in self.slots:
            raise ValueError(
                f"the bank is full: its capacity is {len(self.slots)}. Remove an adapter, or make "
                "a bank of more: stack_adapters(..., capacity=...)."
            )
        new, index = _leaves_of(name, params, plan, self.plan), self.slots.index(None)
        leaves = flatten(self.adapters)
        held = {path: unbox(leaf) for path, leaf in leaves.items()}
        for path, leaf in new.items():
            if leaf.dtype != held[path].dtype:
                raise TypeError(
                    f"{path!r} of {name!r} is {leaf.dtype}, and the bank holds {held[path].dtype}. "
                    "Make the bank with stack_adapters(..., dtype=...), or cast the adapter."
                )
            # From where it was loaded to the bank's mesh; all that is there moves within `_write`.
            place = sharding_of(held[path])
            if place is not None and not isinstance(leaf, Tracer) and sharding_of(leaf) is None:
                new[path] = jax.device_put(leaf, NamedSharding(place.mesh, PartitionSpec()))
        write = _write_donating if donate else _write
        held = write(held, new, index, self.plan, places_of(held))
        slots = (*self.slots[:index], name, *self.slots[index + 1 :])
        return dataclasses.replace(self, adapters=_like(self.adapters, held), slots=slots)

    def remove(self, name: str) -> AdapterBank:
        """A bank in which the adapter's slot is free; its numbers stay there until the next one.

        Raises:
          KeyError: for a name that the bank has not.
        """
        index = self.index(name)
        slots = (*self.slots[:index], None, *self.slots[index + 1 :])
        return dataclasses.replace(self, slots=slots)

    def select(self, adapter: str | int | jax.Array) -> dict[str, Any]:
        """One adapter: `join(bank.select(name), base)` is what `join` gives after its training.

        Args:
          adapter: its name, or its index, which may be traced.

        Raises:
          KeyError: for a name that the bank has not.
          IndexError: for an index beyond the bank; a traced one is taken as the nearest.
        """
        index = self.index(adapter) if isinstance(adapter, str) else adapter
        if not isinstance(index, Tracer) and not 0 <= int(index) < len(self.slots):
            raise IndexError(f"no adapter {index} in a bank of {len(self.slots)}.")
        held = self._values()
        return _like(self.adapters, _select(held, index, self.plan, places_of(held)))

    def combine(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """The weighted sum of adapters, one adapter again; exact, since deltas are linear in M.

        Summed in float32 or better, and rounded once to the bank's dtype.

        Args:
          weights: name -> weight; any numbers, which may be traced.

        Raises:
          KeyError: for a name that the bank has not.
          ValueError: for `LowRank`, whose delta is a product of two trained matrices: the sum of
            two such has another rank; for DoRA, which divides by a norm; where the sum is not
            finite in the bank's dtype.
        """
        if low := [path for path, spec in self.plan.items() if not spec.scheme.is_linear]:
            raise ValueError(
                "not combined: LowRank's delta is a product of two trained matrices, and a sum of "
                "such products has another rank. Merge the adapters instead, or give each example "
                f"its own (layers {list_paths(low)})."
            )
        refuse_dora(
            self.plan,
            "combined",
            "divides by a norm, so that a sum of its adapters is not the sum of what they do. "
            "Select one of them",
        )
        # All slots have a weight, so that any number of names is the same code.
        full: list[Any] = [0.0] * len(self.slots)
        for name, weight in weights.items():
            full[self.index(name)] = weight
        traced = any(isinstance(weight, Tracer) for weight in full)
        vector = (jnp if traced else np).asarray(full, float)
        held = self._values()
        combined = _combine(held, vector, self.plan, places_of(held))
        check_in_range(combined, {}, "not combined")
        return _like(self.adapters, combined)

    def _values(self) -> dict[str, jax.Array]:
        return {path: unbox(leaf) for path, leaf in flatten(self.adapters).items()}


def stack_adapters(
    adapters: Mapping[str, tuple[Params, Plan]],
    *,
    capacity: int | None = None,
    dtype: DTypeLike | None = None,
) -> AdapterBank:
    """A bank of adapters over one base.

    Equivalent to PEFT's `load_adapter` for each of them; here they are one array a leaf.

    Args:
      adapters: name -> (parameters with the adapter or the adapter alone, its plan), such as
        `load_adapters` gives. At least one; all of one plan, up to options that change no number
        (placement, dropout, what follows in a cycle).
      capacity: how many adapters there is room for; as many as there are, by default.
      dtype: of the bank; that of the first adapter by default. Products with bfloat16 inputs round
        the matrices to bfloat16 anyway, and a bank in bfloat16 is half as large.

    Returns:
      The bank. It lies on the mesh of the first adapter, its matrices whole on every device.

    Raises:
      ValueError: where there is none, more than the capacity, one that does not fit its plan, or
        plans that differ, every difference named; where a number leaves the range of `dtype`; and
        for plans with `also_train`: parameters that are trained in full are no adapters over a
        common base.

    >>> import flax.linen as nn, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> french, maths = ({"mora": {"matrix_sharing": value * jnp.ones((3, 3))}} for value in (1, 2))
    >>> bank = mora_jax.stack_adapters({"french": (french, plan), "maths": (maths, plan)})
    >>> bank.combine({"french": 0.5, "maths": 0.25})["mora"]["matrix_sharing"][0]
    Array([1., 1., 1.], dtype=float32)
    >>> base = {"kernel": jnp.zeros((3, 6)), "bias": jnp.zeros(6)}
    >>> params = mora_jax.join(bank.adapters, base)
    >>> ids = bank.adapter_ids(["maths", None, "french"])
    >>> model.apply({"params": params, "mora": {"adapter_ids": ids}}, jnp.ones((3, 3)))[:, 0]
    Array([6., 0., 3.], dtype=float32)
    """
    if not adapters:
        raise ValueError("a bank is made of one adapter at least.")
    capacity = len(adapters) if capacity is None else capacity
    if capacity < len(adapters):
        raise ValueError(f"capacity={capacity}, and there are {len(adapters)} adapters.")
    name, (params, plan) = next(iter(adapters.items()))
    if plan.also_train:
        raise ValueError(
            f"the plan trains {list_paths(dict(plan.also_train))} in full (also_train): adapters "
            "that come with such parameters have no base in common, and make no bank."
        )
    first = {path: leaf for path, leaf in flatten(params).items() if is_adapter(path)}
    values = _leaves_of(name, params, plan, plan)
    dtypes = {p: jnp.dtype(dtype or leaf.dtype).name for p, leaf in values.items()}
    make = functools.partial(_zeros, plan, capacity, dtypes)
    if places := {p: place for p, leaf in values.items() if (place := sharding_of(leaf))}:
        make = jax.jit(make, out_shardings={path: places.get(path) for path in values})
    boxed = {path: rebox(first[path], leaf) for path, leaf in make().items()}
    bank = AdapterBank(plan, unflatten_like(boxed, params), (None,) * capacity)
    for name, (params, own) in adapters.items():
        leaves = _leaves_of(name, params, own, plan)
        cast = {p: leaf.astype(dtypes[p] if dtype else leaf.dtype) for p, leaf in leaves.items()}
        if dtype is not None:
            check_in_range(cast, leaves, f"adapter {name!r} not stacked")
        bank = bank.add(name, unflatten_like(cast), own, donate=True)
    return bank


def _leaves_of(name: str, params: Params, plan: Plan, wanted: Plan) -> dict[str, jax.Array]:
    """Path -> array, of one adapter that fits the bank's plan."""
    if found := _differences(wanted, plan):
        lines = "".join(f"\n  {line}" for line in found)
        raise ValueError(f"{name!r} has another plan than the bank:{lines}")
    leaves = {path: leaf for path, leaf in flatten(params).items() if is_adapter(path)}
    check_adapters(wanted, leaves)
    return {path: unbox(leaf) for path, leaf in leaves.items()}


def _differences(wanted: Plan, plan: Plan) -> list[str]:
    """What in two plans makes their adapters mean different things, a line each."""
    lines = [f"{path!r} is adapted in the bank alone" for path in wanted if path not in plan]
    lines += [f"{path!r} is not adapted in the bank" for path in plan if path not in wanted]
    for path, spec in wanted.items():
        if path not in plan or (other := plan[path]) == spec:
            continue
        for what in ("scheme", "size", "kernel_shape", "kernel_axes", "kernel_name", "batch"):
            ours, theirs = getattr(spec, what), getattr(other, what)
            if ours != theirs:
                lines.append(f"{path!r} has {what} {theirs}, in the bank {ours}")
    lines += [f"{path!r} is trained in full" for path, _ in plan.also_train]
    if plan.merges != wanted.merges:
        times = "it belongs to a base merged into {} times, those in the bank to one of {}"
        lines.append(times.format(plan.merges, wanted.merges))
    return lines


def _like(adapters: Params, values: Mapping[str, jax.Array]) -> dict[str, Any]:
    """A tree of adapters in the boxes and under the keys of another."""
    boxes = flatten(adapters)
    return unflatten_like({p: rebox(boxes[p], value) for p, value in values.items()}, adapters)


def _zeros(plan: Plan, capacity: int, dtypes: Mapping[str, str]) -> dict[str, jax.Array]:
    shapes = plan.adapter_leaves(capacity)
    return {path: jnp.zeros(leaf.shape, dtypes[path]) for path, leaf in shapes.items()}


def _rows_of(plan: Plan) -> dict[str, tuple[int, int]]:
    """Path of a leaf -> (rows of one adapter, their axis)."""
    return {
        leaf: (spec.rows[name], spec.row_axis)
        for path, spec in plan.items()
        for name, leaf in plan.leaf_paths(path).items()
    }


def _written(leaves: dict[str, jax.Array], new: dict[str, jax.Array], index, plan, places):
    written = {}
    for path, (rows, axis) in _rows_of(plan).items():
        start = index * rows
        written[path] = lax.dynamic_update_slice_in_dim(leaves[path], new[path], start, axis)
    return constrain(written, places)


_write = jax.jit(_written, static_argnames=("plan", "places"))
_write_donating = jax.jit(_written, static_argnames=("plan", "places"), donate_argnums=0)


@functools.partial(jax.jit, static_argnames=("plan", "places"))
def _select(leaves: dict[str, jax.Array], index: Any, plan: Plan, places: Places):
    chosen = {
        path: lax.dynamic_slice_in_dim(leaves[path], index * rows, rows, axis)
        for path, (rows, axis) in _rows_of(plan).items()
    }
    return constrain(chosen, places)


@functools.partial(jax.jit, static_argnames=("plan", "places"))
def _combine(leaves: dict[str, jax.Array], weights: jax.Array, plan: Plan, places: Places):
    def combine(leaf, rows, axis):
        wide = wide_dtype(leaf.dtype)
        apart = leaf.reshape(*leaf.shape[:axis], -1, rows, *leaf.shape[axis + 1 :])
        factor = weights.astype(wide).reshape(-1, *[1] * (apart.ndim - axis - 1))
        # Sums, and no product of matrices, which accelerators would round; and what has no weight
        # is left out, for it may be no number.
        terms = jnp.where(factor == 0, 0, factor * apart.astype(wide))
        return terms.sum(axis).astype(leaf.dtype)

    rows_of = _rows_of(plan)
    return constrain({path: combine(leaves[path], *rows_of[path]) for path in rows_of}, places)
