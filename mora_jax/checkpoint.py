"""Saving and loading adapters with Orbax: the trained parameters and the plan, never the base.

A saved adapter is one Orbax checkpoint of the trained tree. A directory is one, or holds many of
them, by name and version:

    adapters/                     save_adapters("adapters", params, plan)

    library/poems/1/              save_adapters("library", params, plan, name="poems")
    library/poems/2/              and once more
    library/summaries/1/

Its custom metadata says by itself what it fits and what it must hold: the plan as JSON, with the
scheme of each layer's cycle; shape and dtype of every kernel of the base; shape, dtype and checksum
of every array. Orbax renames a directory when it is whole, so a torn one is never found, and what
was damaged later is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from mora_jax._checksums import all_finite, checksums
from mora_jax._mesh import beside, sharding_of
from mora_jax._params import Params, check_unadapted, split
from mora_jax._plan import Plan
from mora_jax._tree import flatten, is_adapter, listing, rebuild, unflatten
from mora_jax._variables import box_like, value_of, with_value

T = TypeVar("T")

#: Names in the custom metadata. Format 1 had the plan alone, 2 has the others too.
_PLAN, _RECORD, _DIGEST = "mora_jax_plan", "mora_jax_record", "mora_jax_digest"
_FORMAT = 2

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a checkpoint says of itself; of format 1, the plan alone."""

    plan: Plan
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field in (self.base, {} if self.arrays is None else self.arrays, {"": self.metadata}):
            if not all(isinstance(of, Mapping) for of in (field, *dict(field).values())):
                raise ValueError(f"its record has {field!r:.100}, and not fields by path")


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
    values = {path: value_of(leaf) for path, leaf in flatten(trainable).items()}
    path = epath.Path(directory).absolute()
    if name is None and path.exists():
        raise ValueError(f"{path} exists already; adapters are saved to a new directory.")
    if name is not None:
        _check_name(name)
        for folder in (path, path / name):
            if _is_checkpoint(folder):
                raise ValueError(f"{folder} is a saved adapter itself, and cannot hold named ones.")
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file, and cannot hold adapters.")
        path = path / name
    sums = checksums(values)
    _check_finite(path, values, "saved")
    base = {
        p: _shape_of(value_of(leaves[p])) for p in (*plan.kernel_paths(), *dict(plan.also_train))
    }
    if fingerprint:
        for kernel, checksum in _fingerprint(plan, leaves).items():
            base[kernel]["checksum"] = checksum
    arrays = {p: {**_shape_of(leaf), "checksum": sums[p]} for p, leaf in values.items()}
    try:
        record = json.dumps(
            {"format": _FORMAT, "base": base, "arrays": arrays, "metadata": dict(metadata or {})},
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata={metadata!r:.200} cannot be written as JSON: {error}"
        ) from error
    text = plan.to_json()
    custom: Any = {_PLAN: text, _RECORD: record, _DIGEST: _digest(text, record)}
    if name is None:
        ocp.save(path, unflatten(values), custom_metadata=custom)
        return 0
    with _new_version(path) as version:
        ocp.save(path / str(version), unflatten(values), custom_metadata=custom)
    return version


@contextlib.contextmanager
def _new_version(path: epath.Path) -> Iterator[int]:
    """A version of a name that no other program writes.

    Two that took the same one would delete each other's files. A directory is made by one of them
    alone (on file systems; buckets have no such thing). What a killed program leaves of it costs a
    number. The processes of one program take the same version.
    """
    version = max(_versions(path), default=0) + 1
    if jax.process_count() > 1:
        yield version
        return
    while True:
        claim = path / f".{version}.is_being_saved"
        try:
            claim.mkdir(parents=True)
        except FileExistsError:
            version += 1
            continue
        if not (path / str(version)).exists():
            break
        claim.rmdir()  # saved while we looked
        version += 1
    try:
        yield version
    finally:
        claim.rmdir()


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
    path = _find(epath.Path(directory).absolute(), name, version)
    record, saved = _read(path)
    plan, leaves = record.plan, flatten(params)
    _check_fits(path, record, leaves)
    check_unadapted(plan, leaves)
    wanted = {name: leaf.shape for name, leaf in plan.adapter_leaves().items()}
    wanted |= dict(plan.also_train)
    _check_saved(path, wanted, saved, record.arrays)
    # Orbax wants to be told where arrays go: to their kernel's mesh, or where new arrays go.
    owners, anywhere = plan.adapter_owners(), jnp.zeros(()).sharding
    abstract = {}
    for leaf, shape in wanted.items():
        kernel, axes = owners.get(leaf, (leaf, {axis: axis for axis in range(len(shape))}))
        place = sharding_of(value_of(leaves[kernel]))
        sharding = anywhere if place is None else beside(place, len(shape), axes)
        abstract[leaf] = jax.ShapeDtypeStruct(shape, saved[leaf].dtype, sharding=sharding)
    loaded = flatten(_reading(path, lambda: ocp.load(path, unflatten(abstract))))
    if record.arrays is not None:
        found = checksums(loaded)
        if other := [leaf for leaf in found if found[leaf] != record.arrays[leaf].get("checksum")]:
            raise ValueError(f"{path} is damaged: {listing(other)} are not the numbers saved.")
    _check_finite(path, loaded, "loaded")
    for leaf, (kernel, axes) in owners.items():
        loaded[leaf] = box_like(leaves[kernel], loaded[leaf], axes)
    for leaf, _ in plan.also_train:
        loaded[leaf] = with_value(leaves[leaf], loaded[leaf])
    frozen = {path: leaf for path, leaf in leaves.items() if path not in wanted}
    return rebuild(frozen | loaded, params), plan


