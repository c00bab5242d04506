"""One adapted product, as it was asked for: its layout, its options, and the plain way to do it.

Shape letters: I input features, O output features, B batch axes, T rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mora_jax._arrays.dtypes import add_delta, wide_dtype
from mora_jax._arrays.mesh import Spread, shards_of, spread_is
from mora_jax._product.axes import KernelAxes, kernel_axes
from mora_jax._product.cost import Parts, Placement, best_places
from mora_jax._product.dora import scaled
from mora_jax._product.per_example import delta_by_example
from mora_jax._schemes.base import Scheme
from mora_jax._schemes.operators import delta


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one product: its layout, scheme and options."""

    dimension_numbers: tuple[tuple[tuple[int, ...], ...], ...]
    lhs_free: tuple[int, ...]
    axes: KernelAxes
    scheme: Scheme
    dot_general: Callable[..., jax.Array]
    precision: Any
    preferred_element_type: Any
    frozen: bool
    spread: Spread
    keep_sums: bool
    placement: Placement = "activation"

    @classmethod
    def of(cls, lhs, rhs, dimension_numbers, scheme, dot_general, **options):
        (lhs_in, rhs_in), (lhs_batch, rhs_batch) = (
            tuple(tuple(axes) for axes in pair) for pair in dimension_numbers
        )
        return cls(
            ((lhs_in, rhs_in), (lhs_batch, rhs_batch)),
            tuple(axis for axis in range(lhs.ndim) if axis not in lhs_in + lhs_batch),
            kernel_axes(rhs, dimension_numbers),
            scheme,
            dot_general,
            **options,
        )

    @property
    def is_plain(self):
        """Whether the base product is JAX's own, whose derivatives are known."""
        product = self.dot_general
        while isinstance(product, functools.partial):
            product = product.func
        return product is lax.dot_general

    def product(self, lhs, rhs):
        return self.dot_general(
            lhs,
            rhs,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    def kernel(self, rhs, adapter, scale=None):
        """What the inputs are multiplied with; with DoRA's scale of its columns."""
        if self.frozen:
            rhs = lax.stop_gradient(rhs)  # of second derivatives
        return add_delta(rhs, self.axes.delta(adapter, rhs.shape, self.scheme), scale)

    def rows(self, lhs):
        """[B..., T, I] of the inputs."""
        (lhs_in, _), (lhs_batch, _) = self.dimension_numbers
        lead = [lhs.shape[axis] for axis in lhs_batch]
        features = math.prod(lhs.shape[axis] for axis in lhs_in)
        return lhs.transpose(lhs_batch + self.lhs_free + lhs_in).reshape(*lead, -1, features)

    def from_rows(self, rows, shape):
        """The inverse of `rows`: [B..., T, I] to the layout of the inputs."""
        (lhs_in, _), (lhs_batch, _) = self.dimension_numbers
        order = lhs_batch + self.lhs_free + lhs_in
        value = rows.reshape([shape[axis] for axis in order])
        return value.transpose([order.index(axis) for axis in range(len(shape))])

    def scale_columns(self, y, scale):
        """Results of the product, or gradients by them, times DoRA's scale of their columns."""
        return y if scale is None else scaled(y, self.to_outputs(scale))

    def scale_gradient(self, y, dy, scale):
        """The gradient by the scale: of `y = scale * ...` the sum of `y dy / scale` over rows.

        Scales are zero of columns that the base has not (`_magnitude.py`), and those alone.
        """
        wide = wide_dtype(y.dtype)

        def broadcast(scale):
            return jnp.broadcast_to(self.to_outputs(scale).astype(wide), y.shape)

        (sums,) = jax.linear_transpose(broadcast, scale)(y.astype(wide) * dy.astype(wide))
        return jnp.where(scale == 0, 0, sums / jnp.where(scale == 0, 1, scale))

    def to_outputs(self, columns):
        """Numbers laid out like the kernel, of inputs one each, as results of the product lie."""
        axes, rows = self.axes, [1] * len(self.lhs_free)
        value = columns.transpose(axes.batch + axes.inputs + axes.outputs)
        split = len(axes.batch), len(axes.batch + axes.inputs)
        return value.reshape(*value.shape[: split[0]], *rows, *value.shape[split[1] :])

    def per_batch(self, function):
        for _ in self.axes.batch:
            function = jax.vmap(function)
        return function

    def delta(self, lhs, adapter, out_features, ids=None):
        """[B..., T, O] of the delta."""

        def one(x, adapter):
            with spread_is(self.spread):
                if ids is not None:
                    return delta_by_example(x, adapter, ids, out_features, self.scheme)
                return delta(x, adapter, out_features, self.scheme)

        return self.per_batch(one)(self.rows(lhs), dict(adapter))

    def in_activations(self, lhs, adapter_lhs, rhs, adapter, ids=None):
        if self.frozen and self.is_plain:
            base = frozen_product(lhs, rhs, self)
        else:
            base = self.product(lhs, lax.stop_gradient(rhs) if self.frozen else rhs)
        _, _, out_features = self.axes.sizes(rhs.shape)
        value = self.delta(adapter_lhs, adapter, out_features, ids)
        return base + value.reshape(base.shape).astype(base.dtype)

    def places(self, lhs, rhs, adapter):
        """Where the forward and the backward pass have the delta."""
        batch, in_features, out_features = self.axes.sizes(rhs.shape)
        rows = math.prod(lhs.shape) // math.prod((*batch, in_features))
        if not isinstance(rows, int):  # a symbol, in a function to export
            return ("kernel" if self.placement == "auto" else self.placement), "kernel"
        spread = self.spread
        rows = max(1, rows // shards_of(spread.rows))
        split = Parts(*(shards_of(x or ()) for x in (spread.inputs, spread.outputs, spread.kernel)))
        size = next(iter(adapter.values())).shape[-1]
        forward, backward = best_places(
            rows, in_features, out_features, size, self.scheme, None, split
        )
        return (forward if self.placement == "auto" else self.placement), backward


#: Marks the kernel of a frozen product, so that the product is known as ours when it is traced and
#: run again. It is the identity, and compiles to nothing.
FROZEN_KERNEL = Primitive("mora_frozen_kernel")
FROZEN_KERNEL.def_impl(lambda kernel: kernel)
FROZEN_KERNEL.def_abstract_eval(lambda kernel: kernel)
mlir.register_lowering(FROZEN_KERNEL, lambda _, kernel: [kernel])
ad.deflinear(FROZEN_KERNEL, lambda cotangent: [cotangent])
batching.primitive_batchers[FROZEN_KERNEL] = lambda args, axes: (FROZEN_KERNEL.bind(*args), *axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def frozen_product(lhs, rhs, call):
    """The base product with a constant kernel, marked for the interpreter of traced functions."""
    return call.product(lhs, FROZEN_KERNEL.bind(rhs))


@frozen_product.defjvp
def _jvp_of_frozen(call, primals, tangents):
    (lhs, rhs), (dlhs, _) = primals, tangents
    return call.product(lhs, rhs), call.product(dlhs, rhs)
