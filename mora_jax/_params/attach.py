"""New adapters in a tree of parameters.

Pure functions over nested dicts, or over an `nnx.State`; where leaves are boxed (partitioned
parameters of linen, variables of NNX), so are the adapters. With a plan that adapts `dense`:

    params                {"dense": {"kernel": W}, "norm": {"scale": s}}
    attach(plan, params)  {"dense": {"kernel": W, "mora": {"matrix_sharing": M}}, ...}

The name of a leaf says the scheme (`LayerConfig.stored_name`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from mora_jax._arrays.boxes import box_like, place_for
from mora_jax._arrays.paths import flatten, last_name, list_paths, path_seed, unflatten_like
from mora_jax._params.checks import check_unadapted
from mora_jax._params.split import Params
from mora_jax._plans.plan import Plan


def attach(plan: Plan, params: Params, *, key: jax.Array | None = None) -> dict[str, Any]:
    """Adds new adapters, of zero delta, beside the kernels of pretrained parameters.

    Args:
      plan: the plan.
      params: the base model's parameters, without adapters; they are not copied.
      key: a PRNG key, required where a scheme draws numbers (`LowRank`).

    Returns:
      The same parameters with an adapter in every layer of the plan, in the config's dtype.

    Raises:
      ValueError: where the plan does not fit the parameters, where they have adapters already,
        or where a key is missing.
      TypeError: where a kernel is not floating, or not an array.

    >>> import flax.linen as nn, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> pretrained = nn.Dense(6).init(jax.random.key(0), jax.numpy.ones((1, 3)))["params"]
    >>> jax.tree.map(jax.numpy.shape, mora_jax.attach(plan, pretrained))
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix_sharing': (3, 3)}}
    """
    leaves = flatten(params)
    check_unadapted(plan, leaves)
    owners, shapes = plan.adapter_owners(), plan.adapter_leaves()
    places = {}
    for path, (kernel, axes) in owners.items():
        if place := place_for(leaves[kernel], len(shapes[path].shape), axes):
            places[path] = place
    make = functools.partial(new_adapters, plan)
    if places:
        # On every device at once, and in every process.
        make = jax.jit(make, out_shardings={path: places.get(path) for path in owners})
    new = make(key)
    boxed = {
        path: box_like(leaves[kernel], new[path], axes, last_name(path))
        for path, (kernel, axes) in owners.items()
    }
    return unflatten_like(leaves | boxed, params)


def new_adapters(
    plan: Plan, key: jax.Array | None, dtypes: Mapping[str, Any] | None = None
) -> dict[str, jax.Array]:
    """Path -> new leaf, for every adapter of the plan.

    Args:
      plan: the plan.
      key: a PRNG key, required where a scheme draws numbers.
      dtypes: path -> dtype, where it is not to be the plan's.
    """
    drawing = [path for path, spec in plan.items() if spec.draws]
    if drawing and key is None:
        raise ValueError(
            f"key is missing: {plan[drawing[0]].scheme} draws random numbers "
            f"(layers {list_paths(drawing)}). Pass key=jax.random.key(...)."
        )
    leaves = {}
    plain = plan.plain_paths()
    for path, spec in plan.items():
        for name, leaf in plan.leaf_paths(path).items():
            # By the path's checksum, so that a layer's numbers do not depend on the others.
            own = None if key is None else jax.random.fold_in(key, path_seed(plain[leaf]))
            dtype = spec.config.dtype if dtypes is None else dtypes[leaf]
            leaves[leaf] = spec.leaves[name].start(own, spec.shapes[name], dtype)
    return leaves
