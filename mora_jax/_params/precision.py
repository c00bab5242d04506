"""The dtype that loaded adapters have: float32 unless told otherwise, for they go on training.

In bfloat16 or float16 the steps of an optimizer are mostly smaller than half a step between two
numbers, and are lost. Widening loses nothing: every narrow number is a float32 number.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from mora_jax._plans.plan import Plan

_LOGGER = logging.getLogger("mora_jax")


def loaded_dtypes(
    dtypes: Mapping[str, Any], dtype: DTypeLike | None, source: Any
) -> dict[str, str]:
    """Name -> the dtype to load an adapter's array in.

    Arrays that are narrower than `dtype` are widened to it, and a note is logged; others keep
    theirs.

    Args:
      dtypes: name -> dtype in the file.
      dtype: the least precise dtype to load in; None: the file's.
      source: what is read, for the note.

    Raises:
      TypeError: for a dtype that is not floating.
    """
    found = {name: jnp.dtype(own) for name, own in dtypes.items()}
    if dtype is None:
        return {name: own.name for name, own in found.items()}
    if not jnp.issubdtype(wanted := jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"dtype must be floating, or None for the file's, got {wanted.name!r}.")
    narrow = {name for name, own in found.items() if jnp.finfo(own).bits < jnp.finfo(wanted).bits}
    if narrow:
        held = ", ".join(sorted({found[name].name for name in narrow}))
        _LOGGER.info(
            "%s holds adapters in %s; they are loaded in %s, in which they can be trained on. "
            "dtype=None keeps the file's dtype.",
            source,
            held,
            wanted.name,
        )
    return {name: (wanted if name in narrow else own).name for name, own in found.items()}


def plan_with_dtypes(plan: Plan, dtypes: Mapping[str, str]) -> Plan:
    """The plan whose layers have the dtypes of these leaves, the widest where a layer's differ."""
    layers = []
    for path, spec in plan.items():
        own = (dtypes[leaf] for leaf in plan.leaf_paths(path).values())
        widest = max(own, key=lambda name: jnp.finfo(name).bits)
        config = dataclasses.replace(spec.config, dtype=widest)
        layers.append((path, dataclasses.replace(spec, config=config)))
    return dataclasses.replace(plan, layers=tuple(layers))
