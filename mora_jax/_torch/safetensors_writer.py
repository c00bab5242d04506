"""Safetensors files written one tensor at a time, and which tensor goes into which file.

The library `safetensors` wants all tensors of a file at once, so that a file of 5 GB takes 5 GB of
memory. The format is a length, a header of JSON, and the tensors' bytes: the header needs shapes
alone, so it is written first, and the bytes follow as they come. Every file is then opened by the
library, which checks it, and its header is compared with what was to be written.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

#: What the format calls the dtypes that parameters have.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def write_tensors(
    path: str | os.PathLike[str],
    shapes: Shapes,
    read: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, holding one tensor at a time.

    Args:
      path: of the file.
      shapes: name -> shape and dtype of every tensor, in the order to write them in.
      read: gives the tensor of a name.
      metadata: beside the format that transformers asks for.

    Raises:
      TypeError: for a dtype that the format lacks.
      ValueError: where a tensor has not the shape and dtype that was said.

    >>> import tempfile, safetensors.numpy
    >>> shapes = {"norm": jax.ShapeDtypeStruct((2,), "float32")}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/a.safetensors", shapes, lambda _: np.ones(2, "float32"))
    ...     safetensors.numpy.load_file(f"{folder}/a.safetensors")
    {'norm': array([1., 1.], dtype=float32)}
    """
    # "pt" is what transformers asks for.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in shapes:
        end = offset + size_of(shapes[name])
        header[name] = {
            "dtype": _dtype_name(name, shapes[name]),
            "shape": list(shapes[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            tensor = np.asarray(read(name), order="C")
            if (tensor.shape, tensor.dtype) != (shapes[name].shape, shapes[name].dtype):
                raise ValueError(
                    f"{name!r} came as {tensor.dtype}{list(tensor.shape)}, not as "
                    f"{shapes[name].dtype}{list(shapes[name].shape)}."
                )
            file.write(tensor.reshape(-1).view(np.uint8).data)
    written = {name: (header[name]["dtype"], shapes[name].shape) for name in shapes}
    if (found := read_header(path)) != written:
        raise ValueError(f"{path} reads back as {found}, not as {written}.")


def read_header(
    path: str | os.PathLike[str], *, limit: int = 100_000_000
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of a file's tensors, as the library reads them; no tensor is read.

    Args:
      path: of the file.
      limit: the most bytes that its header may have.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not safetensors, is damaged, or has a longer header.
    """
    with open(path, "rb") as start:
        size = int.from_bytes(start.read(8), "little")
    if size > limit:
        raise ValueError(f"{path} has a header of {size:,} bytes; at most {limit:,} are expected.")
    try:
        with safe_open(path, "numpy") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()
            }
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not safetensors, or is damaged: {error}") from error


def shards(shapes: Shapes, limit: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in the order to write them in.

    Layers go into files by their numbers. A file has at most `limit` bytes of tensors, or one
    tensor that is larger, and is named as Hugging Face names it.

    Raises:
      ValueError: where the limit is no positive number.

    >>> shapes = {f"layers.{n}": jax.ShapeDtypeStruct((4,), "float32") for n in (10, 9, 8)}
    >>> shards(shapes, 32)
    {'model-00001-of-00002.safetensors': ['layers.8', 'layers.9'],
     'model-00002-of-00002.safetensors': ['layers.10']}
    >>> list(shards(shapes, 100))
    ['model.safetensors']
    """
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"the limit of a file is a positive number of bytes, got {limit!r}.")
    files: list[list[str]] = [[]]
    size = 0
    for name in sorted(shapes, key=_by_numbers):
        own = size_of(shapes[name])
        if files[-1] and size + own > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += own
    # Wide numbers first, as the library has it: each tensor then begins at a multiple of its size.
    for own in files:
        own.sort(key=lambda name: -shapes[name].dtype.itemsize)
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    count = len(files)
    return {f"model-{n:05d}-of-{count:05d}.safetensors": own for n, own in enumerate(files, 1)}


def size_of(shape: jax.ShapeDtypeStruct) -> int:
    """Bytes of one tensor."""
    return math.prod(shape.shape) * shape.dtype.itemsize


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """A key to sort by that puts layer 9 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdigit() else 0, part) for part in parts]


def _dtype_name(name: str, shape: jax.ShapeDtypeStruct) -> str:
    if shape.dtype.name not in _DTYPES:
        raise TypeError(
            f"{name!r} is {shape.dtype}, which safetensors files cannot hold; they hold "
            f"{', '.join(_DTYPES)}."
        )
    return _DTYPES[shape.dtype.name]
