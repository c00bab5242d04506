"""How arrays may be spread over devices, as far as it can be known while tracing."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
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


def platform() -> str:
    """The kind of machine that is compiled for: "gpu", "tpu" or "cpu".

    A mesh knows its devices, which need not be this process's: programs are compiled for a pod on a
    machine without one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def vary_alike(tree: Any) -> Any:
    """Inside `shard_map`, the arrays as ones that differ between devices where any of them does.

    A gradient rule of one's own must give gradients that vary as its arguments do; the sum over
    devices of a gradient by what is replicated is then made outside of the rule.
    """
    axes = frozenset().union(*map(_varying, jax.tree.leaves(tree)))

    def vary(leaf):
        missing = tuple(axes - _varying(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def _varying(leaf: jax.Array) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying
