"""MoRA for any function of a tree of parameters: the path for models that no hook reaches.

Equinox, Haiku, plain JAX, and Flax models whose layers call `einsum` on parameters of their own.
The function is traced and run again with adapters on its kernels (`interpreter.py`). Which axes of
a kernel are inputs and outputs is read off the products that it enters, not guessed from its shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.paths import (
    ADAPTER,
    flatten,
    is_adapter,
    join_path,
    list_paths,
    path_seed,
    readable,
    unflatten_like,
)
from mora_jax._params.checks import adapters_per_layer, check_adapted
from mora_jax._plans.config import MoRAConfig, check_matches
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._product.axes import KernelAxes
from mora_jax._product.per_example import ExampleIds, unstack_bank
from mora_jax._tracing.interpreter import Traced, trace
from mora_jax._tracing.kernel_views import AdaptedView
from mora_jax._tracing.recording import Record, RecordingView


def as_params(tree: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """Any pytree as parameters: nested dicts, and how to make the tree of them again.

    For models that are pytrees of their own kind, such as Equinox's.

    Args:
      tree: a pytree of arrays.

    Returns:
      (params, restore): nested dicts by the names of the tree's nodes, and their inverse.

    >>> params, restore = as_params({"layers": [jnp.ones(2), jnp.zeros(3)]})
    >>> jax.tree.map(jnp.shape, params), jax.tree.map(jnp.shape, restore(params))
    ({'layers': {'0': (2,), '1': (3,)}}, {'layers': [(2,), (3,)]})
    """
    leaves, structure = jax.tree.flatten_with_path(tree)
    names = [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in leaves]

    def restore(params: Any) -> Any:
        values = []
        for name in names:
            value = params
            for part in name:
                value = value[part]
            values.append(value)
        return structure.unflatten(values)

    params: dict[str, Any] = {}
    for (*parents, name), (_, leaf) in zip(names, leaves, strict=True):
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params, restore


@dataclasses.dataclass(frozen=True)
class AdaptedFunction:
    """A function of parameters and inputs, with adapters. What `adapt` makes of a function.

    Attributes:
      mora_base: the function: `(params, *inputs) -> outputs`, parameters in nested dicts.
      mora_chooser: the config or plan.
    """

    mora_base: Callable[..., Any]
    mora_chooser: MoRAConfig | Plan

    def __call__(
        self,
        params: Mapping[str, Any],
        *inputs: Any,
        mora_key: jax.Array | None = None,
        mora_adapter_ids: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the base function gives for the parameters plus their adapters' deltas.

        Args:
          params: parameters with adapters.
          *inputs: the function's.
          mora_key: a PRNG key for the adapters' dropout; without one there is none.
          mora_adapter_ids: [E] int, where the parameters hold a bank: the adapter of each example,
            -1 for none; the first axis of what enters adapted products is one of E examples.
          **kwargs: the function's.
        """
        leaves = flatten(params)
        base = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
        traced = _trace(self.mora_base, params, base, inputs, kwargs)
        plan = self.mora_chooser
        if isinstance(plan, MoRAConfig):
            plan = _plan(traced, base, plan)
        count = 1 if mora_adapter_ids is None else adapters_per_layer(plan, leaves)
        check_adapted(plan, leaves, count=count)
        kernels = {join_path(path, spec.kernel_name): path for path, spec in plan.items()}
        arrays = list(traced.arrays)
        for index, path in enumerate(sorted(base)):
            if path not in kernels:
                continue
            spec = plan[kernels[path]]
            paths = plan.leaf_paths(kernels[path])
            adapter = {name: unbox(leaves[leaf]) for name, leaf in paths.items()}
            adapter = spec.batch_first(adapter)
            # By the path's checksum, so that a layer's mask does not depend on the others.
            key = None if mora_key is None else jax.random.fold_in(mora_key, path_seed(path))
            examples = None
            if mora_adapter_ids is not None:
                examples = ExampleIds(mora_adapter_ids, kernels[path])
                adapter = unstack_bank(adapter, spec.rows, kernels[path])
            axes = spec.kernel_axes
            arrays[index] = AdaptedView.of(arrays[index], adapter, axes, spec.config, key, examples)
        return traced.run(arrays)


def plan(function: AdaptedFunction, params: Any, *inputs: Any, **kwargs: Any) -> Plan:
    """The plan of an adapted function. See `mora_jax.plan`."""
    base = {path: leaf for path, leaf in flatten(params).items() if not is_adapter(path)}
    traced = _trace(function.mora_base, params, base, inputs, kwargs)
    if isinstance(function.mora_chooser, Plan):
        return function.mora_chooser
    return _plan(traced, base, function.mora_chooser)


