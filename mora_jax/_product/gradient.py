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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mora_jax._arrays.mesh import may_be_sharded
from mora_jax._product.call import AdaptedProduct
from mora_jax._schemes.base import Adapter

#: (dlhs, drhs, dadapter, dscale); None for what is not trained.
Gradients = tuple[jax.Array, jax.Array | None, dict[str, jax.Array], jax.Array | None]


def _value(
    lhs: jax.Array,
    rhs: jax.Array,
    adapter: Adapter,
    scale: jax.Array | None,
    call: AdaptedProduct,
) -> jax.Array:
    return _value_and_sum(lhs, rhs, adapter, scale, call)[0]


def _value_and_sum(
    lhs: jax.Array,
    rhs: jax.Array,
    adapter: Adapter,
    scale: jax.Array | None,
    call: AdaptedProduct,
) -> tuple[jax.Array, Adapter, jax.Array | None]:
    """The product, the adapter as its sum has it, and the sum, None where there is none."""
    forward, _ = call.placements(lhs, rhs, adapter)
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


#: (lhs, rhs, adapter, scale, call) -> the product, with the delta where `call.placement` says.
adapted_product = jax.custom_vjp(_value, nondiff_argnums=(4,))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """What the backward pass must know that is no array.

    Attributes:
      keeps_inputs: whether all inputs are kept, and not what a scheme needs of them.
      rhs_trained: whether the kernel has a gradient.
      inputs: shape, dtype and sharding of the inputs.
    """

    keeps_inputs: bool
    rhs_trained: bool
    inputs: Any


class _Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass.

    Attributes:
      kept: the inputs, or what the scheme's gradient needs of them.
      rhs: the kernel.
      adapter: leaves [B..., rows, columns].
      scale: DoRA's, or None.
      y: the results, where the scale is trained.
      total: the sum of kernel and delta, where it is kept.
      static: the rest.
    """

    kept: jax.Array
    rhs: jax.Array
    adapter: Adapter
    scale: jax.Array | None
    y: jax.Array | None
    total: jax.Array | None
    static: _Static


def _forward(
    lhs: Any, rhs: Any, adapter: Any, scale: Any, call: AdaptedProduct
) -> tuple[jax.Array, _Residuals]:
    lhs, rhs_trained, rhs = lhs.value, rhs.perturbed and not call.frozen, rhs.value
    scale_trained = scale is not None and scale.perturbed
    adapter, scale = jax.tree.map(lambda leaf: leaf.value, (adapter, scale), is_leaf=_is_primal)
    # Not `adapted_product`: this function is differentiated too, where someone asks for second
    # derivatives.
    y, adapter, total = _value_and_sum(lhs, rhs, adapter, scale, call)
    rows, residual = call.rows(lhs), _residual(call, rhs)
    z = jax.eval_shape(residual, rows, adapter)
    # What is kept for the gradient is the smaller of x and f_comp(x), and x where W asks for it.
    keeps_inputs = rhs_trained or z.size >= rows.size
    kept = lhs if keeps_inputs else residual(rows, adapter)
    total = total if call.keep_sums and call.placements(lhs, rhs, adapter)[1] == "kernel" else None
    static = _Static(keeps_inputs, rhs_trained, jax.typeof(lhs))
    return y, _Residuals(kept, rhs, adapter, scale, y if scale_trained else None, total, static)


def _residual(call: AdaptedProduct, rhs: jax.Array) -> Any:
    """(rows [B..., T, I], adapter) -> what the scheme's gradient needs of the rows."""
    _, _, out_features = call.axes.sizes(rhs.shape)

    def one(x: jax.Array, adapter: Adapter) -> jax.Array:
        return call.scheme.gradient_residual(x, adapter, out_features)

    return call.per_batch(one)


def _backward(call: AdaptedProduct, residuals: _Residuals, dy: Any) -> Gradients:
    kept, rhs, adapter, scale, y, total, static = residuals
    batch, _, out_features = call.axes.sizes(rhs.shape)
    if call.frozen:
        rhs = lax.stop_gradient(rhs)  # of second derivatives
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)  # pyright: ignore[reportArgumentType]
    dy, rhs, adapter = _held_back(dy, rhs, adapter)
    dy_unscaled = call.scale_columns(dy, scale)  # by the product before it was scaled
    dy_rows = dy_unscaled.reshape(*batch, -1, out_features)
    _, backward = call.placements(static.inputs, rhs, adapter)
    if backward == "activation":
        dlhs = _input_gradient(call, dy_unscaled, rhs, static.inputs)
        dlhs = dlhs + _delta_gradient(call, dy_rows, rhs, adapter, static.inputs)
    else:
        kernel = call.kernel(rhs, adapter, scale) if total is None else total
        dlhs = _input_gradient(call, dy, kernel, static.inputs)
    drhs = _kernel_gradient(call, kept, rhs, adapter, scale, dy) if static.rhs_trained else None
    dscale = None if y is None or scale is None else call.scale_gradient(y, dy, scale)
    dadapter = _adapter_gradient(call, kept, dy_rows, rhs, adapter, static.keeps_inputs)
    return dlhs, drhs, dadapter, dscale


