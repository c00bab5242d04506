"""What tells whether an adapter's two files are as they were saved.

PEFT's format has nothing of the kind. The digest stands in the metadata of the tensors' file, at
which PEFT does not look. It is of what the files mean, so fields that change no number may change.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors import safe_open

from mora_jax._schemes.base import Scheme

_KEY = "mora_jax_digest"


def metadata_of(
    schemes: Mapping[str, Scheme],
    ranks: Mapping[str, int],
    dropout: float,
    tensors: Mapping[str, np.ndarray],
) -> dict[str, str]:
    """The metadata of the tensors' file.

    Args:
      schemes: scheme of every adapted module.
      ranks: its rank.
      dropout: the rate of all.
      tensors: name -> tensor, as PyTorch has them.
    """
    said = []
    for module in sorted(schemes):
        rank, alpha = ranks[module], schemes[module].lora_alpha(ranks[module])
        scheme = schemes[module].to_dict() if alpha is None else float(alpha)
        said.append([module, rank, scheme])
    digest = hashlib.sha256(json.dumps([said, float(dropout)]).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    return {_KEY: digest.hexdigest()}


def check_digest(path: pathlib.Path, wanted: Mapping[str, str]) -> None:
    """Raises ValueError if the file has another digest; other programs' files have none.

    Args:
      path: the tensors' file.
      wanted: as `metadata_of` gives it for what was read.
    """
    with safe_open(path, "numpy") as opened:
        found = (opened.metadata() or {}).get(_KEY)
    if found is not None and found != wanted[_KEY]:
        raise ValueError(
            f"{path} is damaged, or the config beside it: the numbers, ranks, scales or modules "
            "are not those that were saved. If you changed them on purpose, save the tensors again "
            f"without {_KEY!r} in the file's metadata."
        )
