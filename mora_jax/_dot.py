"""The product of inputs and an adapted kernel, and its gradient: the engine of the library.

The delta can be added in two places, and the choice decides speed, memory and communication:

- in the *kernel*, `x @ (W + delta_kernel(M))`: one product, a pass over `W`. The sum is made in
  float32 or better and cast back once, as a merge would do.
- in the *activations*, `x @ W + delta(x)`: the paper's form. Right for few rows.

Left to automatic differentiation the kernel form would form the gradient of the whole kernel, and
either form would get transposes that compilers run slowly. So the product has a gradient rule of
its own: `dM` from the compressed `x` and `dy`, and `dx` from whichever form is cheaper, which need
not be the forward's; the kernel's sum is then made again rather than kept. A rule of one's own has
no forward mode, so `placement="activation"` does without.

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

from mora_jax._config import Placement
from mora_jax._examples import Examples, delta_by_example
from mora_jax._layout import DotDimensionNumbers, KernelAxes, add_delta, kernel_axes
from mora_jax._magnitude import apart, column_scale, scaled
from mora_jax._mesh import (
    UNKNOWN,
    Spread,
    axes_of,
    explicit_mesh,
    in_auto_axes,
    may_be_sharded,
    shards_of,
    split_over,
    spread_is,
    vary_alike,
)
from mora_jax._operators import (
    Adapter,
    adapter_gradient,
    check_adapter,
    delta,
    delta_transpose,
    to_compressed,
)
from mora_jax._placement import Parts, best_places
from mora_jax._schemes import LowRank, Scheme


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
    spread: Spread = UNKNOWN,
    keep_sum: bool = False,
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
        `LowRank`. The backward pass of "kernel" and "auto" takes the cheaper one. "activation" (and
        "auto" of `LowRank`) is differentiated by JAX alone, in forward mode as well.
      precision: as for `jax.lax.dot_general`, for the base product.
      preferred_element_type: as for `jax.lax.dot_general`, for the base product.
      adapter_lhs: inputs of the adapter alone, where they differ from `lhs` (dropout); the delta is
        then in the activations whatever `placement` says.
      adapter_ids: [E] int: an adapter for each example, -1 for none. Leaves of `adapter` then have
        an axis of adapters, [B..., adapters, rows, columns], the first axis of `lhs` is one of E
        examples, and the delta is in the activations whatever `placement` says.
      frozen: take the kernel as a constant: its gradient is zero, and never formed. Unlike with
        `jax.lax.stop_gradient`, a scan over stacked kernels keeps no copy of them.
      spread: mesh axes over which inputs and outputs are split by their features, as in tensor
        parallelism, and those of the rows: a tuple of names for each, empty where they are whole on
        every device, None where it is not known; compressing is then dearer, and "auto" counts the
        rows of all devices. `AxisType.Explicit` axes tell.
      keep_sum: keep the sum of kernel and delta for the backward pass, where both passes have one,
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
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    call = _Call.of(
        lhs, rhs, dimension_numbers, scheme, product,
        frozen=frozen, spread=spread, keep_sum=keep_sum, **options,
    )  # fmt: skip
    if not jnp.issubdtype(rhs.dtype, jnp.floating):
        raise TypeError(f"the kernel must be floating to take a delta, got {rhs.dtype}.")
    batch, in_features, out_features = call.axes.sizes(rhs.shape)
    # Where examples have adapters of their own, an axis of adapters follows.
    end = -2 if adapter_ids is None else -3
    if bad := {name: a.shape for name, a in adapter.items() if a.shape[:end] != batch}:
        raise ValueError(f"adapter leaves must lead with the batch axes {batch}, got {bad}.")
    if adapter_ids is not None:
        Examples(adapter_ids, "").check(lhs.shape, dimension_numbers)
    one = {name: jax.ShapeDtypeStruct(a.shape[-2:], a.dtype) for name, a in adapter.items()}
    direction, magnitude = apart(one)
    check_adapter(direction, in_features, out_features, scheme)
    if magnitude is not None:
        if magnitude.shape != (1, out_features):
            raise ValueError(
                f"the magnitude must have shape {(1, out_features)}, got {magnitude.shape}."
            )
        if adapter_ids is not None:
            raise ValueError(
                "adapter_ids: DoRA takes the norm of a kernel and its delta, another pass over the "
                "kernel for every example; select one adapter for all of them."
            )
    if (mesh := explicit_mesh(lhs, rhs)) is not None:
        # Its shardings are those of the base product, or what JAX says of that is raised.
        result = jax.eval_shape(call.product, lhs, rhs)
        outputs = range(result.ndim - len(call.axes.outputs), result.ndim)
        inputs = call.dimension_numbers[0][0]
        names = jax.typeof(lhs).sharding.spec
        rows = (axis for axis in call.lhs_free if names[axis] is not None)
        spread = Spread(
            split_over(names, inputs, lhs.shape),
            split_over(result.sharding.spec, outputs, result.shape),
            sum((split_over(names, [axis], lhs.shape) or () for axis in rows), ()),
            axes_of(jax.typeof(rhs).sharding.spec, (*call.axes.inputs, *call.axes.outputs)),
        )
        again = functools.partial(
            mora_dot_general,
            dimension_numbers=dimension_numbers,
            scheme=scheme,
            placement=placement,
            frozen=frozen,
            keep_sum=keep_sum,
            spread=spread,
            dot_general=dot_general,
            **options,
        )

        def run(lhs, rhs, adapter, adapter_lhs, ids):
            return again(lhs, rhs, adapter=adapter, adapter_lhs=adapter_lhs, adapter_ids=ids)

        arrays = (lhs, rhs, dict(adapter), adapter_lhs, adapter_ids)
        return in_auto_axes(run, mesh, result.sharding, *arrays)
    direction, magnitude = apart(adapter)
    plain = placement == "activation" or (placement == "auto" and isinstance(scheme, LowRank))
    if plain or adapter_lhs is not None or adapter_ids is not None:
        inputs = lhs if adapter_lhs is None else adapter_lhs
        y = call.in_activations(lhs, inputs, rhs, direction, adapter_ids)
    else:
        varied = vary_alike((lhs, rhs, direction))
        y = _dot(*varied, dataclasses.replace(call, placement=placement))
    if magnitude is None:
        return y
    scale = column_scale(rhs, adapter, call.axes, scheme, after=lhs)
    return scaled(y, call.to_outputs(scale))


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """The inputs with a part of them zero and the rest scaled up, so that the mean stays."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Call:
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
    keep_sum: bool
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

    def kernel(self, rhs, adapter):
        return add_delta(rhs, self.axes.delta(adapter, rhs.shape, self.scheme))

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def frozen_product(lhs, rhs, call):
    """The base product with a constant kernel; known by this name where it is traced again."""
    return call.product(lhs, rhs)


