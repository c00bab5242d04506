"""Merging: the delta is a kernel, so an adapter can be added into its base."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._arrays.boxes import rebox, unbox
from mora_jax._arrays.dtypes import wide_dtype
from mora_jax._arrays.paths import flatten, is_adapter, join_path, unflatten_like
from mora_jax._arrays.places import Places, constrain, places_of
from mora_jax._arrays.rounding import Rounding, check_rounding, is_narrow, rounded
from mora_jax._merging.layer_by_layer import adapter_of, change_kernels, layer_key, sum_kernel
from mora_jax._merging.losses import MergeLoss, as_numbers, loss_of_sums, loss_sums, warn_of_losses
from mora_jax._params.checks import (
    check_adapted,
    check_adapters_finite,
    check_results_finite,
    not_finite_after,
)
from mora_jax._params.split import Params
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan


def merge(
    params: Params, plan: Plan, *, rounding: Rounding = "nearest", key: jax.Array | None = None
) -> dict[str, Any]:
    """Adds every adapter into its kernel and leaves the adapters out: equation (3).

    Equivalent to PEFT's `merge_and_unload`. One jitted call; sums are made in float32 or better
    and rounded once to the kernel's dtype.

    Args:
      params: parameters with adapters.
      plan: the plan.
      rounding: of the sums, where kernels are narrower than float32; others need none. "nearest"
        loses what is less than half a step between two numbers, in bfloat16 up to 1/256 of the
        weight. "stochastic" goes up or down at random, so that the mean over keys is the exact
        sum, and leaves alone what the dtype holds exactly.
      key: a PRNG key, required for "stochastic", another one at every merge. A layer's bits come
        from the key and its path alone: from no other layer, and from no mesh.

    Returns:
      Parameters shaped like the pretrained ones, which the unadapted model takes.

    Raises:
      ValueError: where the plan does not fit the parameters; where an adapter holds a number
        that is not finite, or a merged kernel would, because the sum leaves the range of its
        dtype (not checked under a transformation, where values are unknown); where a key is
        missing.

    Warns:
      MergeWarning: where rounding to the nearest number loses more than half of a layer's update,
        see `merge_losses` (not under a transformation).

    >>> import flax.linen as nn, jax.numpy as jnp, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> jax.tree.map(jnp.shape, merge(params, plan))
    {'bias': (6,), 'kernel': (3, 6)}
    """
    check_rounding(rounding, key)
    leaves = flatten(params)
    check_merge(plan, leaves)
    values = {path: unbox(leaf) for path, leaf in leaves.items()}
    if rounding == "nearest":
        key = None
        if not any(isinstance(value, Tracer) for value in values.values()):
            warn_of_losses(losses_of(values, plan, key), stacklevel=2)
    merged = _merge_jitted(values, plan, places_of(values), key)
    check_results_finite(merged, values)
    base = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    merged = {path: rebox(leaves[path], kernel) for path, kernel in merged.items()}
    return unflatten_like(base | merged, params)


def merge_losses(
    params: Params, plan: Plan, *, rounding: Rounding = "nearest", key: jax.Array | None = None
) -> dict[str, MergeLoss]:
    """How much of each layer's update `merge` with these arguments keeps; nothing is merged.

    Args:
      params: parameters with adapters.
      plan: the plan.
      rounding: as for `merge`.
      key: as for `merge`.

    Returns:
      Path -> loss, for layers whose kernels are narrower than float32. Others lose no more than
      the rounding of a sum in their own dtype, and are left out.

    Raises:
      ValueError: as `merge`.

    >>> import flax.linen as nn, jax.numpy as jnp, mora_jax
    >>> layer = nn.Dense(6, param_dtype="bfloat16")
    >>> model = mora_jax.adapt(layer, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> params["mora"]["matrix_sharing"] += 1e-6
    >>> round(merge_losses(params, plan)[""].kept, 3)  # a millionth, in weights of about one half
    0.0
    """
    check_rounding(rounding, key)
    leaves = flatten(params)
    check_merge(plan, leaves)
    values = {path: unbox(leaf) for path, leaf in leaves.items()}
    return losses_of(values, plan, None if rounding == "nearest" else key)


def losses_of(leaves: Mapping[str, Any], plan: Plan, key: jax.Array | None) -> dict[str, MergeLoss]:
    """Layer -> what is lost, of kernels that are narrower than float32."""
    losses = {}
    for (path, spec), kernel in zip(plan.items(), plan.kernel_paths(), strict=True):
        if is_narrow(leaves[kernel].dtype):
            # A call for each layer, for its float32 sums are larger than its kernel; layers of
            # one shape share what is compiled.
            adapter, own = adapter_of(leaves, plan, path), layer_key(key, kernel)
            losses[path] = _loss_jitted(leaves[kernel], adapter, spec, own)
    losses = as_numbers(losses)
    # An infinite number after the merge makes the error infinite, or no number.
    suspects = [path for path, loss in losses.items() if not _is_finite(loss.error)]
    check_sums_finite(leaves, plan, suspects, key)
    return losses


def check_sums_finite(
    leaves: Mapping[str, Any], plan: Plan, layers: Iterable[str], key: jax.Array | None
) -> None:
    """Raises ValueError naming the layers whose merged kernels would not be finite.

    Each sum is made and thrown away, a layer at a time; under a transformation nothing is done.

    Args:
      leaves: arrays by path.
      plan: the plan.
      layers: which layers to look at.
      key: as for `merged_kernels`.
    """
    found = {}
    for path in layers:
        kernel = join_path(path, plan[path].kernel_name)
        adapter, own = adapter_of(leaves, plan, path), layer_key(key, kernel)
        found[kernel] = _infinite_jitted(leaves[kernel], adapter, plan[path], own)
    if any(isinstance(count, Tracer) for count in found.values()):
        return
    if bad := {path: leaves[path] for path, count in jax.device_get(found).items() if count}:
        raise not_finite_after(bad)


def _is_finite(number: Any) -> bool:
    return isinstance(number, Tracer) or math.isfinite(number)


def merged_kernels(
    leaves: Mapping[str, Any], plan: Plan, key: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Path -> kernel plus delta, for every layer of the plan.

    Args:
      leaves: arrays by path.
      plan: the plan.
      key: narrow kernels are rounded stochastically; None: to the nearest number.
    """
    return change_kernels(leaves, plan, lambda *layer: _add(*layer)[0], key)


def _add(kernel, value, bits):
    """The rounded sum of a kernel and its delta, and the sums that its loss is made of."""
    wide = wide_dtype(kernel.dtype)
    before, value = kernel.astype(wide), value.astype(wide)
    merged, after = rounded(before + value, kernel.dtype, bits)
    return merged, loss_sums(before, value, after)


def check_merge(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless these leaves can be merged by this plan."""
    check_adapted(plan, leaves)
    check_adapters_finite(plan, leaves, "merged")
    check_mergeable(plan, leaves)


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


@functools.partial(jax.jit, static_argnames=("plan", "places"))
def _merge_jitted(leaves, plan: Plan, places: Places, key: jax.Array | None):
    return constrain(merged_kernels(leaves, plan, key), places)


@functools.partial(jax.jit, static_argnames="spec")
def _loss_jitted(kernel, adapter, spec: AdapterSpec, key: jax.Array | None) -> MergeLoss:
    return loss_of_sums(sum_kernel(kernel, adapter, spec, lambda *layer: _add(*layer)[1], key))


@functools.partial(jax.jit, static_argnames="spec")
def _infinite_jitted(kernel, adapter, spec: AdapterSpec, key: jax.Array | None) -> jax.Array:
    """How many numbers of the merged kernel are not finite."""

    def count(*layer):
        return jnp.sum(~jnp.isfinite(_add(*layer)[0]), dtype=np.float32)

    return sum_kernel(kernel, adapter, spec, count, key)
