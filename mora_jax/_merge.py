"""Merging: the delta is a kernel, so an adapter can be added into its base and taken out again."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from mora_jax._layout import add_delta
from mora_jax._mesh import Places, may_be_sharded, places_of, put
from mora_jax._operators import Adapter
from mora_jax._params import Params, check_adapted, check_base, join
from mora_jax._plan import AdapterSpec, Plan
from mora_jax._tree import flatten, is_adapter, join_path, listing, rebuild
from mora_jax._variables import value_of, with_value


def merge(params: Params, plan: Plan) -> dict[str, Any]:
    """Adds every adapter into its kernel and leaves the adapters out: equation (3).

    Equivalent to PEFT's `merge_and_unload`. One jitted call; sums are made in float32 or better
    and rounded once to the kernel's dtype.

    Args:
      params: parameters with adapters.
      plan: the plan.

    Returns:
      Parameters shaped like the pretrained ones, which the unadapted model takes.

    Raises:
      ValueError: where the plan does not fit the parameters, or where an adapter holds a number
        that is not finite (not checked under a transformation, where values are unknown).

    >>> import flax.linen as nn, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> jax.tree.map(jnp.shape, merge(params, plan))
    {'bias': (6,), 'kernel': (3, 6)}
    """
    leaves = flatten(params)
    check_adapted(plan, leaves)
    check_finite(plan, leaves)
    check_mergeable(plan, leaves)
    base = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    return rebuild(base | _with_merged(leaves, plan), params)


def unmerge(merged: Params, adapters: Params, plan: Plan) -> dict[str, Any]:
    """Takes merged adapters out of their kernels again, and puts them back beside these.

    Args:
      merged: what `merge` returned.
      adapters: a tree that holds the adapters, such as the first part of `split`.
      plan: the plan.

    Returns:
      Parameters with adapters. Kernels differ from those before the merge by the rounding of two
      sums.

    Raises:
      ValueError: where the plan does not fit, or where an adapter is not finite.
    """
    leaves = {path: leaf for path, leaf in flatten(adapters).items() if is_adapter(path)}
    check_base(plan, flatten(merged))
    params = join(merged, rebuild(leaves, adapters))
    leaves = flatten(params)
    check_adapted(plan, leaves)
    check_finite(plan, leaves)
    check_mergeable(plan, leaves)
    return rebuild(leaves | _with_merged(leaves, plan, sign=-1), params)


def _with_merged(leaves: Mapping[str, Any], plan: Plan, sign: int = 1) -> dict[str, Any]:
    values = {path: value_of(leaf) for path, leaf in leaves.items()}
    merged = _merge_jitted(values, plan, places_of(values), sign)
    return {path: with_value(leaves[path], kernel) for path, kernel in merged.items()}


def merged_kernels(leaves: Mapping[str, Any], plan: Plan, sign: int = 1) -> dict[str, jax.Array]:
    """Path -> kernel plus (or minus) delta, for every layer of the plan."""
    kernels = {}
    for path, spec in plan.items():
        kernel = join_path(path, spec.kernel_name)
        adapter = {name: leaves[leaf] for name, leaf in plan.leaf_paths(path).items()}
        kernels[kernel] = _add(leaves[kernel], spec, spec.batch_first(adapter), sign)
    return kernels


def _add(kernel: jax.Array, spec: AdapterSpec, adapter: Adapter, sign: int) -> jax.Array:
    """The kernel plus (or minus) delta; adapter leaves are [B..., rows, columns]."""
    axes = spec.kernel_axes

    def add(kernel, adapter):
        return add_delta(kernel, sign * axes.delta(adapter, kernel.shape, spec.scheme))

    if not axes.batch or may_be_sharded():
        return add(kernel, adapter)

    # A stack one layer at a time, in place: TPUs form the delta before they add it, in float32,
    # and that of a whole stack is larger than its kernels. Not where the stack may lie on several
    # devices: each has its own part there, and sums by tables, which are formed as they are added.
    def add_one(index, kernel):
        part = lax.dynamic_slice_in_dim(kernel, index, 1, axes.batch[0])
        one = {k: lax.dynamic_slice_in_dim(leaf, index, 1) for k, leaf in adapter.items()}
        return lax.dynamic_update_slice_in_dim(kernel, add(part, one), index, axes.batch[0])

    return lax.fori_loop(0, kernel.shape[axes.batch[0]], add_one, kernel)


def check_finite(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError naming every layer whose adapter holds a number that is not finite."""
    adapters = {path: value_of(leaves[path]) for path in plan.adapter_leaves()}
    if any(isinstance(leaf, Tracer) for leaf in adapters.values()):
        return
    bad = [path for path, finite in jax.device_get(_all_finite(adapters)).items() if not finite]
    if bad:
        raise ValueError(
            f"not merged: adapters hold numbers that are not finite: {listing(bad)}. "
            "The parameters are as they were; training has probably diverged."
        )


def check_mergeable(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError where a delta cannot be added to what a layer has for a kernel."""
    for path in plan.kernel_paths():
        if why := why_unmergeable(leaves[path], plan, leaves):
            raise ValueError(f"not merged: {why}")


@functools.singledispatch
def why_unmergeable(kernel: Any, plan: Plan, leaves: Mapping[str, Any]) -> str:
    """Why nothing can be added to a kernel of this type; a door registers types of its own."""
    del kernel, plan, leaves
    return ""


@functools.partial(jax.jit, static_argnames=("plan", "places", "sign"))
def _merge_jitted(leaves: dict[str, jax.Array], plan: Plan, places: Places, sign: int = 1):
    return put(merged_kernels(leaves, plan, sign), places)


@jax.jit
def _all_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(leaf).all() for path, leaf in leaves.items()}
