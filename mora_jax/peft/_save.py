"""Writing the two files of an adapter in PEFT's format: what they can say, and the files whole."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mora_jax._arrays.paths import listing
from mora_jax._schemes.base import Scheme
from mora_jax._schemes.registry import MORA_TYPES
from mora_jax._torch.directories import new_directory
from mora_jax.peft._config import (
    CONFIG,
    TENSORS,
    PeftConfig,
    ends_as,
    pattern_of,
)

_KNOWN = {str(scheme) for scheme in MORA_TYPES}


def config_for(
    schemes: Mapping[str, Scheme],
    ranks: Mapping[str, int],
    others: set[str],
    *,
    layers: Mapping[str, str],
    dropout: float = 0.0,
) -> PeftConfig:
    """The config of an adapter.

    Args:
      schemes: scheme of every adapted module.
      ranks: its rank.
      others: the model's further modules.
      layers: path of the layer that each module is, for errors.
      dropout: its rate.

    Raises:
      ValueError: naming the layers, where the format has no words for it.
    """
    kinds: dict[str, set[str]] = {}
    for module, scheme in schemes.items():
        # LoRA's alpha may differ from module to module, nothing else.
        kind = str(scheme) if scheme.lora_alpha(1) is None else type(scheme).__name__
        kinds.setdefault(kind, set()).add(layers[module])
    unknown = {str(s) for s in schemes.values() if s.lora_alpha(1) is None} - _KNOWN
    if unknown:
        found = "; ".join(f"{kind} in layers {listing(kinds[kind])}" for kind in sorted(unknown))
        raise ValueError(
            f"not saved: the authors' code lacks {found}. It has {', '.join(sorted(_KNOWN))} and "
            "LowRank. checkpoint.save_adapters saves every scheme."
        )
    if len(kinds) > 1:
        found = "; ".join(f"{kind} in layers {listing(kinds[kind])}" for kind in sorted(kinds))
        raise ValueError(f"not saved: an adapter in the authors' format has one scheme: {found}.")
    mora_type = MORA_TYPES.get(next(iter(schemes.values())))
    rank, own_ranks = _usual(ranks)
    found = {module: scheme.lora_alpha(ranks[module]) for module, scheme in schemes.items()}
    alphas = {module: _number(alpha) for module, alpha in found.items() if alpha is not None}
    alpha, own_alphas = _usual(alphas) if alphas else (rank, {})
    short = {module.rpartition(".")[2] for module in schemes}
    # The ends of the names, as one writes them by hand, where they name no other module.
    clear = not any(ends_as(tuple(short), module) for module in others)
    targets = tuple(sorted(short if clear else schemes))
    config = PeftConfig(mora_type, rank, alpha, targets, own_ranks, own_alphas, dropout=dropout)
    if confused := [module for module in others if config.selects(module)]:
        raise ValueError(
            f"not saved: {listing(confused)} are not adapted, but their names end as those of "
            "adapted modules do, and PEFT tells them by their ends."
        )
    for name in {*own_ranks, *own_alphas}:
        pattern = pattern_of(name)
        for module in schemes:
            if module != name and pattern.match(module):
                raise ValueError(
                    f"not saved: {module!r} (layer {layers[module]!r}) ends as {name!r} does, "
                    "which has another rank or alpha, and PEFT tells them by their ends."
                )
    return config


def _number(alpha: float) -> float:
    """Whole numbers without a point, as people write them."""
    return int(alpha) if alpha == int(alpha) else alpha


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the commonest value, those that differ from it)."""
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    return usual, {name: value for name, value in values.items() if value != usual}


def write(path: pathlib.Path, config: str, tensors: dict[str, np.ndarray]) -> None:
    """Writes a directory that is either whole or not there."""
    with new_directory(path) as new:
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        (new / CONFIG).write_text(config)