def list_adapters(directory: str | os.PathLike[str]) -> list[SavedAdapters]:
    """What a directory of `save_adapters` holds, by name and version; no arrays are read.

    What is damaged is listed too, with its error. What Orbax had not finished is not.

    Raises:
      FileNotFoundError: where there is no such directory.
    """
    path = epath.Path(directory).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"no adapters at {path}.")
    if _is_checkpoint(path):
        return [_entry(path, "", 0)]
    return [
        _entry(path / name / str(version), name, version)
        for name in _names(path)
        for version in _versions(path / name)
    ]


def _entry(path: epath.Path, name: str, version: int) -> SavedAdapters:
    try:
        record, saved = _read(path)
    except ValueError as error:
        return SavedAdapters(name, version, None, 0, {}, {}, str(error))
    size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in saved.values())
    return SavedAdapters(name, version, record.plan, size, record.base, record.metadata)


def _check_name(name: Any) -> None:
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"name={name!r} is no name for adapters: up to 100 letters, digits, '.', '_' and '-', "
            "a letter or digit first."
        )


def _is_checkpoint(path: epath.Path) -> bool:
    return any((path / file).exists() for file in ("_CHECKPOINT_METADATA", "orbax.checkpoint"))


def _names(path: epath.Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if _NAME.fullmatch(p.name) and _versions(p))


def _versions(path: epath.Path) -> list[int]:
    """The versions there are; what Orbax has not finished has another name than a number."""
    names = [p.name for p in path.iterdir()] if path.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]*", name))


def _find(path: epath.Path, name: str | None, version: int | None) -> epath.Path:
    """The directory of one checkpoint."""
    if name is None:
        if version is not None:
            raise ValueError(f"version={version} of which name? There are {_has(path)}.")
        if not path.exists():
            raise FileNotFoundError(f"no adapters at {path}.")
        if not _is_checkpoint(path) and path.is_dir() and _names(path):
            raise ValueError(f"{path} holds several adapters; pass name=, one of {_has(path)}.")
        return path
    _check_name(name)
    versions = _versions(path / name)
    if not versions:
        raise FileNotFoundError(f"no adapters {name!r} at {path}; there are {_has(path)}.")
    if version is not None and version not in versions:
        raise FileNotFoundError(f"no version {version!r} of {name!r} at {path}: {versions}.")
    return path / name / str(versions[-1] if version is None else version)


def _has(path: epath.Path) -> str:
    return listing(_names(path) if path.is_dir() else ()) or "none"


