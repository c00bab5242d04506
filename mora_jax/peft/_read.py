"""Reading the two files of an adapter in PEFT's format, with nothing taken on trust."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from mora_jax._arrays.paths import listing
from mora_jax._torch.names import TorchKernel
from mora_jax.peft._config import CONFIG, TENSORS, PeftConfig, read_config, tensor_name

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def read(path: pathlib.Path) -> tuple[PeftConfig, dict[str, np.ndarray]]:
    """The config, and the tensors in the file's dtypes, floating and finite.

    Raises:
      FileNotFoundError: where one of the two files is missing.
      ValueError: naming the file, where it is a pickle, is damaged, or holds what no adapter does.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no adapter at {path}: not a directory.")
    if (index := path / f"{TENSORS}.index.json").exists():
        raise ValueError(f"{index}: an adapter is one file; no index is followed to others.")
    if not (path / TENSORS).is_file() and (path / "adapter_model.bin").exists():
        raise ValueError(
            f"{path / 'adapter_model.bin'} is a pickle, which runs code when it is opened: not "
            "read. Let PEFT save the adapter as safetensors (safe_serialization=True)."
        )
    for name in (CONFIG, TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"no adapter at {path}: there is no file {name}.")
    config, file = read_config(path / CONFIG), path / TENSORS
    data = file.read_bytes()
    # A zip of torch.save, or a pickle; safetensors may begin so too, with the size of its header.
    if data.startswith(b"PK\x03\x04") or (data[:1] == b"\x80" and data[8:9] != b"{"):
        raise ValueError(f"{file} is a pickle under another name, not safetensors: not read.")
    try:
        # Raw bytes, as framework="numpy" has no bfloat16 in every version.
        entries = safetensors.deserialize(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is not safetensors, or is damaged: {error}") from error
    return config, {name: _array(file, name, entry) for name, entry in entries}


def _array(file: pathlib.Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(
            f"{file}: {name!r} is {entry['dtype']}; an adapter's numbers are one of "
            f"{', '.join(_DTYPES)}."
        )
    if dtype == "float64" and jnp.result_type(float) != dtype:
        raise ValueError(
            f"{file}: {name!r} is F64, which JAX holds only with jax_enable_x64; not narrowed."
        )
    array = np.frombuffer(entry["data"], jnp.dtype(dtype)).reshape(entry["shape"])
    if not np.isfinite(array).all():
        raise ValueError(f"{file}: {name!r} holds numbers that are not finite.")
    return array


def check_modules(
    file: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    config: PeftConfig,
    kernels: Mapping[str, TorchKernel],
    left: Mapping[str, str],
) -> None:
    """Raises ValueError unless the tensors are those of the modules that the config adapts."""
    known = {module for kernel in kernels.values() for module in kernel.modules}
    matches = {name: _TENSOR.fullmatch(name) for name in tensors}
    if odd := [name for name, match in matches.items() if match is None]:
        raise ValueError(
            f"{file} holds {listing(odd)}; an adapter holds 'base_model.model.<module>."
            "lora_A.weight' and '...lora_B.weight' alone (PEFT adds embeddings and heads unless it "
            "saves with save_embedding_layers=False)."
        )
    present = {match[1]: name for name, match in matches.items() if match is not None}
    if strange := present.keys() - known:
        raise ValueError(
            f"{file}: {listing(present[module] for module in strange)}: the model has no such "
            f"modules. By names it has {listing(known) or 'none'}"
            + (f"; left out: {'; '.join(sorted(left.values())[:4])}" if left else "")
            + ". Is the adapter of another model, or do its names differ (names=)?"
        )
    chosen = {module for module in known if config.selects(module)}
    if surplus := present.keys() - chosen:
        raise ValueError(
            f"{file} holds {listing(present[module] for module in surplus)}, which target_modules "
            f"of {CONFIG} do not name; PEFT would leave them out without a word."
        )
    wanted = {tensor_name(module, side) for module in chosen for side in "AB"}
    if missing := wanted - tensors.keys():
        raise ValueError(f"{file} lacks {listing(missing)}, which {CONFIG} speaks of.")
    if not chosen:
        raise ValueError(f"{file} holds no adapter.")
