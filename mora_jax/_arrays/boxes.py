"""Arrays in boxes: linen's partitioned parameters and NNX's variables.

A box is a pytree of one array that knows more about it, the mesh axes that it is meant for or its
type. The functions over parameter trees take boxes where they take arrays, and give them back.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from jax.sharding import NamedSharding

from mora_jax._arrays.paths import NAME
from mora_jax._arrays.places import sharding_beside_kernel, sharding_of


class MoRAParam(nnx.LoRAParam):
    """A trained number of an adapter; trainers that look for `nnx.LoRAParam` find it."""


class AlsoTrained(MoRAParam):
    """A parameter of the base model that is trained in full beside the adapters."""


class AdapterIds(nnx.Variable):
    """Which adapter of a bank each example has, beside the adapters of one layer: [E] int."""


_BOXES = (nnx.Variable, meta.AxisMetadata)


def unbox(leaf: Any) -> Any:
    """The array in a box; anything else as it is."""
    return jax.tree.leaves(leaf)[0] if isinstance(leaf, _BOXES) else leaf


def rebox(leaf: Any, value: Any) -> Any:
    """A box like this one with another array in it; the array itself where there is no box."""
    if not isinstance(leaf, _BOXES):
        return value
    return jax.tree.unflatten(jax.tree.structure(leaf), [value])


def box_like(kernel: Any, value: jax.Array, axes: Mapping[int, int], name: str) -> Any:
    """An adapter's leaf in a box such as its kernel has.

    Args:
      kernel: the kernel, in its box or without one.
      value: the leaf.
      axes: axis of the leaf -> the axis of the kernel that it has in common (stacks, experts);
        their names go with them, the leaf's other axes have none.
      name: the leaf's, which a variable of NNX remembers: `nnx.merge` goes by order alone.
    """

    def names(of_kernel):
        known = dict(enumerate(of_kernel))
        return tuple(known.get(axes[a]) if a in axes else None for a in range(value.ndim))

    if isinstance(kernel, nnx.Variable):
        # Not in the constructor, which would move the value, and wants a mesh for it.
        leaf, known = MoRAParam(value), kernel.get_metadata()
        leaf.set_metadata(**{NAME: name})
        if of_kernel := known.get("out_sharding"):
            leaf.set_metadata(out_sharding=names(of_kernel))
            for key in ("mesh", "sharding_rules"):
                if key in known:
                    leaf.set_metadata(**{key: known[key]})
        return leaf
    if isinstance(kernel, meta.Partitioned):
        return kernel.replace(value=value, names=names(kernel.names))
    return value


def place_for(kernel: Any, ndim: int, axes: Mapping[int, int]) -> NamedSharding | None:
    """Where a new leaf of an adapter goes; None if its kernel lies on no mesh.

    Args:
      kernel: the kernel, in its box or without one.
      ndim: axes of the leaf.
      axes: as for `box_like`.
    """
    place = sharding_of(unbox(kernel))
    return None if place is None else sharding_beside_kernel(place, ndim, axes)


def put_beside(kernel: Any, value: Any, axes: Mapping[int, int], name: str) -> Any:
    """A new leaf of an adapter, put on its kernel's mesh and in a box such as the kernel has.

    Args:
      kernel: the kernel, in its box or without one.
      value: the leaf, an array of NumPy; its dtype stays.
      axes: as for `box_like`.
      name: likewise.
    """
    return box_like(kernel, jax.device_put(value, place_for(kernel, value.ndim, axes)), axes, name)


@functools.singledispatch
def to_array(kernel: Any) -> jax.Array:
    """The kernel as an array; a door registers types of its own."""
    return jnp.asarray(kernel)
