"""A base model's directory: its config, its tensors' names and shapes, and what is copied of it.

The directory may be somebody else's. Only files directly in it are read.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from mora_jax._arrays.paths import list_paths
from mora_jax._text.json_reader import read_json_file
from mora_jax._torch.safetensors_writer import Shapes, read_header
from mora_jax.export._settings import EMBEDDING, HEAD, QUANTIZATION

#: What a model's directory holds beside its weights, code of its own included.
_SIDE_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
#: What would tell a loader that the weights are others than they are: an adapter over another
#: base, or packed ones.
_NEVER_COPIED = {
    "adapter_config.json",
    "config.json",
    "hf_quant_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quantize_config.json",
}
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"

#: Name -> (dtype, shape).
Header = dict[str, tuple[str, tuple[int, ...]]]


def read_config(base: pathlib.Path) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not an object of JSON.
    """
    file = base / "config.json"
    if not file.is_file():
        adapter = (base / "adapter_config.json").is_file()
        raise FileNotFoundError(
            f"no config.json in {base}"
            + (": it is an adapter's directory. Give its base model's." if adapter else ".")
        )
    config = read_json_file(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, not an object of fields.")
    return config


def check_like(base: pathlib.Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raises ValueError if the base model's safetensors have other names or shapes.

    The vocabulary may have been resized. Of packed weights, only tensors that are not packed tell.
    """
    packed = any(key in part for part in _parts(config) for key in QUANTIZATION)
    theirs = _header(base, shapes)
    missing, surplus = theirs.keys() - shapes.keys(), shapes.keys() - theirs.keys()
    # Whether there is a head of its own is for the config to say.
    if theirs and not packed and (missing | surplus) - {HEAD}:
        raise ValueError(
            f"not the tensors of {base}: missing {list_paths(missing) or 'none'}, surplus "
            f"{list_paths(surplus) or 'none'}. Are the names right?"
        )
    for name in theirs.keys() & shapes.keys():
        (dtype, shape), ours = theirs[name], shapes[name].shape
        if packed and dtype not in ("F32", "BF16", "F16"):
            continue
        if name.endswith((EMBEDDING, HEAD)):
            shape, ours = shape[1:], ours[1:]
        if shape != ours:
            raise ValueError(
                f"{name!r} would have shape {shapes[name].shape}, in {base} it has "
                f"{theirs[name][1]}."
            )


def copy_side_files(base: pathlib.Path, new: pathlib.Path) -> None:
    """Tokenizer, generation config, code, licence: what is no weight and no page about the base."""
    for file in base.iterdir():
        kept = file.suffix in _SIDE_FILES or file.stem in ("LICENSE", "NOTICE")
        index = file.name.endswith(".index.json") or file.name in _NEVER_COPIED
        if kept and not index and file.is_file():
            shutil.copyfile(file, new / file.name)


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    return [config, *(part for value in inner for part in _parts(value))]


def _header(base: pathlib.Path, shapes: Shapes) -> Header:
    """Name -> (dtype, shape), of the files that PyTorch would read; none if there are none."""
    header: Header = {}
    for file in _files(base):
        if not file.is_file():
            raise ValueError(f"{base / _INDEX} names {file.name!r}, which is not there.")
        # More than a packed model's names and shapes take.
        found = read_header(file, limit=2**20 + 8 * 1024 * len(shapes))
        if both := header.keys() & found.keys():
            raise ValueError(f"{base}: several files hold {list_paths(both)}.")
        header |= found
    # Constants that older versions wrote.
    return {name: entry for name, entry in header.items() if not name.endswith("inv_freq")}


def _files(base: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights: the whole one, or those of the index; others are left over."""
    if (base / _WHOLE).is_file():
        return [base / _WHOLE]
    if not (base / _INDEX).is_file():
        if left := sorted(file.name for file in base.glob("model*.safetensors")):
            raise ValueError(
                f"{base} holds {list_paths(left)}, and neither {_WHOLE} nor {_INDEX}, which would "
                "say which of them count. Is the download whole?"
            )
        return []
    index = read_json_file(base / _INDEX, limit=2**26)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{base / _INDEX} has no weight_map of names to files.")
    for name in names.values():
        if pathlib.PureWindowsPath(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{base / _INDEX}: {name!r:.200} is not a safetensors file in the same directory."
            )
    return [base / name for name in sorted(set(names.values()))]
