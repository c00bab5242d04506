"""The product of inputs and an adapted kernel: the engine of the library.

The delta can be added in two places, and the choice decides speed, memory and communication:

- in the *kernel*, `x @ (W + delta_kernel(M))`: one product, a pass over `W`. The sum is made in
  float32 or better and cast back once, as a merge would do.
- in the *activations*, `x @ W + delta(x)`: the paper's form. Right for few rows.

DoRA scales the columns of either, of the sum or of the result.

"kernel" and "auto" have a gradient rule of their own (`gradient.py`). Such a rule has no
forward mode, and says so; "activation" does without.

Shape letters: I input features, O output features, B batch axes, T rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax._arrays.mesh import (
    UNKNOWN,
    FeatureSharding,
    axes_of,
    explicit_mesh,
    gather_adapter,
    in_auto_axes,
    split_over,
    vary_alike,
)
from mora_jax._compat.renamed import renamed_argument
from mora_jax._product.axes import DotDimensionNumbers
from mora_jax._product.call import AdaptedProduct
from mora_jax._product.cost import Placement
from mora_jax._product.dora import column_scale, split_magnitude
from mora_jax._product.gradient import adapted_product, reverse_only
from mora_jax._product.per_example import ExampleIds, ids_as_int32
from mora_jax._schemes.base import Adapter, Scheme


@renamed_argument("spread", "feature_sharding")
def mora_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DotDimensionNumbers,
    adapter: Adapter,
    scheme: Scheme,
    *,
    placement: Placement = "auto",
    precision: Any = None,
    preferred_element_type: Any = None,
    adapter_lhs: jax.Array | None = None,
    adapter_ids: jax.Array | None = None,
    frozen: bool = False,
    feature_sharding: FeatureSharding = UNKNOWN,
    keep_sums: bool = False,
    out_sharding: Any = None,
    dot_general: Callable[..., jax.Array] = lax.dot_general,
) -> jax.Array:
    """`jax.lax.dot_general` with an adapter on its right-hand side.

    Args:
      lhs: the inputs, any layout.
      rhs: the kernel, any layout. Its contracted axes, flattened in the order of
        `dimension_numbers`, are the I input features; its free axes the O output features.
      dimension_numbers: as for `jax.lax.dot_general`.
      adapter: `{"matrix": [B..., R, R]}`, or `{"a": [B..., I, rank], "b": [B..., rank, O]}`; B the
        batch axes, one matrix for each. With a `"magnitude"` [B..., 1, O] beside them it is DoRA:
        the product is of `magnitude (W + delta) ||W|| / ||W + delta||`, column by column.
      scheme: the scheme.
      placement: where the forward pass has the delta: "kernel", "activation", or "auto": the
        cheaper one by static shapes, the kernel for many rows, the activations for few and for
        schemes that prefer them (`LowRank`). The backward pass of "kernel" and "auto" takes the
        cheaper one. "activation" (and "auto" of such a scheme) is differentiated by JAX alone, in
        forward mode as well.
      precision: as for `jax.lax.dot_general`, for the base product.
      preferred_element_type: as for `jax.lax.dot_general`, for the base product.
      adapter_lhs: inputs of the adapter alone, where they differ from `lhs` (dropout); the delta is
        then in the activations whatever `placement` says.
      adapter_ids: [E] int: an adapter for each example, -1 for none. Leaves of `adapter` then have
        an axis of adapters, [B..., adapters, rows, columns], the first axis of `lhs` is one of E
        examples (what else has E elements is taken for them), and the delta is in the activations
        whatever `placement` says.
      frozen: take the kernel as a constant: its gradient is zero, and never formed. Unlike with
        `jax.lax.stop_gradient`, a scan over stacked kernels keeps no copy of them.
      feature_sharding: mesh axes over which inputs and outputs are split by their features, as in
        tensor parallelism, and those of the rows: a tuple of names for each, empty where they are
        whole on every device, None where it is not known; compressing is then dearer, and "auto"
        counts the rows of all devices. `AxisType.Explicit` axes tell.
      keep_sums: keep the sum of kernel and delta for the backward pass, where both passes have one,
        instead of making it again. For what runs under remat, which keeps it no longer than a
        layer; elsewhere it is a second copy of the kernel.
      out_sharding: as for `jax.lax.dot_general`. With `AxisType.Explicit` axes the result lies
        where the base product's does, and how the adapter gets there is left to the compiler.
      dot_general: the base product, by default `jax.lax.dot_general`.

    Returns:
      What `dot_general` returns for the kernel plus the delta.

    Raises:
      TypeError: for a kernel that is not floating.
      ValueError: where the adapter does not fit the kernel; for DoRA with `adapter_ids`.

    >>> from mora_jax import Sharing
    >>> x, kernel = jnp.ones((2, 6)), jnp.zeros((6, 4))
    >>> dims = (((1,), (0,)), ((), ()))
    >>> mora_dot_general(x, kernel, dims, {"matrix": jnp.eye(2)}, Sharing())
    Array([[3., 3., 3., 3.],
           [3., 3., 3., 3.]], dtype=float32)
    """
    product = dot_general
    if out_sharding is not None:
        product = functools.partial(dot_general, out_sharding=out_sharding)
    call = AdaptedProduct.of(
        lhs,
        rhs,
        dimension_numbers,
        scheme,
        product,
        precision=precision,
        preferred_element_type=preferred_element_type,
        frozen=frozen,
        feature_sharding=feature_sharding,
        keep_sums=keep_sums,
        placement=placement,
    )
    _check(call, lhs, rhs, adapter, adapter_ids)
    if call.is_plain and not jnp.issubdtype(lhs.dtype, jnp.inexact):
        # Integers and truth values: a float is what the product makes of them too.
        lhs = lhs.astype(jax.eval_shape(call.product, lhs, rhs).dtype)
    if adapter_ids is not None:
        adapter_ids = ids_as_int32(adapter_ids)  # while they may be 64 bits still
    arrays = (lhs, rhs, dict(adapter), adapter_lhs, adapter_ids)
    if (mesh := explicit_mesh(lhs, rhs)) is None:
        return _adapted(call, *arrays)
    # Its shardings are those of the base product, or what JAX says of that is raised.
    result = jax.eval_shape(call.product, lhs, rhs)
    sharding = _explicit_feature_sharding(call, lhs, rhs, result)
    inner = dataclasses.replace(call, dot_general=dot_general, feature_sharding=sharding)
    return in_auto_axes(functools.partial(_adapted, inner), mesh, result.sharding, *arrays)


def _check(
    call: AdaptedProduct,
    lhs: jax.Array,
    rhs: jax.Array,
    adapter: Adapter,
    adapter_ids: jax.Array | None,
) -> None:
    """Raises TypeError or ValueError unless the adapter fits the kernel, and the ids the inputs."""
    if not jnp.issubdtype(rhs.dtype, jnp.floating):
        raise TypeError(f"the kernel must be floating to take a delta, got {rhs.dtype}.")
    batch, in_features, out_features = call.axes.sizes(rhs.shape)
    # Where examples have adapters of their own, an axis of adapters follows.
    end = -2 if adapter_ids is None else -3
    if bad := {name: a.shape for name, a in adapter.items() if a.shape[:end] != batch}:
        raise ValueError(f"adapter leaves must lead with the batch axes {batch}, got {bad}.")
    if adapter_ids is not None:
        ExampleIds(adapter_ids, "").check(lhs.shape, call.dimension_numbers)
    one = {name: jax.ShapeDtypeStruct(a.shape[-2:], a.dtype) for name, a in adapter.items()}
    direction, magnitude = split_magnitude(one)
    call.scheme.check(direction, in_features, out_features)
    if magnitude is not None and magnitude.shape != (1, out_features):
        raise ValueError(
            f"the magnitude must have shape {(1, out_features)}, got {magnitude.shape}."
        )
    if magnitude is not None and adapter_ids is not None:
        raise ValueError(
            "adapter_ids: DoRA takes the norm of a kernel and its delta, another pass over the "
            "kernel for every example; select one adapter for all of them."
        )


def _explicit_feature_sharding(
    call: AdaptedProduct, lhs: jax.Array, rhs: jax.Array, result: Any
) -> FeatureSharding:
    """How the layer lies on a mesh, where the arrays' types say it."""
    outputs = range(result.ndim - len(call.axes.outputs), result.ndim)
    inputs = call.dimension_numbers[0][0]
    names = jax.typeof(lhs).sharding.spec
    rows = (axis for axis in call.lhs_free if names[axis] is not None)
    return FeatureSharding(
        split_over(names, inputs, lhs.shape),
        split_over(result.sharding.spec, outputs, result.shape),
        sum((split_over(names, [axis], lhs.shape) or () for axis in rows), ()),
        axes_of(jax.typeof(rhs).sharding.spec, (*call.axes.inputs, *call.axes.outputs)),
    )


