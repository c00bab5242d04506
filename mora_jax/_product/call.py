"""One adapted product, as it was asked for: its layout, its options, and the plain way to do it.

Shape letters: I input features, O output features, B batch axes, T rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mora_jax._arrays.dtypes import add_delta, holds_all, wide_dtype
from mora_jax._arrays.mesh import UNKNOWN, FeatureSharding, feature_sharding_is, shards_of
from mora_jax._product.axes import DotDimensionNumbers, KernelAxes, kernel_axes
from mora_jax._product.cost import Place, Placement, Splits, cheapest_placements
from mora_jax._product.dora import scaled
from mora_jax._product.per_example import delta_by_example
from mora_jax._schemes.base import Adapter, Scheme

#: ((contracted axes of lhs, of rhs), (batch axes of lhs, of rhs)).
StaticDimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]


@dataclasses.dataclass(frozen=True)
class AdaptedProduct:
    """The static part of one adapted product: its layout, scheme and options.

    Arrays are arguments of the methods: `lhs` the inputs and `rhs` the kernel in the layout of
    `dimension_numbers`, `adapter` leaves [B..., rows, columns], `scale` DoRA's, of the kernel's
    columns and laid out like it, or None.

    Attributes:
      dimension_numbers: as for `jax.lax.dot_general`.
      lhs_free: axes of `lhs` that are neither contracted nor batched.
      axes: those of `rhs`.
      scheme: the scheme.
      dot_general: the base product.
      precision: of the base product.
      preferred_element_type: of the base product.
      frozen: whether the kernel is a constant.
      feature_sharding: mesh axes over which features and rows are split.
      keep_sums: whether the sum of kernel and delta is kept for the backward pass.
      placement: where the forward pass has the delta.
    """

    dimension_numbers: StaticDimensionNumbers
    lhs_free: tuple[int, ...]
    axes: KernelAxes
    scheme: Scheme
    dot_general: Callable[..., jax.Array]
    precision: Any = None
    preferred_element_type: Any = None
    frozen: bool = False
    feature_sharding: FeatureSharding = UNKNOWN
    keep_sums: bool = False
    placement: Placement = "activation"

    @classmethod
    def of(
        cls,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: DotDimensionNumbers,
        scheme: Scheme,
        dot_general: Callable[..., jax.Array],
        **options: Any,
    ) -> AdaptedProduct:
        """The product of these two arrays; options are further attributes."""
        (lhs_in, rhs_in), (lhs_batch, rhs_batch) = dimension_numbers
        numbers = (tuple(lhs_in), tuple(rhs_in)), (tuple(lhs_batch), tuple(rhs_batch))
        taken = (*lhs_in, *lhs_batch)
        free = tuple(axis for axis in range(lhs.ndim) if axis not in taken)
        axes = kernel_axes(rhs, dimension_numbers)
        return cls(numbers, free, axes, scheme, dot_general, **options)

    @property
    def is_plain(self) -> bool:
        """Whether the base product is JAX's own, whose derivatives are known."""
        product = self.dot_general
        while isinstance(product, functools.partial):
            product = product.func
        return product is lax.dot_general

    def product(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The base product."""
        return self.dot_general(
            lhs,
            rhs,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    def kernel(self, rhs: jax.Array, adapter: Adapter, scale: jax.Array | None = None) -> jax.Array:
        """What the inputs are multiplied with: kernel plus delta, times DoRA's scale if any."""
        if self.frozen:
            rhs = lax.stop_gradient(rhs)  # of second derivatives
        value = self.axes.delta(adapter, rhs.shape, self.scheme, rhs.dtype)
        return add_delta(rhs, value, scale)

    def rows(self, lhs: jax.Array) -> jax.Array:
        """The inputs as [B..., T, I]."""
        (lhs_in, _), (lhs_batch, _) = self.dimension_numbers
        lead = [lhs.shape[axis] for axis in lhs_batch]
        features = math.prod(lhs.shape[axis] for axis in lhs_in)
        return lhs.transpose(lhs_batch + self.lhs_free + lhs_in).reshape(*lead, -1, features)

    def from_rows(self, rows: jax.Array, shape: Sequence[int]) -> jax.Array:
        """The inverse of `rows`: [B..., T, I] in the layout of inputs of this shape."""
        (lhs_in, _), (lhs_batch, _) = self.dimension_numbers
        order = lhs_batch + self.lhs_free + lhs_in
        value = rows.reshape([shape[axis] for axis in order])
        return value.transpose([order.index(axis) for axis in range(len(shape))])

    def scale_columns(self, y: jax.Array, scale: jax.Array | None) -> jax.Array:
        """Results of the product, or gradients by them, times DoRA's scale of their columns."""
        return y if scale is None else scaled(y, self.to_outputs(scale))

    def scale_gradient(self, y: jax.Array, dy: jax.Array, scale: jax.Array) -> jax.Array:
        """The gradient by the scale: of `y = scale * ...` the sum of `y dy / scale` over rows.

        Scales are zero of columns that the base lacks (`dora.py`), and of those alone.
        """
        wide = wide_dtype(y.dtype)

        def broadcast(scale: jax.Array) -> jax.Array:
            return jnp.broadcast_to(self.to_outputs(scale).astype(wide), y.shape)

        (sums,) = jax.linear_transpose(broadcast, scale)(y.astype(wide) * dy.astype(wide))
        return jnp.where(scale == 0, 0, sums / jnp.where(scale == 0, 1, scale))

    def to_outputs(self, columns: jax.Array) -> jax.Array:
        """Numbers laid out like the kernel, of inputs one each, as results of the product lie."""
        axes, rows = self.axes, [1] * len(self.lhs_free)
        value = columns.transpose(axes.batch + axes.inputs + axes.outputs)
        split = len(axes.batch), len(axes.batch + axes.inputs)
        return value.reshape(*value.shape[: split[0]], *rows, *value.shape[split[1] :])

    def per_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function mapped over the batch axes, and told how features lie."""

        def one(*args: Any) -> Any:
            with feature_sharding_is(self.feature_sharding):
                return function(*args)

        for _ in self.axes.batch:
            one = jax.vmap(one)
        return one

    def delta(
        self,
        lhs: jax.Array,
        adapter: Adapter,
        out_features: int,
        ids: jax.Array | None = None,
    ) -> jax.Array:
        """[B..., T, O] of the delta; `ids`: which adapter of a bank each example has."""

        def one(x: jax.Array, adapter: Adapter) -> jax.Array:
            if ids is not None:
                return delta_by_example(x, adapter, ids, out_features, self.scheme)
            return self.scheme.delta(x, adapter, out_features)

        return self.per_batch(one)(self.rows(lhs), dict(adapter))

    def in_activations(
        self,
        lhs: jax.Array,
        adapter_lhs: jax.Array,
        rhs: jax.Array,
        adapter: Adapter,
        ids: jax.Array | None = None,
    ) -> jax.Array:
        """The base product plus the delta of `adapter_lhs`."""
        if self.frozen and self.is_plain:
            base = frozen_product(lhs, rhs, self)
        else:
            base = self.product(lhs, lax.stop_gradient(rhs) if self.frozen else rhs)
        _, _, out_features = self.axes.sizes(rhs.shape)

        def delta(lhs: jax.Array) -> jax.Array:
            return self.delta(lhs, adapter, out_features, ids)

        value = in_result_dtype(delta, adapter_lhs, rhs.dtype, base.dtype)
        return base + value.reshape(base.shape).astype(base.dtype)

    def placements(
        self, lhs: jax.Array, rhs: jax.Array, adapter: Mapping[str, Any]
    ) -> tuple[Place, Place]:
        """Where the forward and the backward pass have the delta."""
        batch, in_features, out_features = self.axes.sizes(rhs.shape)
        rows = math.prod(lhs.shape) // math.prod((*batch, in_features))
        if not isinstance(rows, int):  # a symbol, in a function to export
            return ("kernel" if self.placement == "auto" else self.placement), "kernel"
        lies = self.feature_sharding
        rows = max(1, rows // shards_of(lies.rows))
        sides = (lies.inputs or (), lies.outputs or (), lies.kernel)
        splits = Splits(*map(shards_of, sides))
        size = self.scheme.size_of(adapter)
        forward, backward = cheapest_placements(
            rows, in_features, out_features, size, self.scheme, None, splits
        )
        return (forward if self.placement == "auto" else self.placement), backward


def in_result_dtype(
    delta: Callable[[jax.Array], jax.Array], lhs: jax.Array, kernel_dtype: Any, result_dtype: Any
) -> jax.Array:
    """A delta of inputs, which a scheme computes in the inputs' dtype, as precise as the product.

    Inputs whose dtype lacks numbers of the kernel's, such as integers, are taken in the result's.
    Of complex ones both parts are taken, since a delta is linear in the inputs.
    """
    if jnp.issubdtype(lhs.dtype, jnp.complexfloating):
        return lax.complex(delta(lhs.real), delta(lhs.imag))
    if not jnp.issubdtype(lhs.dtype, jnp.floating) or not holds_all(lhs.dtype, kernel_dtype):
        lhs = lhs.astype(result_dtype)
    return delta(lhs)


#: Marks the kernel of a frozen product, so that the product is known as ours when it is traced and
#: run again. It is the identity, and compiles to nothing.
FROZEN_KERNEL = Primitive("mora_frozen_kernel")
FROZEN_KERNEL.def_impl(lambda kernel: kernel)
FROZEN_KERNEL.def_abstract_eval(lambda kernel: kernel)
mlir.register_lowering(FROZEN_KERNEL, lambda _, kernel: [kernel])
ad.deflinear(FROZEN_KERNEL, lambda cotangent: [cotangent])
batching.primitive_batchers[FROZEN_KERNEL] = lambda args, axes: (FROZEN_KERNEL.bind(*args), *axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def frozen_product(lhs: jax.Array, rhs: jax.Array, call: AdaptedProduct) -> jax.Array:
    """The base product with a constant kernel, marked for the interpreter of traced functions."""
    return call.product(lhs, FROZEN_KERNEL.bind(rhs))


@frozen_product.defjvp
def _jvp_of_frozen(
    call: AdaptedProduct, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (lhs, rhs), (dlhs, _) = primals, tangents
    return call.product(lhs, rhs), call.product(dlhs, rhs)
