"""What is asked of a checkpoint's files before Orbax reads them: are they larger than needed?

A file may come from anyone, and a few of its bytes can stand for gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorstore as ts
from etils import epath

from mora_jax._text.json_reader import read_json

#: The most bytes in one file of metadata, and the most values of JSON in it. Those of a plan with
#: ten thousand layers are a tenth of that.
_MOST_BYTES, _MOST_VALUES = 2**24, 2**20

#: Files of JSON in a checkpoint, whatever its version.
_METADATA = (
    "_CHECKPOINT_METADATA",
    "_METADATA",
    "*/_METADATA",
    "*/_sharding",
    "*/array_metadatas/*",
    "*/.zarray",
    "*/zarr.json",
)


def check_metadata(path: epath.Path) -> None:
    """Raises ValueError if a checkpoint's metadata are larger than those of any model."""
    for pattern in _METADATA:
        for file in sorted(path.glob(pattern)):
            if not file.is_file():
                continue
            size = file.stat().length
            if size > _MOST_BYTES:
                raise ValueError(f"{file.name} has {size:,} bytes, more than {_MOST_BYTES:,}")
            data = file.read_bytes()
            if sum(map(data.count, (b"{", b"[", b","))) > _MOST_VALUES:
                raise ValueError(f"{file.name} has more than {_MOST_VALUES:,} values")


def check_chunks(path: epath.Path) -> None:
    """Raises ValueError for an array in chunks larger than itself: TensorStore reads one whole.

    Orbax's own metadata say something of chunks too, but they are text beside the arrays. This is
    what TensorStore goes by.
    """
    if "://" in str(path):
        return  # of a bucket, which one's own programs write
    for manifest in (*path.glob("*/manifest.ocdbt"), *path.glob("manifest.ocdbt")):
        base = {"driver": "file", "path": f"{manifest.parent}/"}
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        for key in store.list().result():
            if key.endswith((b"/zarr.json", b"/.zarray")):
                _check_array(key, read_json(store.read(key).result().value.decode()))


def _check_array(key: bytes, fields: Mapping[str, Any]) -> None:
    grid = fields.get("chunk_grid", {}).get("configuration", {})
    shape, chunk = fields["shape"], fields.get("chunks") or grid["chunk_shape"]
    if any(a > max(b, 1) for a, b in zip(chunk, shape, strict=True)):
        raise ValueError(f"{key.decode()!r} has shape {shape}, and lies in chunks of {chunk}")