def _held_back(
    dy: jax.Array, rhs: jax.Array, adapter: Adapter
) -> tuple[jax.Array, jax.Array, Adapter]:
    """The same arrays, none of which the backward pass uses before all are there.

    Without the barrier XLA may compute dy anew inside the sum over its groups: with rolled groups
    behind a rotary embedding that took ten milliseconds. And it takes the kernel's sum for the
    forward's and keeps it alive between the two, a second copy of every adapted kernel. On several
    devices dy alone is held, as in the forward pass.
    """
    if may_be_sharded():
        return lax.optimization_barrier(dy), rhs, adapter
    return lax.optimization_barrier((dy, rhs, adapter))


def _input_gradient(
    call: AdaptedProduct, dy: jax.Array, kernel: jax.Array, inputs: Any
) -> jax.Array:
    """The gradient of the base product by its inputs."""

    def product(lhs: jax.Array) -> jax.Array:
        return call.product(lhs, kernel)

    if call.is_plain:
        return jax.linear_transpose(product, inputs)(dy)[0]
    return jax.vjp(product, jnp.zeros(inputs.shape, inputs.dtype))[1](dy)[0]


def _delta_gradient(
    call: AdaptedProduct, dy: jax.Array, rhs: jax.Array, adapter: Adapter, inputs: Any
) -> jax.Array:
    """The gradient of the delta by the inputs, from dy [B..., T, O]."""
    _, in_features, _ = call.axes.sizes(rhs.shape)

    def one(dy: jax.Array, adapter: Adapter) -> jax.Array:
        return call.scheme.delta_transpose(dy, adapter, in_features)

    rows = call.per_batch(one)(dy, adapter)
    return call.from_rows(rows, inputs.shape).astype(inputs.dtype)


def _adapter_gradient(
    call: AdaptedProduct,
    kept: jax.Array,
    dy: jax.Array,
    rhs: jax.Array,
    adapter: Adapter,
    keeps_inputs: bool,
) -> dict[str, jax.Array]:
    """The gradient by the adapter, from what was kept and dy [B..., T, O]."""
    _, in_features, out_features = call.axes.sizes(rhs.shape)

    def one(z: jax.Array, dy: jax.Array, adapter: Adapter) -> dict[str, jax.Array]:
        if keeps_inputs:
            z = call.scheme.gradient_residual(z, adapter, out_features)
        return call.scheme.gradient(z, dy, adapter, in_features)

    return call.per_batch(one)(call.rows(kept) if keeps_inputs else kept, dy, adapter)


def _kernel_gradient(
    call: AdaptedProduct,
    lhs: jax.Array,
    rhs: jax.Array,
    adapter: Adapter,
    scale: jax.Array | None,
    dy: jax.Array,
) -> jax.Array:
    """The gradient by a kernel that is trained in full beside its adapter."""
    total, total_transpose = jax.vjp(lambda rhs: call.kernel(rhs, adapter, scale), rhs)
    _, kernel_transpose = jax.vjp(lambda total: call.product(lhs, total), total)
    return total_transpose(*kernel_transpose(dy))[0]


adapted_product.defvjp(_forward, _backward, symbolic_zeros=True)


def reverse_only(tree: Any) -> Any:
    """The same arrays; differentiating them in forward mode is refused with what to do instead.

    JAX refuses it too, of any function with a gradient rule, but cannot say what helps here.
    """
    return jax.tree.map(_REVERSE_ONLY.bind, tree)


def _refuse_forward_mode(*_: Any, **__: Any) -> Any:
    raise TypeError(
        "forward-mode differentiation (jax.jvp, jacfwd, linearize) does not "
        "go through an adapter whose placement is 'kernel' or 'auto': its product has a gradient "
        "rule, for reverse mode alone. Adapt the model with MoRAConfig(placement='activation'), "
        "which JAX differentiates in both modes; the parameters stay the same."
    )


def _jvp_of_reverse_only(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    # The arrays themselves, so that what is differentiated twice is marked once.
    return x, dx if isinstance(dx, ad.Zero) else _REVERSE_ONLY_TANGENT.bind(dx)


#: The identity. Of its tangent all that reverse mode asks for is the transpose, which leaves no
#: trace in a program; whoever computes it goes forward.
_REVERSE_ONLY = Primitive("mora_reverse_only")
_REVERSE_ONLY.def_impl(lambda x: x)
mlir.register_lowering(_REVERSE_ONLY, lambda _, x: [x])
_REVERSE_ONLY.def_abstract_eval(lambda x: x)
ad.primitive_jvps[_REVERSE_ONLY] = _jvp_of_reverse_only
batching.defvectorized(_REVERSE_ONLY)

_REVERSE_ONLY_TANGENT = Primitive("mora_reverse_only_tangent")
_REVERSE_ONLY_TANGENT.def_impl(_refuse_forward_mode)
mlir.register_lowering(_REVERSE_ONLY_TANGENT, _refuse_forward_mode)
_REVERSE_ONLY_TANGENT.def_abstract_eval(lambda x: x)
ad.deflinear(_REVERSE_ONLY_TANGENT, lambda cotangent: [cotangent])
# Reverse mode batches arrays and gradients, but never tangents.
batching.primitive_batchers[_REVERSE_ONLY_TANGENT] = _refuse_forward_mode


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
