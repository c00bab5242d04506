"""Where arrays lie on a mesh: asked of an array, kept inside jit, and found beside a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

#: Path -> where the array there lies; static, so an argument of jitted functions.
Places = tuple[tuple[str, NamedSharding], ...]


def sharding_beside_kernel(kernel: Any, ndim: int, axes: Mapping[int, int]) -> Any:
    """Where an adapter's leaf lies, given where its kernel does.

    Its stacks and experts are split as the kernel's are; its matrices are whole on every device,
    so that no product with them communicates.

    Args:
      kernel: the kernel's `NamedSharding`, or its `PartitionSpec`; so is what comes back.
      ndim: axes of the leaf.
      axes: axis of the leaf -> the axis of the kernel that it has in common.
    """
    spec = kernel.spec if isinstance(kernel, NamedSharding) else kernel
    names = dict(enumerate(spec))
    own = PartitionSpec(*(names.get(axes[a]) if a in axes else None for a in range(ndim)))
    return NamedSharding(kernel.mesh, own) if isinstance(kernel, NamedSharding) else own


def sharding_of(leaf: Any) -> NamedSharding | None:
    """Where an array lies, if it lies on a mesh and is no tracer."""
    # A quantised kernel lies where its integers do.
    leaf = getattr(leaf, "qvalue", leaf)
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    named = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    return sharding if named else None


def on_host(leaf: Any) -> np.ndarray:
    """The whole array in this host's memory.

    One that lies on the devices of several processes is first brought to all of them: every
    process must then ask for it.
    """
    place = sharding_of(leaf)
    if place is not None and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = jax.device_put(leaf, NamedSharding(place.mesh, PartitionSpec()))
    return np.asarray(leaf)


def places_of(leaves: Mapping[str, Any]) -> Places:
    """Where the arrays on a mesh lie."""
    found = ((path, sharding_of(leaf)) for path, leaf in leaves.items())
    return tuple((path, sharding) for path, sharding in found if sharding is not None)


def constrain(leaves: dict[str, Any], places: Places) -> dict[str, Any]:
    """Inside jit: the arrays where they are said to lie."""
    known = dict(places)

    def move(path, leaf):
        if (sharding := known.get(path)) is None:
            return leaf
        if AxisType.Explicit in sharding.mesh.axis_types:
            return jax.sharding.reshard(leaf, sharding)
        return lax.with_sharding_constraint(leaf, sharding)

    return {path: move(path, leaf) for path, leaf in leaves.items()}