@frozen_product.defjvp
def _jvp_of_frozen(call, primals, tangents):
    (lhs, rhs), (dlhs, _) = primals, tangents
    return call.product(lhs, rhs), call.product(dlhs, rhs)


def _value(lhs, rhs, adapter, call):
    return _value_and_sum(lhs, rhs, adapter, call)[0]


def _value_and_sum(lhs, rhs, adapter, call):
    """The product, the adapter as its sum has it, and the sum, None where there is none."""
    forward, _ = call.places(lhs, rhs, adapter)
    if forward == "activation":
        return call.in_activations(lhs, lhs, rhs, adapter), adapter, None
    # The barrier holds the sum back until the inputs are there. It needs the weights alone, so a
    # scheduler would make those of all layers first, a second copy of the model. The kernel does
    # not pass it: a scan would keep what comes out, a copy of the whole stack. On several devices
    # the gathering of a sum is to begin before its layer does.
    if not may_be_sharded():
        lhs, adapter = lax.optimization_barrier((lhs, adapter))
    total = call.kernel(rhs, adapter)
    return call.product(lhs, total), adapter, total


_dot = jax.custom_vjp(_value, nondiff_argnums=(3,))


def _dot_forward(lhs, rhs, adapter, call):
    lhs, rhs_trained, rhs = lhs.value, rhs.perturbed and not call.frozen, rhs.value
    adapter = jax.tree.map(lambda leaf: leaf.value, adapter, is_leaf=_is_primal)
    # Not `_dot`: this function is differentiated too, where someone asks for second derivatives.
    y, adapter, total = _value_and_sum(lhs, rhs, adapter, call)

    def compressed(x, adapter):
        with spread_is(call.spread):
            return to_compressed(x, adapter, call.scheme)

    rows = call.rows(lhs)
    z = jax.eval_shape(call.per_batch(compressed), rows, adapter)
    # What is kept for the gradient is the smaller of x and f_comp(x), and x where W asks for it.
    keeps_inputs = rhs_trained or z.size >= rows.size
    kept = lhs if keeps_inputs else call.per_batch(compressed)(rows, adapter)
    total = total if call.keep_sum and call.places(lhs, rhs, adapter)[1] == "kernel" else None
    static = _Static((keeps_inputs, rhs_trained, jax.typeof(lhs)))
    return y, (kept, rhs, adapter, total, static)


