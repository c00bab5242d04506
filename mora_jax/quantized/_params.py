"""Quantising a base, running a model on it, and merging adapters into it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import qwix
from jax.core import Tracer

from mora_jax._arrays.boxes import to_array, unbox
from mora_jax._arrays.paths import flatten, is_adapter, join_path, list_paths, unflatten
from mora_jax._merging.losses import MergeLoss
from mora_jax._merging.merge import why_unmergeable
from mora_jax._params.checks import (
    check_adapted,
    check_adapters_finite,
    check_base,
    check_results_finite,
)
from mora_jax._params.split import Params
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._tracing.interpreter import trace
from mora_jax.quantized._kernels import (
    BOUNDS,
    QuantizedView,
    dequantize_kernel,
    is_quantized,
    merge_kernel,
    qtype_of,
    quantize_kernel,
)

P = ParamSpec("P")
T = TypeVar("T")

#: Numbers that one scale is for, along the inputs; None for the whole column.
_TILE_SIZES = {"int8": None, "int4": 64, "nf4": 64}


def quantize(
    params: Params, plan: Plan, qtype: str = "nf4", *, tile_size: int | None = None
) -> dict[str, Any]:
    """Quantises the adapted kernels; adapters and everything else stay as they are.

    One scale for each output (and each element of stacked layers), and along the inputs one for
    each tile: absmax quantisation, as `qwix.PtqProvider` does it. A scale has the kernel's dtype.

    Args:
      params: floating parameters, with adapters or without.
      plan: the plan. Its layers must have the placement "activation".
      qtype: "nf4" (4 bits, NormalFloat, as in QLoRA), "int4" or "int8".
      tile_size: inputs to one scale, a divisor of every adapted layer's (last) input axis. By
        default 64 for 4 bits, and the whole axis for int8.

    Returns:
      Parameters whose adapted kernels are `qwix.QArray`s, for `dequantize_within`. All that takes
      parameters and does not compute with kernels takes these: `attach`, `split`, `join`,
      `mora_jax.checkpoint`.

    Raises:
      ValueError: where the plan does not fit the parameters, a layer has another placement, or is
        to be trained in full, or cannot be tiled; for another `qtype`.
      TypeError: for a kernel that is quantised already, or not floating; for parameters in boxes.

    >>> import flax.linen as nn, jax.numpy as jnp, mora_jax
    >>> config = mora_jax.MoRAConfig(rank=1, scheme="sharing", placement="activation")
    >>> model, x = mora_jax.adapt(nn.Dense(6), config), jnp.ones((1, 3))
    >>> plan = mora_jax.plan(model, x)
    >>> params = quantize(model.init(jax.random.key(0), x)["params"], plan, "int8")
    >>> params["kernel"].qvalue.dtype, params["kernel"].scale.shape
    (dtype('int8'), (1, 6))
    >>> dequantize_within(model.apply)({"params": params}, x).shape
    (1, 6)
    """
    if qtype not in BOUNDS:
        raise ValueError(f"qtype={qtype!r}; there are {', '.join(map(repr, BOUNDS))}.")
    leaves = flatten(params)
    check_base(plan, leaves)
    if boxed := [path for path, leaf in leaves.items() if unbox(leaf) is not leaf]:
        raise TypeError(
            f"{list_paths(boxed)} are in boxes; take them out first, by flax.linen.unbox(params) "
            "or flax.nnx.to_pure_dict(state)."
        )
    if done := [path for path in plan.kernel_paths() if is_quantized(leaves[path])]:
        raise TypeError(f"quantised already: {list_paths(done)}; dequantize(params) undoes it.")
    _check_layers(plan)
    tile_size = tile_size or _TILE_SIZES[qtype]
    _check_tiles(plan, tile_size)
    quantized = {}
    for path, spec in plan.items():
        kernel = join_path(path, spec.kernel_name)
        quantized[kernel] = quantize_kernel(leaves[kernel], qtype, _tiles(spec, tile_size))
    return unflatten(leaves | quantized)


def dequantize(params: Params) -> dict[str, Any]:
    """Parameters with floating arrays in place of all quantised ones.

    For ReMoRA, or to go on without qwix. Under `jax.eval_shape` it gives the shapes that
    `mora_jax.plan` wants of a function's parameters.

    >>> import jax.numpy as jnp
    >>> dequantize({"kernel": qwix.quantize(jnp.asarray([[0.01], [-2.0]]), "nf4")})
    {'kernel': Array([[ 0.], [-2.]], dtype=float32)}
    """
    values = {
        path: dequantize_kernel(leaf) if is_quantized(leaf) else leaf
        for path, leaf in flatten(params).items()
    }
    return unflatten(values)


def dequantize_within(function: Callable[P, T]) -> Callable[P, T]:
    """A function like `function` that takes quantised arrays anywhere in its arguments.

    Each product with one dequantises it for itself, and once more in its backward pass; no product
    with it is differentiated by it. Stacked layers are dequantised one at a time. What is no
    product (a lookup, a convolution) sees the whole array dequantised. Outputs are those of
    `function` on the dequantised arrays, bit for bit where the compiler rounds alike. On the CPU,
    4 bits within a scan are slow to differentiate (int8 is not).

    It takes what an adapted model needs: `model.apply` of linen; an adapted function; for NNX,
    which keeps its parameters itself, a function of them:

        graph, state, rest = nnx.split(model, nnx.Param, ...)
        params = quantized.quantize(nnx.to_pure_dict(state), plan)
        forward = quantized.dequantize_within(
            lambda params, *inputs: nnx.merge(graph, params, rest)(*inputs)
        )

    Args:
      function: a pure function of pytrees. It runs traced, with floating shapes for the quantised
        arrays, so it must not keep what it computes elsewhere.

    Returns:
      The function, to jit and to differentiate as any other.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = jax.tree.leaves((args, kwargs), is_leaf=is_quantized)
        shapes, named = jax.tree.map(_floating_shape, (args, kwargs), is_leaf=is_quantized)
        traced = trace(function, *shapes, **named)
        # The arrays that a trace takes are those leaves that have a shape and a dtype.
        arrays = [leaf for leaf in given if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
        return traced.run(
            [QuantizedView.of(leaf) if is_quantized(leaf) else leaf for leaf in arrays]
        )

    return call


def merge(params: Params, plan: Plan) -> tuple[dict[str, Any], dict[str, MergeLoss]]:
    """Adds every adapter into its quantised kernel, and says what was lost by it.

    The sum of kernel and delta is quantised again, each tile with the scale that it had or with a
    new one, whichever comes closer. So where a delta is zero, no bit changes. Where it is smaller
    than half a step between two levels it is lost, for W lies on a level: see `kept`. One layer is
    floating at a time, and none of this can be traced. To lose nothing,
    `mora_jax.merge(dequantize(params), plan)`.

    Args:
      params: parameters with adapters whose adapted kernels are quantised.
      plan: the plan.

    Returns:
      (merged, losses): parameters that the unadapted model takes, quantised as before; and the loss
      of each layer, by its path.

    Raises:
      ValueError: where the plan does not fit the parameters, an adapter or a merged kernel is not
        finite, or a kernel is quantised otherwise than by `quantize`.
      TypeError: where a kernel is not quantised.

    >>> import flax.linen as nn, jax.numpy as jnp, mora_jax
    >>> config = mora_jax.MoRAConfig(rank=1, scheme="sharing", placement="activation")
    >>> model, x = mora_jax.adapt(nn.Dense(6), config), jnp.ones((1, 3))
    >>> plan = mora_jax.plan(model, x)
    >>> params = quantize(model.init(jax.random.key(0), x)["params"], plan, "int8")
    >>> merge(params, plan)[1]
    {'': MergeLoss(error=0.0, kept=1.0, noise=0.0)}
    """
    leaves = flatten(params)
    check_adapted(plan, leaves)
    check_adapters_finite(plan, leaves, "merged")
    base = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    losses = {}
    for path, spec in plan.items():
        kernel = join_path(path, spec.kernel_name)
        _check_mergeable(kernel, leaves[kernel])
        adapter = {name: leaves[leaf] for name, leaf in plan.leaf_paths(path).items()}
        base[kernel], losses[path] = merge_kernel(leaves[kernel], adapter, spec)
        if not math.isfinite(losses[path].error):
            before = {kernel: dequantize_kernel(leaves[kernel])}
            check_results_finite({kernel: dequantize_kernel(base[kernel])}, before)
    return unflatten(base), losses


@why_unmergeable.register
def _(kernel: qwix.QArray, plan: Plan, leaves: Mapping[str, Any]) -> str:
    """What a floating merge, and ReMoRA, say of a quantised base."""
    text = (
        f"the base is quantised ({qtype_of(kernel)}). Its kernels lie on the levels of that type, "
        "and a sum is rounded to the nearest level: where a delta is smaller than half a step "
        "between two levels, the kernel stays as it was, and what was trained is lost."
    )
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(dict(leaves))):
        losses = merge(unflatten(leaves), plan)[1]
        path, loss = min(losses.items(), key=lambda item: item[1].kept)
        most = max(loss.kept for loss in losses.values())
        text += (
            f" Of the delta of {path!r} {loss.kept:.1%} would be kept, with noise {loss.noise:.2f} "
            f"times as large as the delta; of others up to {most:.1%}."
        )
    return text + (
        " To merge without loss, or to merge and restart, make the base floating first: "
        "params = mora_jax.quantized.dequantize(params). To merge once all the same, and see what "
        "is lost: mora_jax.quantized.merge(params, plan)."
    )


