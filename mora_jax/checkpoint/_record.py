"""What saved adapters say of themselves: their plan, the base that they fit, what they must hold.

It is text beside the arrays of an Orbax checkpoint, and is checked against the arrays that are
there and against the base that they are loaded beside.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.checksums import checksums
from mora_jax._arrays.paths import is_adapter, list_paths
from mora_jax._plans.plan import Plan
from mora_jax._text.json_reader import read_json

T = TypeVar("T")

#: Names in the custom metadata. Format 1 had the plan alone, 2 has the others too.
_PLAN, _RECORD, _DIGEST = "mora_jax_plan", "mora_jax_record", "mora_jax_digest"
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself; of format 1, the plan alone.

    Attributes:
      plan: the plan.
      base: path -> {"shape", "dtype"} of the parameters beside which it was trained, "checksum" too
        where they have a fingerprint.
      arrays: path -> {"shape", "dtype", "checksum"} of what is saved; None in format 1.
      metadata: what the user gave.
    """

    plan: Plan
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field in (self.base, {} if self.arrays is None else self.arrays, {"": self.metadata}):
            if not all(isinstance(of, Mapping) for of in (field, *dict(field).values())):
                raise ValueError(f"its record has {field!r:.100}, and not fields by path")


def to_custom(
    plan: Plan,
    base: Mapping[str, Any],
    arrays: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
) -> dict[str, str]:
    """The custom metadata of a checkpoint; the arguments are the fields of a `Record`.

    Raises:
      ValueError: where the user's metadata is no JSON.
    """
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
    return {_PLAN: text, _RECORD: record, _DIGEST: digest_of(text, record)}


def from_custom(path: os.PathLike[str], custom: Any) -> Record:
    """The record in the custom metadata of the checkpoint at `path`.

    Raises:
      ValueError: where it is damaged, of a later version of this library, or another's.
    """
    if not isinstance(custom, dict) or not isinstance(custom.get(_PLAN), str):
        raise ValueError(f"{path} is an Orbax checkpoint, but not one of save_adapters: no plan.")
    text, record, digest = custom[_PLAN], custom.get(_RECORD), custom.get(_DIGEST)
    fields: dict[str, Any] = {}
    if record is not None or digest is not None:
        text, record = str(text), str(record)
        fields = with_path_in_errors(path, lambda: dict(read_json(record)))
        if fields.get("format") != _FORMAT:
            raise ValueError(
                f"{path} has format {fields.get('format')!r} of a later mora_jax; this version "
                f"reads formats up to {_FORMAT}."
            )
        if digest != digest_of(text, record):
            raise ValueError(f"{path} is damaged: its metadata are not those that were saved.")
        fields.pop("format")
    plan = with_path_in_errors(path, lambda: Plan.from_json(text))
    return with_path_in_errors(path, lambda: Record(plan, **fields))


def with_path_in_errors(path: os.PathLike[str], read: Callable[[], T]) -> T:
    """What `read` gives, its errors as one that names the checkpoint."""
    try:
        return read()
    except Exception as error:
        # Of Orbax and TensorStore: a dozen kinds, by which of the files is damaged.
        raise ValueError(
            f"{path} is no adapter saved by save_adapters, or damaged: {error!r:.300}"
        ) from error


def check_fits(path: os.PathLike[str], record: Record, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError with every difference between the base saved with and the one given."""
    plan, differences, notes = record.plan, [], []
    shapes = {
        kernel: spec.kernel_shape
        for kernel, spec in zip(plan.kernel_paths(), plan.values(), strict=True)
    }
    saved = kernels_in(record)
    known = ((kernel, record.base.get(kernel, {})) for kernel in shapes if kernel not in saved)
    prints = {kernel: of["checksum"] for kernel, of in known if "checksum" in of}
    for name, shape in {**shapes, **dict(plan.also_train)}.items():
        if name not in leaves:
            differences.append(f"no parameter at {name!r}, which had shape {tuple(shape)}")
            prints.pop(name, None)
            continue
        value = unbox(leaves[name])
        if tuple(value.shape) != tuple(shape):
            differences.append(f"{name!r} has shape {tuple(value.shape)}, and had {tuple(shape)}")
            prints.pop(name, None)
        dtype = record.base.get(name, {}).get("dtype")
        if dtype is not None and dtype != str(value.dtype):
            if name in prints and plan.merges:
                differences.append(
                    f"{name!r} is {value.dtype}, and was {dtype} when adapters were merged into it"
                )
            notes.append(f"(no error: {name!r} is {value.dtype}, and was {dtype})")
            prints.pop(name, None)
    found = fingerprint_of(plan, {name: leaves[name] for name in prints}) if prints else {}
    differences += [
        f"{name!r} holds other numbers than the kernel that these were trained beside"
        for name, number in found.items()
        if number != prints[name]
    ]
    if differences and plan.merges:
        notes.append(
            "(these adapters were trained after a merge_and_reset, which changed the base: give "
            "the merged parameters, or save the adapted kernels too, save_adapters(kernels=True))"
        )
    if differences:
        there = [name for name in leaves if not is_adapter(name)]
        raise ValueError(
            f"the adapters of {path} are of another model:\n  "
            + "\n  ".join(differences + notes)
            + f"\nThe parameters given are {list_paths(there)}."
        )


def kernels_in(record: Record) -> dict[str, tuple[int, ...]]:
    """Path and shape of the adapted kernels that are saved beside the adapters."""
    plan, arrays = record.plan, record.arrays or {}
    pairs = zip(plan.kernel_paths(), plan.values(), strict=True)
    return {kernel: spec.kernel_shape for kernel, spec in pairs if kernel in arrays}


def check_saved(
    path: os.PathLike[str],
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any],
    arrays: Mapping[str, Any] | None,
) -> None:
    """Raises ValueError unless the checkpoint's arrays are those that it speaks of."""
    if wanted.keys() != saved.keys():
        raise ValueError(
            f"{path} does not hold the arrays of its plan: missing "
            f"{list_paths(wanted.keys() - saved.keys()) or 'none'}, surplus "
            f"{list_paths(saved.keys() - wanted.keys()) or 'none'}."
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


def shape_of(leaf: Any) -> dict[str, Any]:
    """Shape and dtype, as a record has them."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def digest_of(*texts: str) -> str:
    """What tells whether a plan or a record was changed."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def fingerprint_of(plan: Plan, leaves: Mapping[str, Any]) -> dict[str, int]:
    """Checksums of the floating kernels among these leaves; those of `also_train` are saved."""
    frozen = [name for name in plan.kernel_paths() if name in leaves and not plan.trains(name)]
    values = {name: unbox(leaves[name]) for name in frozen}
    return checksums({n: v for n, v in values.items() if isinstance(v, jax.Array | np.ndarray)})