def _trace(
    function: Callable, params: Any, base: Mapping[str, Any], inputs: tuple, kwargs: Any
) -> Traced:
    if bad := [path for path, leaf in base.items() if not hasattr(unbox(leaf), "shape")]:
        raise TypeError(
            f"parameters must be nested dicts of arrays, got something else at {list_paths(bad)}. "
            "Use as_params(tree) for other trees."
        )

    def call(leaves: Any, *inputs: Any, **kwargs: Any) -> Any:
        return function(unflatten_like(leaves, params), *inputs, **kwargs)

    try:
        return trace(call, dict(base), *inputs, **kwargs)
    except KeyError as error:
        if error.args != (ADAPTER,):
            raise
        raise ValueError(
            f"the function reads params[...][{ADAPTER!r}]. The library keeps adapters under this "
            "name, so rename the dict."
        ) from error


def _plan(traced: Traced, base: Mapping[str, Any], config: MoRAConfig) -> Plan:
    base = {path: unbox(leaf) for path, leaf in base.items()}
    record = _record(traced, base)
    layers = _layers({path: record.axes[path] for path in base if path in record.axes})
    others = {
        path: _reason(record, path, leaf)
        for path, leaf in base.items()
        if leaf.ndim > 1 and path not in record.axes
    }
    if not layers:
        raise _nothing_to_adapt(base, others)
    check_matches(config, layers, base)
    specs = []
    for layer, (path, name, axes) in layers.items():
        if chosen := config.choose(layer):
            chosen = dataclasses.replace(chosen, train_kernel=config.trains(path))
            # Adapters lead with their batch axes, wherever the kernel has them.
            adapter_batch = tuple(range(len(axes.batch)))
            shape = tuple(base[path].shape)
            specs.append((layer, AdapterSpec(chosen, shape, axes, adapter_batch, name)))
    also_train = tuple((p, tuple(leaf.shape)) for p, leaf in base.items() if config.trains(p))
    left = [(layer, config.reason(layer)) for layer in layers if not config.selects(layer)]
    left += [(path, why) for path, why in others.items() if not config.trains(path)]
    total = sum(math.prod(leaf.shape) for leaf in base.values())
    return Plan(tuple(specs), also_train, total, unadapted=tuple(sorted(left)))


def _reason(record: Record, path: str, leaf: Any) -> str:
    """Why a parameter that is a matrix is no kernel."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"has the dtype {leaf.dtype}, not a floating one"
    return record.reason(path)


def _nothing_to_adapt(base: Mapping[str, Any], others: Mapping[str, str]) -> ValueError:
    """What is raised for a function without kernels: what was seen of it, and what to do."""
    seen = "none has two axes or more"
    if others:
        shown = list(others.items())[:8]
        lines = [f"{readable(path)!r} {tuple(base[path].shape)} {why}" for path, why in shown]
        lines += [f"and {len(others) - 8} more"] if len(others) > 8 else []
        seen = "; ".join(lines)
    return ValueError(
        f"the function has no kernel to adapt. Of its {len(base)} parameters: {seen}. An adapter "
        "needs a product (x @ w, einsum, dot_general) of inputs and a parameter that was at most "
        "cast, copied, transposed, reshaped or scaled before. Convolutions and lookups are adapted "
        "in Flax modules: adapt(module, MoRAConfig(targets=...)) with a pattern that names them."
    )


def _layers(kernels: Mapping[str, KernelAxes]) -> dict[str, tuple[str, str, KernelAxes]]:
    """Layer -> (path of its kernel, the kernel's name in it, its axes).

    A kernel belongs to the dict that it stands in, or is a layer by itself where there are several.
    """
    parents = [path.rpartition("/")[0] for path in kernels]
    layers = {}
    for path, axes in kernels.items():
        parent, _, name = path.rpartition("/")
        alone = parents.count(parent) == 1
        layers[parent if alone else path] = (path, name if alone else "", axes)
    return layers


def _record(traced: Traced, base: Mapping[str, Any]) -> Record:
    """What products and other primitives make of the parameters."""
    record = Record()
    paths = sorted(base)

    def run(arrays: Any) -> Any:
        views = list(arrays)
        for index, path in enumerate(paths):
            if jnp.issubdtype(views[index].dtype, jnp.floating):
                views[index] = RecordingView.of(views[index], path, record)
            else:
                record.uses[path] = [f"of dtype {views[index].dtype}"]
        traced.run(views)

    jax.eval_shape(run, list(traced.arrays))
    return record
