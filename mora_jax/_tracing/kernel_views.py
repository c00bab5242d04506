"""The view that adapts: a kernel and its adapter, on their way to a product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._arrays.dtypes import add_delta
from mora_jax._plans.layer import LayerConfig
from mora_jax._product.axes import KernelAxes
from mora_jax._product.call import in_result_dtype
from mora_jax._product.dora import MAGNITUDE, column_scale, kernel_delta, scaled, split_magnitude
from mora_jax._product.dot import dropout, mora_dot_general
from mora_jax._product.experts import ragged_delta
from mora_jax._product.per_example import ExampleIds
from mora_jax._schemes.base import Adapter
from mora_jax._tracing.reshaping import ReshapedView
from mora_jax._tracing.view import Pairs, dot_general, ragged_axes


@dataclasses.dataclass(frozen=True)
class AdaptedView(ReshapedView):
    """A kernel and its adapter.

    Axes that are in none of `axes` were added by the model; their role is that in the product.

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
        view = self
        for axis in self._added():
            view = view._as_batch(axis)
        base = view._base()
        delta = kernel_delta(base, view.adapter, view.axes, view.config.scheme)
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
        place = self.axes.batch.index(stored)
        one = dataclasses.replace(
            self,
            order=tuple(a - (a > stored) for a in self.order if a != stored),
            axes=self.axes.replaced(_without(stored)),
        )
        value = jnp.moveaxis(self.value, stored, 0)
        adapter = {name: jnp.moveaxis(leaf, place, 0) for name, leaf in self.adapter.items()}
        keys = None if self.key is None else jax.random.split(self.key, len(value))
        return (value, adapter, keys), one._with

    def _with(self, leaves: Any) -> AdaptedView:
        value, adapter, key = leaves
        return dataclasses.replace(self, value=value, adapter=adapter, key=key)

    def scale(self, by: Callable[[jax.Array], jax.Array]) -> AdaptedView | None:
        # A norm of columns would not follow, nor a delta that is no linear function of its leaves.
        linear = self.config.scheme.is_linear and MAGNITUDE not in self.adapter
        if not linear or self.is_rounded:
            return None
        adapter = {name: by(leaf) for name, leaf in self.adapter.items()}
        return dataclasses.replace(self, value=by(self.value.astype(self.dtype)), adapter=adapter)

    # Reshapes, see `ReshapedView`. Leaves lead with the batch axes, and change with them.

    def settled(self) -> AdaptedView:
        return dataclasses.replace(
            self,
            value=self.value.transpose(self.order),
            order=tuple(range(len(self.order))),
            axes=self.axes.replaced(lambda axis: (self.order.index(axis),)),
        )

    def drop(self, axis: int) -> AdaptedView:
        view = self._with_batch_sizes(axis, 1, ())
        return dataclasses.replace(view, axes=self.axes.replaced(_without(axis)))

    def insert(self, axis: int, size: int) -> AdaptedView:
        del size
        axes = self.axes.replaced(lambda other: (other + (other >= axis),))
        return dataclasses.replace(self, axes=axes)

    def join(self, axis: int, count: int) -> AdaptedView | None:
        run = tuple(range(axis, axis + count))
        sides = (self.axes.inputs, self.axes.outputs, self.axes.batch)
        known = {a for side in sides for a in side}
        added = known.isdisjoint(run)
        # Features keep their order where neighbours in the kernel are neighbours among them.
        if not added and not any(_has_run(side, run) for side in sides):
            return None

        def new(other: int) -> tuple[int, ...]:
            if axis < other < axis + count:
                return ()
            return (other - (count - 1) * (other > axis),)

        sizes = None if added or axis not in self.axes.batch else (-1,)
        view = self if sizes is None else self._with_batch_sizes(axis, count, sizes)
        return dataclasses.replace(view, axes=self.axes.replaced(new))

    def split(self, axis: int, sizes: tuple[int, ...]) -> AdaptedView:
        more = len(sizes) - 1

        def new(other: int) -> Sequence[int]:
            if other == axis:
                return range(axis, axis + more + 1)
            return (other + more * (other > axis),)

        view = self._with_batch_sizes(axis, 1, sizes)
        return dataclasses.replace(view, axes=self.axes.replaced(new))

    def _with_batch_sizes(self, axis: int, count: int, sizes: tuple[int, ...]) -> AdaptedView:
        """The view with other sizes for some batch axes of the leaves, from that of `axis` on."""
        if axis not in self.axes.batch:
            return self
        place = self.axes.batch.index(axis)

        def resized(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(*leaf.shape[:place], *sizes, *leaf.shape[place + count :])

        adapter = {name: resized(leaf) for name, leaf in self.adapter.items()}
        return dataclasses.replace(self, adapter=adapter)

    def _added(self) -> list[int]:
        """Axes of `value` that the model added."""
        axes = self.axes
        known = {*axes.inputs, *axes.outputs, *axes.batch}
        return [axis for axis in range(self.value.ndim) if axis not in known]

    def _as_batch(self, axis: int) -> AdaptedView:
        """The view with an added axis as a batch axis, all elements with the same adapter."""
        axes, place = self.axes, len(self.axes.batch)

        def repeated(leaf: jax.Array) -> jax.Array:
            lead, rest = leaf.shape[:place], leaf.shape[place:]
            value = jnp.expand_dims(leaf, place)
            return jnp.broadcast_to(value, (*lead, self.value.shape[axis], *rest))

        return dataclasses.replace(
            self,
            adapter={name: repeated(leaf) for name, leaf in self.adapter.items()},
            axes=dataclasses.replace(axes, batch=(*axes.batch, axis)),
        )

    def _in_output_order(self) -> AdaptedView:
        """The view with its output features stored in their order, which products take them in."""
        outputs, stored = self.axes.outputs, list(range(self.value.ndim))
        if list(outputs) == sorted(outputs):
            return self
        for place, axis in zip(sorted(outputs), outputs, strict=True):
            stored[place] = axis
        return dataclasses.replace(
            self,
            value=self.value.transpose(stored),
            order=tuple(stored.index(axis) for axis in self.order),
            axes=self.axes.replaced(lambda axis: (stored.index(axis),)),
        )

    def _placed(self, contracted: Iterable[int], batched: Iterable[int]) -> AdaptedView:
        """The view with the roles that added axes have in a product, if they can have them."""
        view = self
        for axis in self._added():
            axes = view.axes
            if axis in batched:
                view = view._as_batch(axis)
            elif self.value.shape[axis] == 1:
                # Of size 1 it may stand anywhere among the features.
                if axis in contracted:
                    axes = dataclasses.replace(axes, inputs=(*axes.inputs, axis))
                else:
                    axes = dataclasses.replace(axes, outputs=tuple(sorted((*axes.outputs, axis))))
                view = dataclasses.replace(view, axes=axes)
        return view

    # Products.

    def _scale(self, after: jax.Array) -> jax.Array:
        """DoRA's, laid out like `value`."""
        value = self.value.astype(self.dtype)
        return column_scale(value, self.adapter, self.axes, self.config.scheme, after)

    def _adapter_inputs(self, lhs: jax.Array) -> jax.Array:
        return lhs if self.key is None else dropout(lhs, self.config.dropout, self.key)

    def product(self, lhs: jax.Array, contracting: Pairs, batch: Pairs, **params: Any) -> jax.Array:
        lhs = self._floating(lhs, params.get("preferred_element_type"))
        view = self._in_output_order()
        pairs = {view.order[right]: left for left, right in contracting}
        batches = {view.order[right]: left for left, right in batch}
        view = view._placed(pairs, batches)
        axes = view.axes
        if batches.keys() == set(axes.batch) and not view._added():
            if pairs.keys() == set(axes.inputs):
                return view._adapted(lhs, pairs, batches, [right for _, right in batch], **params)
            matrix = len(self.order) == 2 and self.examples is None
            if pairs.keys() == set(axes.outputs) and matrix:
                return view._transposed(lhs, contracting, batch, **params)
        return dot_general(lhs, self.array(), contracting, batch, **params)

    def _floating(self, lhs: jax.Array, result: Any) -> jax.Array:
        """The inputs of a product; integers and truth values in its dtype, as it takes them."""
        return lhs if jnp.issubdtype(lhs.dtype, jnp.inexact) else lhs.astype(result or self.dtype)

    def ragged_product(self, lhs: jax.Array, group_sizes: jax.Array, **params: Any) -> jax.Array:
        lhs = self._floating(lhs, params.get("preferred_element_type"))
        found = tuple(self.order[axis] for axis in ragged_axes(params, lhs))
        fitting = self.axes == KernelAxes(found[1:2], found[2:], found[:1])
        if not found or not fitting or self.examples is not None:
            return lax.ragged_dot_general(lhs, self.array(), group_sizes, **params)
        kernel = self._base().transpose(self.order)
        base = lax.ragged_dot_general(lhs, kernel, group_sizes, **params)
        (adapter, magnitude), scheme = split_magnitude(self.adapter), self.config.scheme

        def delta(rows: jax.Array) -> jax.Array:
            return ragged_delta(rows, adapter, group_sizes, base.shape[-1], scheme)

        extra = in_result_dtype(delta, self._adapter_inputs(lhs), kernel.dtype, base.dtype)
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
        base = dot_general(lhs, kernel, contracting, batch, **params)
        rows = jnp.moveaxis(self._adapter_inputs(lhs), left, -1)
        in_features = self.value.shape[self.axes.inputs[0]]

        def delta(rows: jax.Array) -> jax.Array:
            return self.config.scheme.delta_transpose(rows, adapter, in_features)

        rows = rows.reshape(-1, rows.shape[-1])
        extra = in_result_dtype(delta, rows, kernel.dtype, base.dtype)
        return base + extra.reshape(base.shape).astype(base.dtype)


def _has_run(axes: tuple[int, ...], run: tuple[int, ...]) -> bool:
    """Whether axes stand one after the other among others."""
    return any(axes[i : i + len(run)] == run for i in range(len(axes)))


def _permuted(sharding: NamedSharding | None, order: list[int]) -> NamedSharding | None:
    """The sharding of an array with its axes permuted."""
    if sharding is None:
        return None
    spec = [*sharding.spec, *[None] * (len(order) - len(sharding.spec))]
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in order)))


def _without(gone: int) -> Callable[[int], tuple[int, ...]]:
    """What an axis becomes when another one goes."""
    return lambda axis: () if axis == gone else (axis - (axis > gone),)
