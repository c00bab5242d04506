"""The two kinds of view that a traced function is run on: one records, one adapts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._arrays.dtypes import add_delta
from mora_jax._plans.layer import LayerConfig
from mora_jax._product.axes import KernelAxes
from mora_jax._product.dora import column_scale, kernel_delta, scaled, split_magnitude
from mora_jax._product.dot import dropout, mora_dot_general
from mora_jax._product.experts import ragged_delta
from mora_jax._product.per_example import ExampleIds
from mora_jax._schemes.base import Adapter
from mora_jax._tracing.view import Pairs, View


@dataclasses.dataclass(frozen=True)
class RecordingView(View):
    """Notes the axes of the products that a parameter enters.

    Attributes:
      path: the parameter's.
      found: where to note.
      origin: axis i of `value` is axis `origin[i]` of the parameter.
      stacks: axes of the parameter along which it was taken apart.
    """

    path: str
    found: dict[str, KernelAxes]
    origin: tuple[int, ...]
    stacks: tuple[int, ...] = ()

    def open(self, axis: int | None = None) -> tuple[Any, Callable[[Any], Any]]:
        if axis is None:
            return self.value, lambda value: dataclasses.replace(self, value=value)
        stored = self.order[axis]
        origin = self.origin[:stored] + self.origin[stored + 1 :]

        def rebuild(value: Any) -> Any:
            return dataclasses.replace(
                self,
                value=value,
                order=_without(self.order, stored),
                origin=origin,
                stacks=(*self.stacks, self.origin[stored]),
            )

        return jnp.moveaxis(self.value, stored, 0), rebuild

    def product(self, lhs: jax.Array, contracting: Pairs, batch: Pairs, **params: Any) -> jax.Array:
        inputs = tuple(sorted(self.origin[self.order[r]] for _, r in contracting))
        batched = tuple(sorted(self.origin[self.order[r]] for _, r in batch))
        outputs = tuple(sorted(set(self.origin) - {*inputs, *batched}))
        if inputs and outputs:
            axes = KernelAxes(inputs, outputs, self.stacks + batched)
            self.found.setdefault(self.path, axes)
        return _dot_general(lhs, self.array(), contracting, batch, **params)

    def ragged_product(self, lhs: jax.Array, group_sizes: jax.Array, **params: Any) -> jax.Array:
        if found := _ragged_axes(params, lhs):
            group, inputs, outputs = (self.origin[self.order[axis]] for axis in found)
            axes = KernelAxes((inputs,), (outputs,), (*self.stacks, group))
            self.found.setdefault(self.path, axes)
        return lax.ragged_dot_general(lhs, self.array(), group_sizes, **params)


@dataclasses.dataclass(frozen=True)
class AdaptedView(View):
    """A kernel and its adapter.

    Attributes:
      adapter: leaves [B..., rows, columns].
      axes: of `value`.
      config: scheme and placement.
      key: drops inputs of the adapter where it is given; what is no product has none.
      examples: gives each example of the inputs an adapter of its own, where it is given; leaves of
        `adapter` are then [B..., adapters, rows, columns].
    """

    adapter: Adapter
    axes: KernelAxes
    config: LayerConfig
    key: jax.Array | None = None
    examples: ExampleIds | None = None

    @classmethod
    def of(
        cls,
        kernel: jax.Array,
        adapter: Adapter,
        axes: KernelAxes,
        config: LayerConfig,
        key: jax.Array | None = None,
        examples: ExampleIds | None = None,
    ) -> AdaptedView:
        """The view of a whole kernel."""
        key = key if config.dropout else None
        order = tuple(range(kernel.ndim))
        return cls(kernel, order, kernel.dtype, adapter, axes, config, key, examples)

    def array(self) -> jax.Array:
        if self.examples is not None:
            raise self.examples.refuse("what is no product over its inputs (a lookup, a head)")
        base = self._base()
        delta = kernel_delta(base, self.adapter, self.axes, self.config.scheme)
        return add_delta(base, delta).transpose(self.order)

    def _base(self) -> jax.Array:
        """The kernel in the view's dtype, a constant unless it is trained beside the adapter."""
        value = self.value.astype(self.dtype)
        return value if self.config.train_kernel else lax.stop_gradient(value)

    def open(self, axis: int | None = None) -> tuple[Any, Callable[[Any], Any]]:
        if axis is None:
            return (self.value, dict(self.adapter), self.key), self._with
        stored = self.order[axis]
        if stored not in self.axes.batch:
            return jnp.moveaxis(self.array(), axis, 0), lambda array: array
        place, axes = self.axes.batch.index(stored), dataclasses.astuple(self.axes)
        one = dataclasses.replace(
            self,
            order=_without(self.order, stored),
            axes=KernelAxes(*(_without(part, stored) for part in axes)),
        )
        value = jnp.moveaxis(self.value, stored, 0)
        adapter = {name: jnp.moveaxis(leaf, place, 0) for name, leaf in self.adapter.items()}
        keys = None if self.key is None else jax.random.split(self.key, len(value))
        return (value, adapter, keys), one._with

    def _with(self, leaves: Any) -> AdaptedView:
        value, adapter, key = leaves
        return dataclasses.replace(self, value=value, adapter=adapter, key=key)

    def _scale(self, after: jax.Array) -> jax.Array:
        """DoRA's, laid out like `value`."""
        value = self.value.astype(self.dtype)
        return column_scale(value, self.adapter, self.axes, self.config.scheme, after)

    def _adapter_inputs(self, lhs: jax.Array) -> jax.Array:
        return lhs if self.key is None else dropout(lhs, self.config.dropout, self.key)

    def product(self, lhs: jax.Array, contracting: Pairs, batch: Pairs, **params: Any) -> jax.Array:
        pairs = {self.order[right]: left for left, right in contracting}
        batches = {self.order[right]: left for left, right in batch}
        axes = self.axes
        if batches.keys() == set(axes.batch):
            if pairs.keys() == set(axes.inputs):
                return self._adapted(lhs, pairs, batches, [right for _, right in batch], **params)
            matrix = len(self.order) == 2 and self.examples is None
            if pairs.keys() == set(axes.outputs) and matrix:
                return self._transposed(lhs, contracting, batch, **params)
        return _dot_general(lhs, self.array(), contracting, batch, **params)

    def ragged_product(self, lhs: jax.Array, group_sizes: jax.Array, **params: Any) -> jax.Array:
        found = tuple(self.order[axis] for axis in _ragged_axes(params, lhs))
        fitting = self.axes == KernelAxes(found[1:2], found[2:], found[:1])
        if not found or not fitting or self.examples is not None:
            return lax.ragged_dot_general(lhs, self.array(), group_sizes, **params)
        kernel = self._base().transpose(self.order)
        base = lax.ragged_dot_general(lhs, kernel, group_sizes, **params)
        (adapter, magnitude), scheme = split_magnitude(self.adapter), self.config.scheme
        rows = self._adapter_inputs(lhs)
        extra = ragged_delta(rows, adapter, group_sizes, base.shape[-1], scheme)
        y = base + extra.astype(base.dtype)
        if magnitude is None:
            return y
        scale = self._scale(after=lhs).transpose(found)[:, 0]
        return scaled(y, jnp.repeat(scale, group_sizes, 0, total_repeat_length=len(y)))

    def _adapted(
        self,
        lhs: jax.Array,
        pairs: dict[int, int],
        batches: dict[int, int],
        batch_order: Sequence[int],
        out_sharding: NamedSharding | None = None,
        **params: Any,
    ) -> jax.Array:
        """The product over the inputs. Its axes: batch, free ones of `lhs`, outputs."""
        axes = self.axes
        # From the order in which the kernel is stored to the one in which it is seen.
        lead = lhs.ndim - len(axes.inputs)
        order = [axes.batch.index(self.order[right]) for right in batch_order]
        order += range(len(order), lead)
        order += [lead + axes.outputs.index(a) for a in self.order if a in axes.outputs]
        numbers = (
            (tuple(pairs[axis] for axis in axes.inputs), axes.inputs),
            (tuple(batches[axis] for axis in axes.batch), axes.batch),
        )
        if self.examples is not None:
            self.examples.check(lhs.shape, numbers)
        y = mora_dot_general(
            lhs,
            self.value.astype(self.dtype),
            numbers,
            self.adapter,
            self.config.scheme,
            placement=self.config.placement,
            frozen=not self.config.train_kernel,
            feature_sharding=self.config.feature_sharding,
            keep_sums=self.config.keep_sums,
            adapter_lhs=None if self.key is None else self._adapter_inputs(lhs),
            adapter_ids=None if self.examples is None else self.examples.ids,
            out_sharding=_permuted(out_sharding, [order.index(axis) for axis in range(len(order))]),
            **params,
        )
        return y.transpose(order)

    def _transposed(
        self, lhs: jax.Array, contracting: Pairs, batch: Pairs, **params: Any
    ) -> jax.Array:
        """The product over the outputs of a matrix, as with a tied embedding."""
        ((left, _),), (adapter, magnitude) = contracting, split_magnitude(self.adapter)
        if magnitude is not None:
            scale = self._scale(after=lhs).reshape([-1, *[1] * (lhs.ndim - 1 - left)])
            lhs = scaled(lhs, scale)
        kernel = self._base().transpose(self.order)
        base = _dot_general(lhs, kernel, contracting, batch, **params)
        rows = jnp.moveaxis(self._adapter_inputs(lhs), left, -1)
        in_features = self.value.shape[self.axes.inputs[0]]
        extra = self.config.scheme.delta_transpose(
            rows.reshape(-1, rows.shape[-1]), adapter, in_features
        )
        return base + extra.reshape(base.shape).astype(base.dtype)


def _dot_general(
    lhs: jax.Array, rhs: jax.Array, contracting: Pairs, batch: Pairs, **params: Any
) -> jax.Array:
    def axes(side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(pair[side] for pair in contracting), tuple(pair[side] for pair in batch)

    (contract_l, batch_l), (contract_r, batch_r) = axes(0), axes(1)
    numbers = ((contract_l, contract_r), (batch_l, batch_r))
    return lax.dot_general(lhs, rhs, numbers, **params)


def _permuted(sharding: NamedSharding | None, order: list[int]) -> NamedSharding | None:
    """The sharding of an array with its axes permuted."""
    if sharding is None:
        return None
    spec = [*sharding.spec, *[None] * (len(order) - len(sharding.spec))]
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in order)))


def _ragged_axes(params: Any, lhs: jax.Array) -> tuple[int, ...]:
    """Axes (group, inputs, outputs) of experts whose rows are one after the other; else none."""
    numbers = params["ragged_dot_dimension_numbers"]
    contracting, batch = numbers.dot_dimension_numbers
    (left, (inputs, *_)), groups = contracting, tuple(numbers.rhs_group_dimensions)
    rows = tuple(numbers.lhs_ragged_dimensions)
    if lhs.ndim != 2 or len(left) != 1 or any(batch) or rows != (1 - left[0],) or len(groups) != 1:
        return ()
    (group,) = groups
    return (group, inputs, 3 - group - inputs) if left == (1,) else ()


def _without(axes: tuple[int, ...], gone: int) -> tuple[int, ...]:
    """Axes of an array, after one of its axes is gone."""
    return tuple(axis - (axis > gone) for axis in axes if axis != gone)