def _adapted(
    call: AdaptedProduct,
    lhs: jax.Array,
    rhs: jax.Array,
    adapter: Adapter,
    adapter_lhs: jax.Array | None,
    adapter_ids: jax.Array | None,
) -> jax.Array:
    """The product of arrays that have been checked."""
    direction, magnitude = split_magnitude(adapter)
    direction = gather_adapter(direction, call.feature_sharding)
    scale = None
    if magnitude is not None:
        scale = column_scale(rhs, adapter, call.axes, call.scheme, after=lhs)
    plain = call.placement == "activation" or (
        call.placement == "auto" and call.scheme.prefers_activations
    )
    # The gradient rule is of real inputs.
    plain = plain or not jnp.issubdtype(lhs.dtype, jnp.floating)
    if plain or adapter_lhs is not None or adapter_ids is not None:
        inputs = lhs if adapter_lhs is None else adapter_lhs
        y = call.in_activations(lhs, inputs, rhs, direction, adapter_ids)
        return call.scale_columns(y, scale)
    lhs, rhs, direction, scale = vary_alike((lhs, rhs, direction, scale))
    # Not the kernel: a scan whose kernels are constants would keep a copy of what is marked.
    lhs, direction = reverse_only((lhs, direction))
    return adapted_product(lhs, rhs, direction, scale, call)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """The inputs with a part of them zero and the rest scaled up, so that the mean stays."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    dropped = jnp.where(keep, x / (1 - rate), 0)
    return dropped.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else dropped
