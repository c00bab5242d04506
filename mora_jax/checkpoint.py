"""Saving and loading adapters with Orbax: the trained parameters and the plan, never the base.

A saved adapter is one Orbax checkpoint of the trained tree. Its custom metadata holds the plan as
JSON, so that a directory says by itself what it fits, in which scheme of its cycle.
"""

from __future__ import annotations

import os
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mora_jax._mesh import beside, sharding_of
from mora_jax._params import Params, check_unadapted, split
from mora_jax._plan import Plan
from mora_jax._tree import flatten, listing, rebuild, unflatten
from mora_jax._variables import box_like, value_of, with_value

_PLAN = "mora_jax_plan"


def save_adapters(directory: str | os.PathLike[str], params: Params, plan: Plan) -> None:
    """Saves what the plan trains: adapters, and the parameters of `also_train`.

    Orbax writes to a temporary name first, so a directory is either whole or not there.

    Args:
      directory: a path that does not exist yet.
      params: parameters with adapters; the base is not written.
      plan: the plan.

    Raises:
      ValueError: where the plan does not fit the parameters, or the directory exists.

    >>> import tempfile, flax.linen as nn, jax.numpy as jnp, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> pretrained = nn.Dense(6).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> params = mora_jax.attach(plan, pretrained)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapters(f"{folder}/adapters", params, plan)
    ...     loaded, plan = load_adapters(f"{folder}/adapters", pretrained)
    >>> jax.tree.map(jnp.shape, loaded)
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix': (3, 3)}}
    """
    trainable, _ = split(params, plan)
    path = epath.Path(directory).absolute()
    if path.exists():
        raise ValueError(f"{path} exists already; adapters are saved to a new directory.")
    values = {name: value_of(leaf) for name, leaf in flatten(trainable).items()}
    ocp.save(path, unflatten(values), custom_metadata={_PLAN: plan.to_json()})


def load_adapters(directory: str | os.PathLike[str], params: Params) -> tuple[dict[str, Any], Plan]:
    """Loads adapters beside the parameters of their base model.

    Args:
      directory: where `save_adapters` wrote.
      params: the base model's parameters, without adapters. Leaves of `also_train` are replaced.

    Returns:
      (params, plan): parameters with adapters, and the plan to `adapt` the base model with.

    Raises:
      FileNotFoundError: where there is no checkpoint.
      ValueError: where the directory holds no adapters, or adapters of another model.
    """
    path = epath.Path(directory).absolute()
    if not path.exists():
        raise FileNotFoundError(f"no adapters at {path}.")
    try:
        metadata = ocp.metadata(path)
    except (ValueError, FileNotFoundError, KeyError) as error:
        raise ValueError(f"{path} is no adapter saved by save_adapters: {error}") from error
    custom = metadata.custom_metadata
    text = custom.get(_PLAN) if isinstance(custom, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{path} is an Orbax checkpoint, but not one of save_adapters: no plan.")
    plan = Plan.from_json(text)
    leaves = flatten(params)
    check_unadapted(plan, leaves)
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in plan.adapter_leaves().items()}
    wanted |= {name: (shape, value_of(leaves[name]).dtype) for name, shape in plan.also_train}
    _check_saved(path, wanted, flatten(metadata.metadata))
    # Orbax wants to be told where arrays go: to their kernel's mesh, or where new arrays go.
    owners, anywhere = plan.adapter_owners(), jax.numpy.zeros(()).sharding
    abstract = {}
    for name, (shape, dtype) in wanted.items():
        kernel, axes = owners.get(name, (name, {axis: axis for axis in range(len(shape))}))
        place = sharding_of(value_of(leaves[kernel]))
        sharding = anywhere if place is None else beside(place, len(shape), axes)
        abstract[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    loaded = flatten(ocp.load(path, unflatten(abstract)))
    for name, (kernel, axes) in owners.items():
        loaded[name] = box_like(leaves[kernel], loaded[name], axes)
    for name, _ in plan.also_train:
        loaded[name] = with_value(leaves[name], loaded[name])
    frozen = {name: leaf for name, leaf in leaves.items() if name not in wanted}
    return rebuild(frozen | loaded, params), plan


def _check_saved(path: epath.Path, wanted: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises ValueError unless the checkpoint's arrays are those that its plan speaks of."""
    if wanted.keys() != saved.keys():
        raise ValueError(
            f"{path} does not hold the arrays of its plan: missing "
            f"{listing(wanted.keys() - saved.keys()) or 'none'}, surplus "
            f"{listing(saved.keys() - wanted.keys()) or 'none'}."
        )
    for name, (shape, _) in wanted.items():
        if tuple(saved[name].shape) != tuple(shape):
            raise ValueError(
                f"{path}: {name!r} was saved with shape {tuple(saved[name].shape)}, the plan says "
                f"{tuple(shape)}."
            )
