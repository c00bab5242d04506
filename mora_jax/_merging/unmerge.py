"""Unmerging: merged adapters are taken out again, and which numbers cannot be known is counted.

A merge makes round(W + D) of a kernel W. What comes out of an unmerge is the W that a merge would
have made this of. There is one, as a rule: then it is found, bit for bit. There are several where
the sum lies among larger numbers than W did, which are further apart.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._arrays.boxes import rebox, unbox
from mora_jax._arrays.dtypes import wide_dtype
from mora_jax._arrays.paths import flatten, is_adapter, unflatten_like
from mora_jax._arrays.places import Places, constrain, places_of
from mora_jax._arrays.rounding import Rounding, check_rounding, neighbour, rounded
from mora_jax._merging.layer_by_layer import adapter_of, change_kernels, layer_key, sum_kernel
from mora_jax._merging.losses import as_numbers
from mora_jax._merging.merge import check_merge
from mora_jax._params.checks import check_base, check_results_finite, refuse_dora
from mora_jax._params.split import Params, join
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan

#: Steps from round(W' - D) at which a kernel's number is looked for, the likeliest first: after
#: rounding to the nearest, and after stochastic rounding, which goes twice as far.
_NEAR, _FAR = (0, 1, -1), (0, 1, -1, 2, -2)


def unmerge(
    merged: Params,
    adapters: Params,
    plan: Plan,
    *,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Takes merged adapters out of their kernels again, and puts them back beside these.

    A number comes back bit for bit (the sign of a zero aside) where one number alone of the
    kernel's dtype can have been there, and elsewhere as near as the merge's rounding was;
    `unmerge_losses` counts them. For all of them, keep the base.

    Args:
      merged: what `merge` returned.
      adapters: a tree that holds the adapters, such as the first part of `split`.
      plan: the plan.
      rounding: what the merge had.
      key: what the merge had.

    Returns:
      Parameters with adapters.

    Raises:
      ValueError: where the plan does not fit, an adapter or what comes out is not finite, a key
        is missing, or a layer has DoRA, whose merge cannot be taken back.
    """
    params, key = _joined(merged, adapters, plan, rounding, key)
    leaves = flatten(params)
    values = {path: unbox(leaf) for path, leaf in leaves.items()}
    found = _unmerge_jitted(values, plan, places_of(values), key)
    check_results_finite(found, values, "unmerged")
    found = {path: rebox(leaves[path], kernel) for path, kernel in found.items()}
    return unflatten_like(leaves | found, params)


def unmerge_losses(
    merged: Params,
    adapters: Params,
    plan: Plan,
    *,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
) -> dict[str, float]:
    """The share of each kernel's numbers that `unmerge` cannot know; nothing is unmerged.

    Of these some come back as they were all the same; all others do, bit for bit.

    Args:
      merged: as for `unmerge`, and what `merge` made of just these adapters.
      adapters: as for `unmerge`.
      plan: the plan.
      rounding: as for `unmerge`.
      key: as for `unmerge`.

    Returns:
      Path of the layer -> share, 0.0 where the whole kernel is known.

    Raises:
      ValueError: as `unmerge`.

    >>> import flax.linen as nn, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> unmerge_losses(mora_jax.merge(params, plan), params, plan)
    {'': 0.0}
    """
    params, key = _joined(merged, adapters, plan, rounding, key)
    values = {path: unbox(leaf) for path, leaf in flatten(params).items()}
    shares = {}
    for (path, spec), kernel in zip(plan.items(), plan.kernel_paths(), strict=True):
        adapter, own = adapter_of(values, plan, path), layer_key(key, kernel)
        shares[path] = _unknown_jitted(values[kernel], adapter, spec, own)
    return as_numbers(shares)


def _joined(merged, adapters, plan, rounding, key) -> tuple[Params, jax.Array | None]:
    """Merged kernels beside their adapters, and the key if one is used; raises ValueError."""
    check_rounding(rounding, key)
    refuse_dora(
        plan,
        "unmerged",
        "divides by the norms of a kernel and its delta, and of the sum alone they are not "
        "known. Keep the base",
    )
    leaves = {path: leaf for path, leaf in flatten(adapters).items() if is_adapter(path)}
    check_base(plan, flatten(merged))
    params = join(merged, unflatten_like(leaves, adapters))
    check_merge(plan, flatten(params))
    return params, None if rounding == "nearest" else key


def _take_out(kernel, value, bits):
    """The kernel before a merge, and how many of its numbers cannot be known."""
    wide = wide_dtype(kernel.dtype)
    value = value.astype(wide)
    first, number = rounded(kernel.astype(wide) - value, kernel.dtype)
    found, count = jnp.zeros(kernel.shape, bool), jnp.zeros(kernel.shape, np.int8)
    before, tried = first, _NEAR if bits is None else _FAR
    for steps in tried:
        candidate = neighbour(first, steps) if steps else first
        number = candidate.astype(wide) if steps else number
        fits = rounded(number + value, kernel.dtype, bits)[0] == kernel
        before = jnp.where(fits & ~found, candidate, before)
        # Those that fit stand side by side: there may be more beyond the last that is tried.
        count += fits.astype(np.int8) * np.int8(2 if abs(steps) == max(tried) else 1)
        found |= fits
    return before, jnp.sum(count != 1, dtype=np.float32)


@functools.partial(jax.jit, static_argnames=("plan", "places"))
def _unmerge_jitted(leaves, plan: Plan, places: Places, key: jax.Array | None):
    return constrain(change_kernels(leaves, plan, lambda *layer: _take_out(*layer)[0], key), places)


@functools.partial(jax.jit, static_argnames="spec")
def _unknown_jitted(kernel, adapter, spec: AdapterSpec, key: jax.Array | None) -> jax.Array:
    count = sum_kernel(kernel, adapter, spec, lambda *layer: _take_out(*layer)[1], key)
    return count / kernel.size
