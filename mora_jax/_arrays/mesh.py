"""What is known of a mesh, and of how a layer's features are split over it."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


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


#: Mesh axes over which something is split; none where it is whole on every device.
MeshAxes = tuple[str, ...]


class FeatureSharding(NamedTuple):
    """How a layer's activations are known to lie on a mesh.

    Attributes:
      inputs: the axes that input features are split over; None where it is not known.
      outputs: those of output features, likewise.
      rows: those of the batch.
      kernel: all that the kernel is split over where its delta is added.
    """

    inputs: MeshAxes | None = None
    outputs: MeshAxes | None = None
    rows: MeshAxes = ()
    kernel: MeshAxes = ()


UNKNOWN = FeatureSharding()
_AT_HAND: contextvars.ContextVar[FeatureSharding] = contextvars.ContextVar(
    "_AT_HAND", default=UNKNOWN
)


@contextlib.contextmanager
def feature_sharding_is(sharding: FeatureSharding) -> Iterator[None]:
    """Within it, how the layer at hand is known to lie."""
    token = _AT_HAND.set(sharding)
    try:
        yield
    finally:
        _AT_HAND.reset(token)


def feature_axes() -> tuple[MeshAxes | None, MeshAxes | None]:
    """What the input and the output features of the layer at hand are split over here."""
    if not may_be_sharded():
        return (), ()
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def here(axes):
        if axes is None or not kinds.keys() >= set(axes):
            return None  # or they are of another mesh
        # Inside `shard_map` arrays are local.
        split = (name for name in axes if kinds[name] != AxisType.Manual)
        return tuple(name for name in split if mesh.shape[name] > 1)

    sharding = _AT_HAND.get()
    return here(sharding.inputs), here(sharding.outputs)


def gather_adapter(adapter: Mapping[str, Any], sharding: FeatureSharding) -> dict[str, Any]:
    """An adapter's leaves [B..., N, M], gathered on every device if they are kept in parts.

    Said where a layer uses them, and not of a whole stack before its scan, it makes a device hold
    one layer's at a time; and without it the compiler may rather split the layer's products. Where
    it is not known how the layer lies, nothing is said.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stated = sharding.inputs is not None or sharding.outputs is not None
    if not stated or mesh.empty or AxisType.Manual in mesh.axis_types:
        return {**adapter}

    def gather(leaf):
        if not isinstance(leaf, Tracer):
            return leaf  # run at once, it may lie on one device alone
        free = (PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 2)
        return lax.with_sharding_constraint(leaf, PartitionSpec(*free, None, None))

    return {name: gather(leaf) for name, leaf in adapter.items()}


def shards_of(axes: MeshAxes) -> int:
    """Over how many devices something is split here; axes of another mesh count for nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    split = (name for name in axes if kinds.get(name, AxisType.Manual) != AxisType.Manual)
    return math.prod(mesh.shape[name] for name in split)


def axes_of(spec: PartitionSpec, axes: Sequence[int]) -> MeshAxes:
    """All mesh axes that an array is split over along these axes.

    >>> axes_of(PartitionSpec("layers", "fsdp", None, ("data", "tensor")), (1, 3))
    ('fsdp', 'data', 'tensor')
    """
    names = dict(enumerate(spec))
    entries = (entry for axis in axes if (entry := names.get(axis)) is not None)
    return sum(((e,) if isinstance(e, str) else tuple(e) for e in entries), ())


def split_over(spec: PartitionSpec, axes: Sequence[int], shape: Sequence[int]) -> MeshAxes | None:
    """Mesh axes over which features are split that several axes of an array make up together.

    None where a part is no run of neighbours: where any but the first of them is split.
    """
    names = dict(enumerate(spec))
    first, *others = [axis for axis in axes if shape[axis] > 1] or [axes[0]]
    if any(names.get(axis) is not None for axis in others):
        return None
    split = names.get(first)
    return () if split is None else (split,) if isinstance(split, str) else tuple(split)


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


def explicit_mesh(*arrays: jax.Array) -> AbstractMesh | None:
    """The mesh of arrays that have a sharding in their type, by `AxisType.Explicit` axes."""
    for array in arrays:
        mesh = getattr(jax.typeof(array).sharding, "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def in_auto_axes(
    function: Callable[..., jax.Array], mesh: AbstractMesh, sharding: NamedSharding, *args: Any
) -> Any:
    """Runs a function with the compiler choosing the shardings inside; the result's is stated."""
    run = jax.sharding.auto_axes(function, out_sharding=sharding)
    if not jax.sharding.get_abstract_mesh().empty:
        return run(*args)
    with jax.sharding.use_abstract_mesh(mesh):
        return run(*args)
