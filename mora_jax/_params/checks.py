"""Does it fit? What every function asks of a plan and of parameters before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.checksums import all_finite
from mora_jax._arrays.paths import ADAPTER, is_adapter, join_path, list_paths
from mora_jax._plans.plan import Plan
from mora_jax._product.per_example import bank_size, holds_bank

#: Trained numbers that a file may have beside any model, and how many of each of the model's.
_ALWAYS_ALLOWED, _LARGEST_SHARE = 2**22, 4


def check_unadapted(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless the leaves are a base model's, and the plan's."""
    if present := [path for path in leaves if is_adapter(path)]:
        raise ValueError(
            f"the parameters have adapters already: {list_paths(present)}. If these are parameters "
            f"of the model's own, rename the dict {ADAPTER!r}: the name is the library's."
        )
    check_base(plan, leaves)


def check_base(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless the leaves hold the kernels that the plan speaks of."""
    wanted = {join_path(path, spec.kernel_name): spec.kernel_shape for path, spec in plan.items()}
    _check_shapes(wanted | dict(plan.also_train), leaves, "base model")
    for path in wanted:
        dtype = unbox(leaves[path]).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{path!r} is {dtype}; a kernel must be floating to take a delta.")


def check_sizes(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError if the plan trains many times more numbers than the base model has.

    A file may say anything, and a few bytes of it can stand for gigabytes of zeros. So this is
    asked before arrays are read. Adapters that can act are smaller than twice their kernels.
    """
    held = sum(math.prod(np.shape(unbox(leaf))) for leaf in leaves.values())
    if plan.trained_parameters > max(_ALWAYS_ALLOWED, _LARGEST_SHARE * held):
        layer, spec = max(plan.layers, key=lambda item: item[1].parameters)
        raise ValueError(
            f"the plan has {plan.trained_parameters:,} trained numbers, and the base model has "
            f"{held:,}. The largest adapter is that of {layer!r}: rank {spec.config.rank}, "
            f"matrices of {spec.size} rows beside a kernel of shape {spec.kernel_shape}. Is the "
            "file damaged, or from someone you do not trust?"
        )


def check_adapted(plan: Plan, leaves: Mapping[str, Any], *, count: int = 1) -> None:
    """Raises ValueError unless the leaves hold the plan's kernels and its adapters, no others.

    Where `count` is more than one, the adapters are banks of as many.
    """
    check_adapters(plan, leaves, count=count)
    check_base(plan, leaves)


def check_adapters(plan: Plan, leaves: Mapping[str, Any], *, count: int = 1) -> None:
    """The part of `check_adapted` that needs no base."""
    wanted = plan.adapter_leaves(count)
    present = {path for path in leaves if is_adapter(path)}
    if not present:
        raise ValueError("the parameters hold no adapters; call attach(plan, params) first.")
    if surplus := present - wanted.keys():
        raise ValueError(
            f"the parameters hold adapters that the plan lacks: {list_paths(surplus)}."
        )
    if count == 1 and (held := adapters_per_layer(plan, leaves)) > 1:
        raise holds_bank(held, "the parameters")
    _check_shapes({path: leaf.shape for path, leaf in wanted.items()}, leaves, "adapters")


def adapters_per_layer(plan: Plan, leaves: Mapping[str, Any]) -> int:
    """How many adapters each layer holds; 1 if the shapes of the first layer do not tell."""
    for path, spec in plan.items():
        names = {name: leaf for name, leaf in plan.leaf_paths(path).items() if leaf in leaves}
        held = {name: unbox(leaves[leaf]) for name, leaf in names.items()}
        if held and all(getattr(leaf, "ndim", 0) > spec.row_axis for leaf in held.values()):
            return bank_size(held, spec.rows, spec.row_axis)
    return 1


def check_paths(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless there are leaves where the plan has the base model's kernels."""
    _check_present([*plan.kernel_paths(), *dict(plan.also_train)], leaves, "base model")


def _check_present(wanted: Iterable[str], leaves: Mapping[str, Any], what: str) -> None:
    if missing := set(wanted) - leaves.keys():
        raise ValueError(
            f"the plan does not fit the {what}: no parameter at {list_paths(missing)}. "
            f"There are: {list_paths(leaves)}. Was the plan made for another model?"
        )


def _check_shapes(
    wanted: Mapping[str, tuple[int, ...]], leaves: Mapping[str, Any], what: str
) -> None:
    _check_present(wanted, leaves, what)
    for path, shape in wanted.items():
        value = unbox(leaves[path])
        if not hasattr(value, "shape"):
            raise TypeError(f"{path!r} is a {type(value).__name__}, not an array.")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"the plan does not fit the {what}: {path!r} has shape "
                f"{tuple(value.shape)}, the plan says {shape}. "
                "Was the plan made for another model, or for another rank?"
            )


def refuse_dora(plan: Plan, done: str, why: str) -> None:
    """Raises ValueError where layers have DoRA, for what needs a delta alone."""
    if layers := [path for path, spec in plan.items() if spec.config.dora]:
        raise ValueError(f"not {done}: DoRA {why} (layers {list_paths(layers)}).")


def check_finite(leaves: Mapping[str, Any], done: str) -> None:
    """Raises ValueError naming every leaf that holds a number that is not finite.

    Under a transformation, where values are unknown, it raises nothing.

    Args:
      leaves: path -> array, in its box or without one.
      done: what is not done then, such as "merged", for the error.
    """
    found = all_finite({path: unbox(leaf) for path, leaf in leaves.items()})
    if any(isinstance(finite, Tracer) for finite in found.values()):
        return
    bad = [path for path, finite in jax.device_get(found).items() if not finite]
    if bad:
        raise ValueError(
            f"not {done}: trained parameters hold numbers that are not finite: {list_paths(bad)}. "
            "The parameters are as they were; training has probably diverged."
        )


def check_adapters_finite(plan: Plan, leaves: Mapping[str, Any], done: str) -> None:
    """`check_finite` of the plan's adapters among these leaves."""
    check_finite({path: leaves[path] for path in plan.adapter_leaves()}, done)
