"""Saving, loading and listing adapters with Orbax."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from mora_jax._arrays.boxes import box_like, place_for, rebox, unbox
from mora_jax._arrays.checksums import checksums
from mora_jax._arrays.paths import flatten, list_paths, unflatten, unflatten_like
from mora_jax._params.checks import check_finite, check_sizes, check_unadapted
from mora_jax._params.split import Params, split
from mora_jax._plans.plan import Plan
from mora_jax.checkpoint._limits import check_chunks, check_metadata
from mora_jax.checkpoint._record import (
    Record,
    check_fits,
    check_saved,
    fingerprint_of,
    from_custom,
    shape_of,
    to_custom,
    with_path_in_errors,
)
from mora_jax.checkpoint._versions import (
    check_room,
    find_saved,
    is_checkpoint,
    names_in,
    new_unnamed,
    new_version,
    versions_of,
)


@dataclasses.dataclass(frozen=True)
class SavedAdapters:
    """One entry of `list_adapters`.

    Attributes:
      name: the name; "" where the directory itself is the checkpoint.
      version: 1, 2, ...; 0 where the directory itself is the checkpoint.
      plan: the plan, None where it cannot be read.
      size: bytes of the arrays.
      base: path -> {"shape", "dtype"} of the parameters that it was trained beside.
      metadata: what the user gave.
      error: why it cannot be read, "" where it can.
    """

    name: str
    version: int
    plan: Plan | None
    size: int
    base: Mapping[str, Any]
    metadata: Mapping[str, Any]
    error: str = ""

    def __str__(self) -> str:
        """One line."""
        label = f"{self.name} {self.version}" if self.name else "(unnamed)"
        if self.plan is None:
            return f"{label}: {self.error}"
        schemes = sorted({str(spec.scheme) for spec in self.plan.values()})
        also = f", {more} parameters in full" if (more := len(self.plan.also_train)) else ""
        text = f"{label}: {len(self.plan)} layers, {', '.join(schemes)}{also}, {self.size:,} bytes"
        return f"{text}, {dict(self.metadata)}" if self.metadata else text


def save_adapters(
    directory: str | os.PathLike[str],
    params: Params,
    plan: Plan,
    *,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    fingerprint: bool = False,
) -> int:
    """Saves what the plan trains: adapters, and the parameters of `also_train`.

    Orbax writes to a temporary name first, so a directory is either whole or not there.

    Args:
      directory: without a name, a path that does not exist yet; with one, where named adapters lie.
      params: parameters with adapters; the base is not written.
      plan: the plan.
      name: letters, digits, ".", "_", "-". Each save is a new version of it.
      metadata: anything that JSON holds, given back by `list_adapters`.
      fingerprint: also save a checksum of every adapted kernel, so that adapters are refused beside
        kernels with other numbers of the same shape and dtype. It reads the base, here and when
        they are loaded.

    Returns:
      The version, 1 at first; 0 without a name.

    Raises:
      ValueError: where the plan does not fit the parameters, the directory exists, what is trained
        is not finite, the name is no name, or the metadata is no JSON.

    >>> import tempfile, flax.linen as nn, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> pretrained = nn.Dense(6).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> params = mora_jax.attach(plan, pretrained)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     version = save_adapters(folder, params, plan, name="poems", metadata={"steps": 100})
    ...     print(*list_adapters(folder))
    ...     loaded, plan = load_adapters(folder, pretrained, name="poems")
    poems 1: 1 layers, Sharing(), 36 bytes, {'steps': 100}
    >>> jax.tree.map(jnp.shape, loaded)
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix': (3, 3)}}
    """
    trainable, _ = split(params, plan)
    leaves = flatten(params)
    values = {path: unbox(leaf) for path, leaf in flatten(trainable).items()}
    path = epath.Path(directory).absolute()
    check_room(path, name)
    if name is not None:
        path = path / name
    sums = checksums(values)
    check_finite(values, f"saved at {path}")
    base = {p: shape_of(unbox(leaves[p])) for p in (*plan.kernel_paths(), *dict(plan.also_train))}
    if fingerprint:
        for kernel, checksum in fingerprint_of(plan, leaves).items():
            base[kernel]["checksum"] = checksum
    arrays = {p: {**shape_of(leaf), "checksum": sums[p]} for p, leaf in values.items()}
    custom: Any = to_custom(plan, base, arrays, metadata)
    if name is None:
        with new_unnamed(path) as new:
            ocp.save(new, unflatten(values), custom_metadata=custom)
        return 0
    with new_version(path) as version:
        ocp.save(path / str(version), unflatten(values), custom_metadata=custom)
    return version


def load_adapters(
    directory: str | os.PathLike[str],
    params: Params,
    *,
    name: str | None = None,
    version: int | None = None,
) -> tuple[dict[str, Any], Plan]:
    """Loads adapters beside the parameters of their base model.

    Every array keeps its bits and the dtype that it was saved in, whatever those of the plan and of
    the base: what was trained in float32 beside a bfloat16 base is not rounded.

    Args:
      directory: where `save_adapters` wrote.
      params: the base model's parameters, without adapters. Leaves of `also_train` are replaced.
      name: the name, where there are several.
      version: of that name; the newest by default.

    Returns:
      (params, plan): parameters with adapters, and the plan to `adapt` the base model with.

    Raises:
      FileNotFoundError: where there is no checkpoint.
      ValueError: where the directory holds no adapters, damaged ones, or those of a later version
        of this library; where they are not finite; where they are of another model, with every
        difference.
    """
    path = find_saved(epath.Path(directory).absolute(), name, version)
    record, saved = _read(path)
    plan, leaves = record.plan, flatten(params)
    check_fits(path, record, leaves)
    check_unadapted(plan, leaves)
    with_path_in_errors(path, lambda: check_sizes(plan, leaves))
    wanted = {name: leaf.shape for name, leaf in plan.adapter_leaves().items()}
    wanted |= dict(plan.also_train)
    check_saved(path, wanted, saved, record.arrays)
    with_path_in_errors(path, lambda: check_chunks(path))
    # Orbax wants to be told where arrays go: to their kernel's mesh, or where new arrays go.
    owners, anywhere = plan.adapter_owners(), jnp.zeros(()).sharding
    abstract = {}
    for leaf, shape in wanted.items():
        kernel, axes = owners.get(leaf, (leaf, {axis: axis for axis in range(len(shape))}))
        sharding = place_for(leaves[kernel], len(shape), axes) or anywhere
        abstract[leaf] = jax.ShapeDtypeStruct(shape, saved[leaf].dtype, sharding=sharding)
    loaded = flatten(with_path_in_errors(path, lambda: ocp.load(path, unflatten(abstract))))
    if record.arrays is not None:
        found = checksums(loaded)
        if other := [leaf for leaf in found if found[leaf] != record.arrays[leaf].get("checksum")]:
            raise ValueError(f"{path} is damaged: {list_paths(other)} are not the numbers saved.")
    check_finite(loaded, f"loaded from {path}")
    for leaf, (kernel, axes) in owners.items():
        loaded[leaf] = box_like(leaves[kernel], loaded[leaf], axes)
    for leaf, _ in plan.also_train:
        loaded[leaf] = rebox(leaves[leaf], loaded[leaf])
    frozen = {path: leaf for path, leaf in leaves.items() if path not in wanted}
    return unflatten_like(frozen | loaded, params), plan


def list_adapters(directory: str | os.PathLike[str]) -> list[SavedAdapters]:
    """What a directory of `save_adapters` holds, by name and version; no arrays are read.

    What is damaged is listed too, with its error. What Orbax had not finished is not.

    Raises:
      FileNotFoundError: where there is no such directory.
    """
    path = epath.Path(directory).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"no adapters at {path}.")
    if is_checkpoint(path):
        return [_entry(path, "", 0)]
    return [
        _entry(path / name / str(version), name, version)
        for name in names_in(path)
        for version in versions_of(path / name)
    ]


def _entry(path: epath.Path, name: str, version: int) -> SavedAdapters:
    try:
        record, saved = _read(path)
    except ValueError as error:
        return SavedAdapters(name, version, None, 0, {}, {}, str(error))
    size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in saved.values())
    return SavedAdapters(name, version, record.plan, size, record.base, record.metadata)


def _read(path: epath.Path) -> tuple[Record, dict[str, Any]]:
    """What a checkpoint says of itself, and shape and dtype of the arrays that Orbax finds."""
    with_path_in_errors(path, lambda: check_metadata(path))
    found = with_path_in_errors(path, lambda: ocp.metadata(path))
    record = from_custom(path, found.custom_metadata)
    return record, with_path_in_errors(path, lambda: flatten(found.metadata))
