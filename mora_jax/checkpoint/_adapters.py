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
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from mora_jax._arrays.boxes import box_like, place_for, rebox, unbox
from mora_jax._arrays.checksums import checksums
from mora_jax._arrays.paths import flatten, last_name, list_paths, unflatten, unflatten_like
from mora_jax._params.checks import check_finite, check_sizes, check_unadapted
from mora_jax._params.precision import loaded_dtypes, plan_with_dtypes
from mora_jax._params.split import Params, split
from mora_jax._plans.plan import Plan
from mora_jax.checkpoint._limits import check_chunks, check_metadata
from mora_jax.checkpoint._record import (
    Record,
    check_fits,
    check_saved,
    fingerprint_of,
    from_custom,
    kernels_in,
    shape_of,
    to_custom,
    with_path_in_errors,
)
from mora_jax.checkpoint._statistics import check_statistics, is_floating, statistics
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
    fingerprint: bool | None = None,
    kernels: bool = False,
) -> int:
    """Saves what the plan trains: adapters, and the parameters of `also_train`.

    Of an `nnx.State`, the statistics are saved too: `nnx.BatchStat`, and variables of your own that
    are no `nnx.Param`. Give `nnx.state(model)`; a state of parameters alone has none. In linen they
    are a collection of their own, `batch_stats`, which you save yourself.

    Orbax writes to a temporary name first, so a directory is either whole or not there.

    Args:
      directory: without a name, a path that does not exist yet; with one, where named adapters lie.
      params: parameters with adapters; of the base, only what `kernels` says is written.
      plan: the plan.
      name: letters, digits, ".", "_", "-". Each save is a new version of it.
      metadata: anything that JSON holds, given back by `list_adapters`.
      fingerprint: also save a checksum of every adapted kernel, so that adapters are refused beside
        kernels with other numbers of the same shape and dtype. It reads the base, here and when
        they are loaded. By default it is made where `merge_and_reset` has changed the base, which
        the adapters then belong to.
      kernels: also save the adapted kernels, which `load_adapters` then puts in place of those that
        it is given: after `merge_and_reset` they hold most of what was trained.

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
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix_sharing': (3, 3)}}
    """
    trainable, _ = split(params, plan)
    leaves = flatten(params)
    # In files names are plain, for the plan beside them says the scheme.
    plain = plan.plain_paths()
    saved = flatten(trainable) | statistics(leaves)
    values = {plain.get(path, path): unbox(leaf) for path, leaf in saved.items()}
    if kernels:
        values |= {kernel: unbox(leaves[kernel]) for kernel in plan.kernel_paths()}
    path = epath.Path(directory).absolute()
    check_room(path, name)
    if name is not None:
        path = path / name
    sums = checksums(values)
    check_finite({p: leaf for p, leaf in values.items() if is_floating(leaf)}, f"saved at {path}")
    base = {p: shape_of(unbox(leaves[p])) for p in (*plan.kernel_paths(), *dict(plan.also_train))}
    if plan.merges > 0 if fingerprint is None else fingerprint:
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
    dtype: DTypeLike | None = "float32",
) -> tuple[dict[str, Any], Plan]:
    """Loads adapters beside the parameters of their base model.

    No number is rounded, whatever the dtypes of the plan and of the base. Adapters that were saved
    in bfloat16 or float16 come in float32, in which they can be trained on; the plan says so too.

    Args:
      directory: where `save_adapters` wrote.
      params: the base model's parameters, without adapters. Leaves of `also_train` are replaced,
        and statistics that were saved with the adapters.
      name: the name, where there are several.
      version: of that name; the newest by default.
      dtype: adapters in a narrower dtype are widened to this one, and a note goes to the logger
        "mora_jax". Wider ones keep theirs. None keeps every dtype as it was saved. Parameters of
        `also_train` always do.

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
    plain = plan.plain_paths()
    wanted = {plain[name]: leaf.shape for name, leaf in plan.adapter_leaves().items()}
    wanted |= dict(plan.also_train) | kernels_in(record)
    wanted |= check_statistics(path, saved.keys() - wanted.keys(), leaves)
    check_saved(path, wanted, saved, record.arrays)
    with_path_in_errors(path, lambda: check_chunks(path))
    # Orbax wants to be told where arrays go: to their kernel's mesh, or where new arrays go.
    owners = {plain[leaf]: owner for leaf, owner in plan.adapter_owners().items()}
    anywhere = jnp.zeros(()).sharding
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
    check_finite(
        {p: leaf for p, leaf in loaded.items() if is_floating(leaf)}, f"loaded from {path}"
    )
    names = {plain: last_name(path) for path, plain in plan.plain_paths().items()}
    dtypes = loaded_dtypes({leaf: loaded[leaf].dtype for leaf in owners}, dtype, path)
    loaded |= {leaf: loaded[leaf].astype(own) for leaf, own in dtypes.items()}
    for leaf, (kernel, axes) in owners.items():
        loaded[leaf] = box_like(leaves[kernel], loaded[leaf], axes, names[leaf])
    for leaf in wanted.keys() - owners.keys():
        loaded[leaf] = rebox(leaves[leaf], loaded[leaf])
    frozen = {path: leaf for path, leaf in leaves.items() if path not in wanted}
    adapters = {leaf: loaded.pop(name) for leaf, name in plain.items()}
    own = plan_with_dtypes(plan, {leaf: dtypes[name] for leaf, name in plain.items()})
    return unflatten_like(frozen | loaded | adapters, params), own


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
