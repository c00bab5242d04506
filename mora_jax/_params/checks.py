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
from mora_jax._arrays.paths import ADAPTER, is_adapter, join_path, last_name, list_paths
from mora_jax._plans.config import MoRAConfig
from mora_jax._plans.plan import Plan
from mora_jax._product.dora import MAGNITUDE
from mora_jax._product.per_example import bank_size, holds_bank

#: Trained numbers that a file may have beside any model, and how many of each of the model's.
_ALWAYS_ALLOWED, _LARGEST_SHARE = 2**22, 4


def check_plan(plan: Any) -> None:
    """Raises TypeError for what is no plan."""
    if isinstance(plan, Plan):
        return
    found = f"expected a Plan, got a {type(plan).__name__}. "
    if isinstance(plan, MoRAConfig):
        found += "A config has no layers: plan = mora_jax.plan(mora_jax.adapt(model, config), ...)."
    elif isinstance(plan, Mapping):
        found += "Are the arguments swapped? It is attach(plan, params), and (params, plan) after."
    else:
        found += "mora_jax.plan(adapted_model, *inputs) makes one."
    raise TypeError(found)


def check_unadapted(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless the leaves are a base model's, and the plan's."""
    check_plan(plan)
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
    check_plan(plan)
    wanted = plan.adapter_leaves(count)
    present = {path for path in leaves if is_adapter(path)}
    if not present:
        raise ValueError("the parameters hold no adapters; call attach(plan, params) first.")
    if surplus := present - wanted.keys():
        _check_schemes(plan, surplus)
        raise ValueError(
            f"the parameters hold adapters that the plan lacks: {list_paths(surplus)}."
        )
    if count == 1 and (held := adapters_per_layer(plan, leaves)) > 1:
        raise holds_bank(held, "the parameters")
    _check_shapes({path: leaf.shape for path, leaf in wanted.items()}, leaves, "adapters")


def no_adapter(layer: str) -> ValueError:
    """What is raised where a model looks for an adapter and the parameters have none."""
    return ValueError(
        f"the parameters have no adapter for the layer {layer!r}. If they have none at all, add "
        "new ones, params = mora_jax.attach(plan, params), or load saved ones with "
        "mora_jax.checkpoint.load_adapters. If they have some, the plan was made by a call that "
        "does not run this layer: make it with plan(model, *inputs, method=...) of one that runs "
        "every layer, or leave the layer out with MoRAConfig.exclude."
    )


def other_adapter(
    layer: str, there: Iterable[str], wanted: Iterable[str], scheme: Any
) -> ValueError:
    """What is raised where a model or a plan has another scheme than the parameters."""
    there, wanted = set(there), set(wanted)
    if there ^ wanted == {MAGNITUDE}:
        has = "no magnitude, and the model asks for one" if MAGNITUDE in wanted else "a magnitude"
        return ValueError(
            f"the adapter of the layer {layer!r} has {has}: adapt the model with the same "
            "dora= as the parameters were made with, or with their plan."
        )
    return ValueError(
        f"the parameters hold an adapter of another scheme for the layer {layer!r}: "
        f"{list_paths(there)}, and {scheme} looks for {list_paths(wanted)}. After merge_and_reset "
        "and load_adapters, go on with the plan that they return: model = mora_jax.adapt("
        "base_model, plan). A jitted step must take the model as a static argument, or be jitted "
        "anew; one that keeps the old model would train the old grouping."
    )


def adapters_per_layer(plan: Plan, leaves: Mapping[str, Any]) -> int:
    """How many adapters each layer holds; 1 if the shapes of the first layer do not tell."""
    for path, spec in plan.items():
        names = {name: leaf for name, leaf in plan.leaf_paths(path).items() if leaf in leaves}
        held = {name: unbox(leaves[leaf]) for name, leaf in names.items()}
        if held and all(getattr(leaf, "ndim", 0) > spec.row_axis for leaf in held.values()):
            return bank_size(held, spec.rows, spec.row_axis)
    return 1


def _check_schemes(plan: Plan, surplus: set[str]) -> None:
    """Raises ValueError where adapters of the plan's own layers have another scheme than its."""
    for layer, spec in plan.items():
        wanted = plan.leaf_paths(layer).values()
        beside = {path.rpartition("/")[0] for path in wanted}
        if there := {path for path in surplus if path.rpartition("/")[0] in beside}:
            found, looked_for = (set(map(last_name, paths)) for paths in (there, wanted))
            raise other_adapter(layer, found, looked_for, spec.scheme)


def check_paths(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError unless there are leaves where the plan has the base model's kernels."""
    _check_present([*plan.kernel_paths(), *dict(plan.also_train)], leaves, "base model")


def _check_present(wanted: Iterable[str], leaves: Mapping[str, Any], what: str) -> None:
    if missing := set(wanted) - leaves.keys():
        inside = {f"params/{path}" for path in missing} <= leaves.keys()
        raise ValueError(
            f"the plan does not fit the {what}: no parameter at {list_paths(missing)}. "
            f"There are: {list_paths(leaves)}. "
            + ("Give variables['params']." if inside else "Was the plan made for another model?")
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
    if bad := _not_finite(leaves):
        raise ValueError(
            f"not {done}: trained parameters hold numbers that are not finite: {list_paths(bad)}. "
            "The parameters are as they were; training has probably diverged."
        )


def check_adapters_finite(plan: Plan, leaves: Mapping[str, Any], done: str) -> None:
    """`check_finite` of the plan's adapters among these leaves."""
    check_finite({path: leaves[path] for path in plan.adapter_leaves()}, done)


def check_results_finite(
    results: Mapping[str, Any], before: Mapping[str, Any], done: str = "merged"
) -> None:
    """Raises ValueError naming every kernel that a merge would fill with infinite numbers.

    Under a transformation, where values are unknown, it raises nothing.

    Args:
      results: path -> kernel after the merge.
      before: path -> kernel before it, these among them.
      done: what is not done then, for the error.
    """
    if bad := _not_finite(results):
        raise not_finite_after({path: before[path] for path in bad}, done)


def not_finite_after(kernels: Mapping[str, Any], done: str = "merged") -> ValueError:
    """The error for kernels, as they were before, that are not finite after a merge."""
    if bad := _not_finite(kernels):
        return ValueError(
            f"not {done}: the base holds numbers that are not finite: {list_paths(bad)}. The "
            "adapters are finite. Load the base again."
        )
    dtypes = {jnp.dtype(unbox(kernel).dtype) for kernel in kernels.values()}
    limits = ", ".join(sorted(f"{d.name} ends at {float(jnp.finfo(d).max):.6g}" for d in dtypes))
    return ValueError(
        f"not {done}: the sum of kernel and delta leaves the range of the kernel's dtype "
        f"({limits}) in {list_paths(kernels)}. The parameters are as they were. Make the base "
        "float32 first: jax.tree.map(lambda leaf: leaf.astype('float32'), params)."
    )


def check_in_range(results: Mapping[str, Any], before: Mapping[str, Any], what: str) -> None:
    """Raises ValueError for arrays that are not finite, or no longer, after a cast or a sum.

    Under a transformation, where values are unknown, it raises nothing.

    Args:
      results: path -> array.
      before: path -> array that was cast; where it was not finite either, that is no error.
      what: what is not done then, for the error.
    """
    if not (bad := _not_finite(results)):
        return
    already = _not_finite({path: before[path] for path in bad if path in before})
    if bad := sorted(set(bad) - set(already)):
        dtype = jnp.dtype(unbox(results[bad[0]]).dtype)
        raise ValueError(
            f"{what}: {list_paths(bad)} would hold numbers that are not finite; {dtype.name} ends "
            f"at {float(jnp.finfo(dtype).max):.6g}. Take dtype='float32'."
        )


def _not_finite(leaves: Mapping[str, Any]) -> list[str]:
    """Paths of arrays that hold a number that is not finite; none where values are unknown."""
    values = {path: unbox(leaf) for path, leaf in leaves.items()}
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        return []
    found = all_finite(values)
    # Within a trace even what is computed from known values is unknown.
    if any(isinstance(finite, Tracer) for finite in found.values()):
        return []
    return [path for path, finite in jax.device_get(found).items() if not finite]
