"""Where adapters and their optimizer state lie on a mesh, beside a base that is sharded already.

Placing them is JAX's own business, and often there is nothing to do: `attach` puts new adapters on
the mesh of their kernels, an optimizer's `init` follows its parameters, and every function of this
library gives back what it was given where it lay. What is here is for what has no arrays yet:
`out_shardings`, checkpoints to be restored, compiling ahead of time.

Adapters are replicated: then the forward pass needs no collective that the base does not need, and
the sum of their gradients rides in the reduction that data parallelism makes anyway. Stacks of
layers and experts alone are split as their kernels are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.mesh import UNKNOWN, FeatureSharding, axes_of, split_over
from mora_jax._arrays.paths import flatten, join_path, parameter_path, unflatten_like
from mora_jax._arrays.places import sharding_beside_kernel
from mora_jax._compat.renamed import renamed_names
from mora_jax._params.checks import check_paths
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan


def param_shardings(
    plan: Plan, base: Mapping[str, Any], *, split: str | None = None
) -> dict[str, Any]:
    """Where parameters with adapters lie, given where the base model's lie.

    Args:
      plan: the plan.
      base: a tree like the base model's parameters, of `NamedSharding`s or `PartitionSpec`s (what
        `flax.linen.get_partition_spec` and `flax.nnx.get_partition_spec` give), or of arrays and
        `jax.ShapeDtypeStruct`s that have a sharding.
      split: a mesh axis to keep the matrices of large ranks in parts over, by their rows where
        their number divides, as `MoRAConfig.size_multiple` makes it. Each layer of a plan that
        `on_mesh` has told of the mesh gathers its own where it is used (under `jax.set_mesh`), and
        each device updates its part: less memory for matrices, gradients and optimizer states, for
        sending every matrix once a pass. Needs `NamedSharding`s.

    Returns:
      A tree like `attach` gives, of shardings (or of specs, where `base` has them).

    Raises:
      ValueError: where `base` lacks a kernel of the plan, or `split` is no axis of its mesh.
      TypeError: where a leaf says nothing of where it lies on a mesh.

    >>> import flax.linen as nn, jax.numpy as jnp, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jnp.ones((1, 3)))
    >>> specs = {"kernel": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec()}
    >>> param_shardings(plan, specs)["mora"]
    {'matrix_sharing': P(None, None)}
    """
    leaves = flatten(base)
    check_paths(plan, leaves)
    places = {path: _place(path, leaf) for path, leaf in leaves.items()}
    shapes = plan.adapter_leaves()
    for path, (kernel, axes) in plan.adapter_owners().items():
        place = sharding_beside_kernel(places[kernel], len(shapes[path].shape), axes)
        places[path] = _split_rows(place, shapes[path].shape, axes, split) if split else place
    return unflatten_like(places, base)


def _split_rows(
    place: NamedSharding, shape: tuple[int, ...], axes: Mapping[int, int], name: str
) -> NamedSharding:
    if not isinstance(place, NamedSharding) or name not in place.mesh.shape:
        raise ValueError(
            f"split={name!r} names no axis of {getattr(place, 'mesh', place)}; expected one of the "
            "mesh of the base's NamedShardings."
        )
    rows = min(axis for axis in range(len(shape)) if axis not in axes)
    if shape[rows] % place.mesh.shape[name]:
        return place
    return place.update(spec=PartitionSpec(*place.spec[:rows], name, *place.spec[rows + 1 :]))


def on_mesh(plan: Plan, base: Mapping[str, Any], batch: str | Sequence[str]) -> Plan:
    """The plan of a model on a mesh: it knows which layers' features are split over devices.

    A layer cannot see that from inside, unless the mesh's axes are `AxisType.Explicit`. Where it is
    known, each device compresses the features that it has: faster, and nothing is sent but the
    gradient of the matrix; and "auto" counts a device's rows, not those of all. Numbers stay the
    same but for the order of sums. Adapt the model with this plan. It is of this mesh alone: saved
    adapters do not hold what is said here.

    Args:
      plan: the plan.
      base: as for `param_shardings`.
      batch: the mesh axes that the batch is split over. Kernels that are split over these are
        gathered where they are used, so their features are whole; those split over others are used
        where they lie.

    Returns:
      A plan like `plan`.

    Raises:
      ValueError: where `base` lacks a kernel of the plan, or `batch` names no axis of its mesh.
        (`PartitionSpec`s have no mesh, and are not asked.)
      TypeError: where a leaf says nothing of where it lies on a mesh.

    >>> import flax.linen as nn, jax.numpy as jnp, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jnp.ones((1, 3)))
    >>> specs = {"kernel": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec()}
    >>> plan = on_mesh(plan, specs, batch=("data", "fsdp"))
    >>> plan[""].config.feature_sharding.outputs
    ('tensor',)
    """
    leaves = flatten(base)
    check_paths(plan, leaves)
    batch = (batch,) if isinstance(batch, str) else tuple(batch)
    layers = []
    for path, spec in plan.layers:
        kernel = join_path(path, spec.kernel_name)
        place = _place(kernel, leaves[kernel])
        _check_batch(batch, place)
        config = dataclasses.replace(
            spec.config, feature_sharding=_feature_sharding(place, spec, batch)
        )
        layers.append((path, dataclasses.replace(spec, config=config)))
    return dataclasses.replace(plan, layers=tuple(layers))


def _check_batch(batch: tuple[str, ...], place: NamedSharding | PartitionSpec) -> None:
    """Raises ValueError for a name that is no axis of the mesh, where there is one to ask."""
    axes = place.mesh.axis_names if isinstance(place, NamedSharding) else batch
    if unknown := [name for name in batch if name not in axes]:
        raise ValueError(
            f"batch names {', '.join(map(repr, unknown))}, no axis of the base's mesh; expected "
            f"some of {', '.join(map(repr, axes)) or 'none'}."
        )


def _feature_sharding(place: Any, spec: AdapterSpec, batch: tuple[str, ...]) -> FeatureSharding:
    names = place.spec if isinstance(place, NamedSharding) else place
    kept = []
    for name in names:
        axes = () if name is None else (name,) if isinstance(name, str) else name
        left = tuple(axis for axis in axes if axis not in batch)
        if left and len(left) < len(axes):
            # What is gathered of it may be no run of neighbours.
            return UNKNOWN._replace(rows=batch)
        kept.append(left or None)
    own, layout = PartitionSpec(*kept), spec.kernel_axes
    sides = (split_over(own, axes, spec.kernel_shape) for axes in (layout.inputs, layout.outputs))
    return FeatureSharding(
        *sides, rows=batch, kernel=axes_of(names, (*layout.inputs, *layout.outputs))
    )


def optimizer_shardings(
    optimizer: optax.GradientTransformation,
    params: Mapping[str, Any],
    shardings: Mapping[str, Any],
) -> Any:
    """Where an optimizer's state lies, given where the parameters lie that it is for.

    Moments lie where their parameters do, counts and the like on every device.

    Args:
      optimizer: any optax transformation.
      params: what its `init` takes; arrays or `jax.ShapeDtypeStruct`s.
      shardings: a tree like `params` of `NamedSharding`s, at least one.

    Returns:
      A tree like `jax.eval_shape(optimizer.init, params)` of shardings, for `out_shardings`.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> params = {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}
    >>> shardings = {"kernel": NamedSharding(mesh, PartitionSpec("data"))}
    >>> state = optimizer_shardings(optax.sgd(0.1, momentum=0.9), params, shardings)
    >>> state[0].trace["kernel"].spec
    P('data',)
    """
    known = {path: unbox(leaf) for path, leaf in flatten(shardings).items()}
    shapes = {path: unbox(leaf).shape for path, leaf in flatten(params).items()}
    everywhere = NamedSharding(next(iter(known.values())).mesh, PartitionSpec())

    def place(keys, leaf):
        path = parameter_path(keys)
        # Some moments have another shape than their parameter, such as Adafactor's.
        return known[path] if path in known and shapes[path] == leaf.shape else everywhere

    return jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, params))


def _place(path: str, leaf: Any) -> Any:
    leaf = unbox(leaf)
    place = leaf if isinstance(leaf, NamedSharding | PartitionSpec) else None
    if place is None and isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
        place = sharding
    if place is None:
        raise TypeError(
            f"{path!r} is a {type(leaf).__name__} that says nothing of a mesh; expected a "
            "NamedSharding, a PartitionSpec, or an array that lies on a mesh."
        )
    return place


__getattr__ = renamed_names(__name__, {"Spread": ("FeatureSharding", FeatureSharding)})
