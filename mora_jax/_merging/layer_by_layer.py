"""Adapted kernels beside their deltas, a layer at a time: changed, or summed up.

Deltas, float32 sums and random bits take 4 bytes a number, more than a bfloat16 kernel. So stacks
go one layer at a time, in place, and so do the kernels of a model where their bits take memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax._arrays.mesh import may_be_sharded, platform
from mora_jax._arrays.paths import path_seed
from mora_jax._arrays.rounding import as_bits, is_narrow, random_bits
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._product.dora import kernel_delta
from mora_jax._schemes.base import Adapter

#: Of (kernel, its delta, random bits or None).
OfLayer = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


def adapter_of(leaves: Mapping[str, Any], plan: Plan, path: str) -> dict[str, jax.Array]:
    """Name -> leaf of one layer's adapter."""
    return {name: leaves[leaf] for name, leaf in plan.leaf_paths(path).items()}


def layer_key(key: jax.Array | None, kernel_path: str) -> jax.Array | None:
    """A layer's own key, by its path's checksum: its bits do not depend on other layers."""
    return None if key is None else jax.random.fold_in(_threefry(key), path_seed(kernel_path))


def change_kernels(
    leaves: Mapping[str, Any], plan: Plan, change: OfLayer, key: jax.Array | None
) -> dict[str, jax.Array]:
    """Path -> changed kernel, for every layer of the plan.

    Args:
      leaves: arrays by path.
      plan: the plan.
      change: gives a kernel like the one that it takes.
      key: where random bits come from, for kernels narrower than float32; None: there are none.
    """
    kernels: dict[str, jax.Array] = {}
    for (path, spec), name in zip(plan.items(), plan.kernel_paths(), strict=True):
        adapter, own = adapter_of(leaves, plan, path), layer_key(key, name)
        kernels[name] = _change(leaves[name], adapter, spec, change, own)
        if key is not None and platform() == "cpu" and not may_be_sharded():
            key = _after(kernels[name], key)
    return kernels


def sum_kernel(
    kernel: jax.Array,
    adapter: Mapping[str, jax.Array],
    spec: AdapterSpec,
    measure: OfLayer,
    key: jax.Array | None,
) -> jax.Array:
    """The sum over a kernel's stacked layers of what `measure` says; the key is the layer's own."""
    if not _one_by_one(spec):
        return measure(*_read(kernel, adapter, spec, key))

    def measured(index):
        return measure(*_read(kernel, adapter, spec, key, index))

    like = jax.eval_shape(measured, 0)
    start, count = jnp.zeros(like.shape, like.dtype), kernel.shape[spec.kernel_axes.batch[0]]
    return lax.fori_loop(0, count, lambda index, total: total + measured(index), start)


def _change(kernel, adapter, spec: AdapterSpec, change: OfLayer, key) -> jax.Array:
    if not _one_by_one(spec):
        return change(*_read(kernel, adapter, spec, key))
    axis = spec.kernel_axes.batch[0]

    def change_one(index, kernel):
        part = change(*_read(kernel, adapter, spec, key, index))
        return lax.dynamic_update_slice_in_dim(kernel, part, index, axis)

    return lax.fori_loop(0, kernel.shape[axis], change_one, kernel)


def _one_by_one(spec: AdapterSpec) -> bool:
    # TPUs form the delta before they add it, in float32, and that of a whole stack is larger than
    # its kernels. Not where the stack may lie on several devices: each has its own part there, and
    # sums by tables, which are formed as they are added.
    return bool(spec.kernel_axes.batch) and not may_be_sharded()


def _read(kernel, adapter: Adapter, spec: AdapterSpec, key, index=None):
    """(kernel, delta, bits), whole or of one layer of the stack."""
    axes, adapter = spec.kernel_axes, spec.batch_first(adapter)
    stack: Any = axes.batch[0] if axes.batch else None
    key = key if is_narrow(kernel.dtype) else None
    if index is not None:
        if is_narrow(dtype := kernel.dtype):
            # Cut from integers, for of a bfloat16 stack XLA would make a float32 copy on CPUs.
            part = lax.dynamic_slice_in_dim(as_bits(kernel), index, 1, stack)
            kernel = lax.bitcast_convert_type(part, dtype)
        else:
            kernel = lax.dynamic_slice_in_dim(kernel, index, 1, stack)
        adapter = {k: lax.dynamic_slice_in_dim(leaf, index, 1) for k, leaf in adapter.items()}
        key, stack = None if key is None else jax.random.fold_in(key, index), None
    bits = None if key is None else random_bits(key, kernel.shape, stack)
    return kernel, kernel_delta(kernel, adapter, axes, spec.scheme), bits


def _threefry(key: jax.Array) -> jax.Array:
    """A key of the kind threefry; one of it as it is.

    `jax.vmap` over keys of the kind rbg draws from the first of them alone, and other machines draw
    other bits from it: a merge would depend on the mesh, and an unmerge elsewhere would go wrong.
    """
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    own = jax.random.key(0, impl="threefry2x32")
    for word in jax.random.key_data(key).ravel():
        own = jax.random.fold_in(own, word)
    return own


def _after(kernel: jax.Array, key: jax.Array) -> jax.Array:
    """The same key, known when the kernel is.

    On CPUs random bits are made in a loop that holds them all, and XLA would begin with those of
    every layer; it drops barriers there, but not a sum with zero times a number.
    """
    zero = 0 * kernel[(0,) * kernel.ndim].astype(jnp.float32)
    data = jax.random.key_data(key) + zero.astype(jnp.uint32)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
