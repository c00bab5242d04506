"""Whether arrays may be spread over devices, as far as it can be known while tracing."""

from __future__ import annotations

import jax
from jax.sharding import AxisType


def may_be_sharded() -> bool:
    """Whether features may lie on several devices, so that moving them would communicate.

    Inside `shard_map` arrays are local. Under a mesh (`jax.set_mesh`) its axes say; without one,
    arrays can still be sharded where the process has several devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() > 1
    axes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != AxisType.Manual and size > 1 for kind, size in axes)