def _reading(path: epath.Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:
        # Of Orbax and TensorStore: a dozen kinds, by which of the files is damaged.
        raise ValueError(
            f"{path} is no adapter saved by save_adapters, or damaged: {error!r:.300}"
        ) from error


def _read(path: epath.Path) -> tuple[_Record, dict[str, Any]]:
    """What a checkpoint says of itself, and shape and dtype of the arrays that Orbax finds."""
    found = _reading(path, lambda: ocp.metadata(path))
    custom: Any = found.custom_metadata
    if not isinstance(custom, dict) or not isinstance(custom.get(_PLAN), str):
        raise ValueError(f"{path} is an Orbax checkpoint, but not one of save_adapters: no plan.")
    text, record, digest = custom[_PLAN], custom.get(_RECORD), custom.get(_DIGEST)
    fields: dict[str, Any] = {}
    if record is not None or digest is not None:
        text, record = str(text), str(record)
        fields = _reading(path, lambda: dict(json.loads(record)))
        if fields.get("format") != _FORMAT:
            raise ValueError(
                f"{path} has format {fields.get('format')!r} of a later mora_jax; this version "
                f"reads formats up to {_FORMAT}."
            )
        if digest != _digest(text, record):
            raise ValueError(f"{path} is damaged: its metadata are not those that were saved.")
        fields.pop("format")
    plan = _reading(path, lambda: Plan.from_json(text))
    saved = _reading(path, lambda: flatten(found.metadata))
    return _reading(path, lambda: _Record(plan, **fields)), saved


def _check_fits(path: epath.Path, record: _Record, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError with every difference between the base saved with and the one given."""
    plan, differences, notes = record.plan, [], []
    shapes = {
        kernel: spec.kernel_shape
        for kernel, spec in zip(plan.kernel_paths(), plan.values(), strict=True)
    }
    known = ((kernel, record.base.get(kernel, {})) for kernel in shapes)
    prints = {kernel: of["checksum"] for kernel, of in known if "checksum" in of}
    for name, shape in {**shapes, **dict(plan.also_train)}.items():
        if name not in leaves:
            differences.append(f"no parameter at {name!r}, which had shape {tuple(shape)}")
            prints.pop(name, None)
            continue
        value = value_of(leaves[name])
        if tuple(value.shape) != tuple(shape):
            differences.append(f"{name!r} has shape {tuple(value.shape)}, and had {tuple(shape)}")
            prints.pop(name, None)
        dtype = record.base.get(name, {}).get("dtype")
        if dtype is not None and dtype != str(value.dtype):
            notes.append(f"(no error: {name!r} is {value.dtype}, and was {dtype})")
            prints.pop(name, None)
    found = _fingerprint(plan, {name: leaves[name] for name in prints}) if prints else {}
    differences += [
        f"{name!r} holds other numbers than the kernel that these were trained beside"
        for name, number in found.items()
        if number != prints[name]
    ]
    if differences:
        there = [name for name in leaves if not is_adapter(name)]
        raise ValueError(
            f"the adapters of {path} are of another model:\n  "
            + "\n  ".join(differences + notes)
            + f"\nThe parameters given are {listing(there)}."
        )


def _check_saved(
    path: epath.Path,
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any],
    arrays: Mapping[str, Any] | None,
) -> None:
    """Raises ValueError unless the checkpoint's arrays are those that it speaks of."""
    if wanted.keys() != saved.keys():
        raise ValueError(
            f"{path} does not hold the arrays of its plan: missing "
            f"{listing(wanted.keys() - saved.keys()) or 'none'}, surplus "
            f"{listing(saved.keys() - wanted.keys()) or 'none'}."
        )
    for name, shape in wanted.items():
        if tuple(saved[name].shape) != tuple(shape):
            raise ValueError(
                f"{path}: {name!r} was saved with shape {tuple(saved[name].shape)}, the plan says "
                f"{tuple(shape)}."
            )
        if jnp.result_type(saved[name].dtype) != saved[name].dtype:
            raise ValueError(
                f"{path}: {name!r} is {saved[name].dtype}, which JAX holds only with "
                "jax_enable_x64; not narrowed."
            )
        was = str(saved[name].dtype) if arrays is None else arrays.get(name, {}).get("dtype")
        if was != str(saved[name].dtype):
            raise ValueError(
                f"{path} is damaged: {name!r} is {saved[name].dtype}, and was saved as {was}."
            )


def _check_finite(path: epath.Path, values: Mapping[str, Any], done: str) -> None:
    finite = jax.device_get(all_finite(dict(values)))
    if bad := [name for name, good in finite.items() if not good]:
        raise ValueError(
            f"not {done}, {path}: {listing(bad)} hold numbers that are not finite. Training has "
            "probably diverged."
        )


def _shape_of(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _fingerprint(plan: Plan, leaves: Mapping[str, Any]) -> dict[str, int]:
    """Checksums of the floating kernels among these leaves; those of `also_train` are saved."""
    frozen = [name for name in plan.kernel_paths() if name in leaves and not plan.trains(name)]
    values = {name: value_of(leaves[name]) for name in frozen}
    return checksums({n: v for n, v in values.items() if isinstance(v, jax.Array | np.ndarray)})
