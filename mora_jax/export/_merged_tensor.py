"""Merging one tensor at a time, for what writes a model and cannot hold a second one.

A stack of layers is merged layer by layer, by `merge`'s own arithmetic; whatever the parameters
are on, one tensor at a time comes to the host, laid out as in PyTorch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.mesh import explicit_mesh, in_auto_axes
from mora_jax._arrays.paths import join_path
from mora_jax._arrays.places import on_host
from mora_jax._merging.merge import merged_kernels
from mora_jax._params.checks import not_finite_after
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._product.axes import KernelAxes
from mora_jax._torch.tensors import TorchTensor


def merged_tensor(tensor: TorchTensor, leaves: Mapping[str, Any], plan: Plan) -> np.ndarray:
    """One tensor of the merged model, as PyTorch has it.

    Args:
      tensor: which.
      leaves: path -> parameter, adapters included.
      plan: the plan.

    Returns:
      `tensor.torch_shape`, in the parameter's dtype.

    Raises:
      ValueError: where the names and the plan see different stacks in a kernel; where the merged
        tensor is not finite.
    """
    kernel = unbox(leaves[tensor.path])
    layers = (path for path, s in plan.items() if join_path(path, s.kernel_name) == tensor.path)
    layer, place = next(layers, None), dict(zip(tensor.axes.batch, tensor.index, strict=True))
    part = _take(kernel, place)
    if layer is None:
        return on_host(part).transpose(tensor.order).reshape(tensor.torch_shape)
    spec = plan[layer]
    if set(spec.kernel_axes.batch) != set(place):
        raise ValueError(
            f"names read {tensor.path!r} as {tensor.axes}, the plan as {spec.kernel_axes}: the "
            "axes of stacked layers differ."
        )
    batch = zip(spec.adapter_batch_axes, spec.kernel_axes.batch, strict=True)
    own = {axis: place[of_kernel] for axis, of_kernel in batch}
    adapter = {
        name: _take(unbox(leaves[leaf]), own) for name, leaf in plan.leaf_paths(layer).items()
    }
    merged = on_host(_merge(part, adapter, _without_batch(spec), tensor.order))
    if not np.isfinite(merged).all():
        raise not_finite_after({tensor.path: part}, "written")
    return merged.reshape(tensor.torch_shape)


def _take(leaf: Any, place: Mapping[int, int]) -> Any:
    """The part of an array at these indices of these axes, which it loses."""
    if not place:
        return leaf
    if isinstance(leaf, np.ndarray):  # of the host, perhaps of a file: it need not move as a whole
        return leaf[tuple(place.get(axis, slice(None)) for axis in range(leaf.ndim))]
    return _take_jitted(leaf, list(place.values()), tuple(place))


@functools.partial(jax.jit, static_argnames="axes")
def _take_jitted(leaf: jax.Array, index: list[int], axes: tuple[int, ...]) -> jax.Array:
    def take(leaf, index):
        for axis, at in sorted(zip(axes, index, strict=True), key=lambda pair: -pair[0]):
            leaf = lax.dynamic_index_in_dim(leaf, at, axis, keepdims=False)
        return leaf

    if (mesh := explicit_mesh(leaf)) is None:
        return take(leaf, index)
    # A stack may be split along the very axis: that sends something, which explicit axes forbid.
    spec = jax.typeof(leaf).sharding.spec
    left = PartitionSpec(*(spec[axis] for axis in range(leaf.ndim) if axis not in axes))
    return in_auto_axes(take, mesh, NamedSharding(mesh, left), leaf, index)


@functools.partial(jax.jit, static_argnames=("spec", "order"))
def _merge(kernel: jax.Array, adapter: dict, spec: AdapterSpec, order: tuple[int, ...]):
    """The kernel plus its delta, transposed; static arguments are alike for layers of one kind."""
    plan = Plan((("layer", spec),))
    leaves = {path: adapter[name] for name, path in plan.leaf_paths("layer").items()}
    (path,) = plan.kernel_paths()
    return merged_kernels({path: kernel, **leaves}, plan)[path].transpose(order)


def _without_batch(spec: AdapterSpec) -> AdapterSpec:
    """The layer as one of its stack is by itself."""
    batch, axes = spec.kernel_axes.batch, spec.kernel_axes
    left = [axis for axis in range(len(spec.kernel_shape)) if axis not in batch]
    return dataclasses.replace(
        spec,
        kernel_shape=tuple(spec.kernel_shape[axis] for axis in left),
        kernel_axes=KernelAxes(
            tuple(map(left.index, axes.inputs)), tuple(map(left.index, axes.outputs))
        ),
        adapter_batch_axes=(),
    )
