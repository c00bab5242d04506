"""What changes in an NNX model beside its parameters: the statistics of batch norms.

They are saved with the adapters and given back with them: adapters that were trained beside other
statistics compute something else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mora_jax._arrays.boxes import AdapterIds, unbox
from mora_jax._arrays.paths import list_paths

#: Parameters are the plan's; the others say how a call runs, and nothing that was learned.
_OTHERS = (nnx.Param, nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation, AdapterIds)


def statistics(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the leaves that are statistics: variables of NNX that are no parameters."""
    return {path: leaf for path, leaf in leaves.items() if _is_statistic(leaf)}


def check_statistics(
    path: os.PathLike[str], saved: Iterable[str], leaves: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the statistics that a checkpoint holds.

    Args:
      path: the checkpoint's.
      saved: paths of what it holds beside adapters and `also_train`.
      leaves: the model's, where the statistics go.

    Raises:
      ValueError: if the model lacks one of them.
    """
    found = statistics(leaves)
    if missing := set(saved) - found.keys():
        raise ValueError(
            f"{path} holds {list_paths(missing)} beside its adapters, such as the statistics of a "
            "batch norm, and the model given has no such variables: load_adapters(directory, "
            "nnx.state(model)), the whole state and not its parameters alone. If you gave that, "
            "the checkpoint is damaged or of another model."
        )
    return {name: tuple(unbox(found[name]).shape) for name in saved}


def is_floating(leaf: Any) -> bool:
    """Whether a leaf may hold numbers that are not finite; statistics may be counts."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_statistic(leaf: Any) -> bool:
    known = isinstance(leaf, nnx.Variable) and not isinstance(leaf, _OTHERS)
    return known and hasattr(unbox(leaf), "dtype")
