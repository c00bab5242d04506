"""The gradient rule of an adapted product.

Left to automatic differentiation the kernel form would form the gradient of the whole kernel, and
either form would get transposes that compilers run slowly. So the product has a gradient rule of
its own: `dM` from the compressed `x` and `dy`, and `dx` from whichever form is cheaper, which need
not be the forward's; the kernel's sum is then made again rather than kept. DoRA's scale has its
gradient from the results, which are kept for it alone. A rule of one's own has no forward mode.

Shape letters: I input features, O output features, B batch axes, T rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax._arrays.mesh import may_be_sharded, spread_is
from mora_jax._schemes.operators import adapter_gradient, delta_transpose, to_compressed


def _value(lhs, rhs, adapter, scale, call):
    return _value_and_sum(lhs, rhs, adapter, scale, call)[0]


def _value_and_sum(lhs, rhs, adapter, scale, call):
    """The product, the adapter as its sum has it, and the sum, None where there is none."""
    forward, _ = call.places(lhs, rhs, adapter)
    if forward == "activation":
        y = call.in_activations(lhs, lhs, rhs, adapter)
        return call.scale_columns(y, scale), adapter, None
    # The barrier holds the sum back until the inputs are there. It needs the weights alone, so a
    # scheduler would make those of all layers first, a second copy of the model. The kernel does
    # not pass it: a scan would keep what comes out, a copy of the whole stack. On several devices
    # the gathering of a sum is to begin before its layer does.
    if not may_be_sharded():
        lhs, adapter = lax.optimization_barrier((lhs, adapter))
    total = call.kernel(rhs, adapter, scale)
    return call.product(lhs, total), adapter, total


#: (lhs, rhs, adapter, scale, call) -> the product, with the delta where `call.placement` says. The
#: scale is DoRA's, of the kernel's columns and laid out like it, or None.
adapted_product = jax.custom_vjp(_value, nondiff_argnums=(4,))


def _forward(lhs, rhs, adapter, scale, call):
    lhs, rhs_trained, rhs = lhs.value, rhs.perturbed and not call.frozen, rhs.value
    scale_trained = scale is not None and scale.perturbed
    adapter, scale = jax.tree.map(lambda leaf: leaf.value, (adapter, scale), is_leaf=_is_primal)
    # Not `adapted_product`: this function is differentiated too, where someone asks for second
    # derivatives.
    y, adapter, total = _value_and_sum(lhs, rhs, adapter, scale, call)

    def compressed(x, adapter):
        with spread_is(call.spread):
            return to_compressed(x, adapter, call.scheme)

    rows = call.rows(lhs)
    z = jax.eval_shape(call.per_batch(compressed), rows, adapter)
    # What is kept for the gradient is the smaller of x and f_comp(x), and x where W asks for it.
    keeps_inputs = rhs_trained or z.size >= rows.size
    kept = lhs if keeps_inputs else call.per_batch(compressed)(rows, adapter)
    total = total if call.keep_sums and call.places(lhs, rhs, adapter)[1] == "kernel" else None
    static = _Static((keeps_inputs, rhs_trained, jax.typeof(lhs)))
    return y, (kept, rhs, adapter, scale, y if scale_trained else None, total, static)


def _backward(call, residuals, dy):
    kept, rhs, adapter, scale, y, total, static = residuals
    keeps_inputs, rhs_trained, inputs = static.value
    batch, in_features, out_features = call.axes.sizes(rhs.shape)
    if call.frozen:
        rhs = lax.stop_gradient(rhs)  # of second derivatives
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
    dy_unscaled = call.scale_columns(dy, scale)  # by the product before it was scaled
    dy_rows = dy_unscaled.reshape(*batch, -1, out_features)

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
        dlhs = input_gradient(dy_unscaled, rhs) + extra.astype(inputs.dtype)
    else:
        dlhs = input_gradient(dy, call.kernel(rhs, adapter, scale) if total is None else total)
    drhs = None
    if rhs_trained:
        total, total_transpose = jax.vjp(lambda rhs: call.kernel(rhs, adapter, scale), rhs)
        _, kernel_transpose = jax.vjp(lambda total: call.product(kept, total), total)
        (drhs,) = total_transpose(*kernel_transpose(dy))
    dscale = None if y is None else call.scale_gradient(y, dy, scale)
    z = call.rows(kept) if keeps_inputs else kept
    return dlhs, drhs, call.per_batch(gradient)(z, dy_rows, adapter), dscale


adapted_product.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """Carries static values among the residuals of a gradient."""

    value: Any


def _is_primal(leaf) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