@to_array.register
def _(kernel: qwix.QArray) -> jax.Array:
    """What `spectrum` takes the norm of."""
    return qwix.dequantize(kernel)


def _floating_shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_quantized(leaf) else leaf


def _check_layers(plan: Plan) -> None:
    """Raises ValueError where a layer of the plan cannot have a quantised kernel."""
    if elsewhere := [p for p, spec in plan.items() if spec.config.placement != "activation"]:
        raise ValueError(
            f"a quantised kernel takes no delta into itself, and {list_paths(elsewhere)} may have "
            f'it there. Adapt the model with MoRAConfig(placement="activation").'
        )
    if trained := [path for path in plan.kernel_paths() if plan.trains(path)]:
        raise ValueError(
            f"also_train has {list_paths(trained)}: a quantised kernel cannot be trained."
        )


def _check_tiles(plan: Plan, tile_size: int | None) -> None:
    """Raises ValueError where a layer's inputs are no multiple of the tile size."""
    sizes = {path: spec.kernel_shape[spec.kernel_axes.inputs[-1]] for path, spec in plan.items()}
    if tile_size and (odd := {p: size for p, size in sizes.items() if size % tile_size}):
        common = math.gcd(tile_size, *sizes.values())
        raise ValueError(
            f"tiles of {tile_size} do not fit the inputs of {list_paths(odd)}, such as "
            f"{max(odd.values())}. tile_size={common} would fit all layers; or leave these out "
            "with MoRAConfig.exclude, or take int8, which needs no tiles."
        )


def _tiles(spec: AdapterSpec, tile_size: int | None) -> tuple[int, ...]:
    """How many numbers share a scale, along each axis."""
    inputs, tiles = spec.kernel_axes.inputs, [1] * len(spec.kernel_shape)
    for axis in inputs if tile_size is None else ():
        tiles[axis] = spec.kernel_shape[axis]
    tiles[inputs[-1]] = tile_size or tiles[inputs[-1]]
    return tuple(tiles)


def _check_mergeable(path: str, kernel: Any) -> None:
    if not is_quantized(kernel):
        raise TypeError(f"{path!r} is not quantised; mora_jax.merge takes floating parameters.")
    if qtype_of(kernel) not in BOUNDS or kernel.zero_point is not None:
        raise ValueError(
            f"{path!r} is quantised as {qtype_of(kernel)!r}"
            f"{' with zero points' if kernel.zero_point is not None else ''}; merge takes what "
            f"quantize makes: {', '.join(map(repr, BOUNDS))}, symmetric."
        )