def _dot_backward(call, residuals, dy):
    kept, rhs, adapter, total, static = residuals
    keeps_inputs, rhs_trained, inputs = static.value
    batch, in_features, out_features = call.axes.sizes(rhs.shape)
    if call.frozen:
        rhs, total = lax.stop_gradient((rhs, total))  # of second derivatives
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)  # pyright: ignore
    # Without the barrier XLA may compute dy anew inside the sum over its groups: with rolled groups
    # behind a rotary embedding that took ten milliseconds. And it takes the kernel's sum for the
    # forward's and keeps it alive between the two, a second copy of every adapted kernel. (On
    # several devices, see the forward pass.)
    if may_be_sharded():
        dy = lax.optimization_barrier(dy)
    else:
        dy, rhs, adapter = lax.optimization_barrier((dy, rhs, adapter))
    dy_rows = dy.reshape(*batch, -1, out_features)

    def input_gradient(dy, kernel):
        def product(lhs):
            return call.product(lhs, kernel)

        if call.is_plain:
            return jax.linear_transpose(product, inputs)(dy)[0]
        return jax.vjp(product, jnp.zeros(inputs.shape, inputs.dtype))[1](dy)[0]

    def gradient(z, dy, adapter):
        with spread_is(call.spread):
            if keeps_inputs:
                z = to_compressed(z, adapter, call.scheme)
            return adapter_gradient(z, dy, adapter, in_features, call.scheme)

    _, backward = call.places(inputs, rhs, adapter)
    if backward == "activation":

        def delta_gradient(dy, adapter):
            with spread_is(call.spread):
                return delta_transpose(dy, adapter, in_features, call.scheme)

        extra = call.from_rows(call.per_batch(delta_gradient)(dy_rows, adapter), inputs.shape)
        dlhs = input_gradient(dy, rhs) + extra.astype(inputs.dtype)
    else:
        dlhs = input_gradient(dy, call.kernel(rhs, adapter) if total is None else total)
    drhs = None
    if rhs_trained:
        total, total_transpose = jax.vjp(lambda rhs: call.kernel(rhs, adapter), rhs)
        _, kernel_transpose = jax.vjp(lambda total: call.product(kept, total), total)
        (drhs,) = total_transpose(*kernel_transpose(dy))
    z = call.rows(kept) if keeps_inputs else kept
    return dlhs, drhs, call.per_batch(gradient)(z, dy_rows, adapter)


_dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """Carries static values among the residuals of a gradient."""

    value: Any


def _is_primal(leaf) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
