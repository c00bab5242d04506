"""Finds the adapted layers of a linen model, by running its `init` on shapes alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mora_jax._arrays.boxes import value_of
from mora_jax._arrays.paths import ADAPTER, flatten, is_adapter, join_path, listing
from mora_jax._plans.config import MoRAConfig, check_matches
from mora_jax._plans.layer import AdapterSpec, LayerConfig
from mora_jax._plans.plan import Plan
from mora_jax._product.axes import KernelAxes, kernel_axes
from mora_jax.linen._adapt import TRACE, AdaptedModule, mark_scope
from mora_jax.linen._layers import Leaves, MoRA, is_adaptable

#: The axes of a probe have sizes from here on; no model stacks as many layers.
_PROBE_SIZE = 1_000_003

#: A number for every trace, so that `nn.jit` takes none of them, probes included, for another.
_TRACES = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """An adapted layer as the layer itself sees it, without the axes of stacked layers."""

    axes: KernelAxes
    config: LayerConfig
    kernel_name: str = "kernel"


def plan(
    model: nn.Module, *inputs: Any, rngs: Any = None, method: Any = None, **kwargs: Any
) -> Plan:
    """The plan of an adapted linen model. See `mora_jax.plan`."""
    chooser = model.mora_chooser if isinstance(model, AdaptedModule) else None
    linear: dict[str, None] = {}
    seen: dict[str, _Seen] = {}
    without_stream: set[str] = set()
    trace = next(_TRACES)

    def record(next_fun, args, kwargs, context):
        module = context.module
        mark_scope(module, mora_plan=trace)
        if is_adaptable(module, context.method_name, chooser):
            linear[join_path(*module.path)] = None
        if context.method_name == "__call__" and isinstance(module, Leaves):
            kernel, axes = args
            path = join_path(*module.path[:-1])
            seen[path] = _Seen(axes, module.config, module.kernel_name)
            _leave_probe(module, "kernel", kernel.ndim)
            _leave_probe(module, "adapter", len(axes.batch) + 2)
        if context.method_name == "__call__" and isinstance(module, MoRA):
            _, kernel, dimension_numbers = args[:3]
            axes = kernel_axes(kernel, dimension_numbers)
            path = join_path(*module.path[:-1])
            seen[path] = _Seen(axes, module.config)
            if module.config.dropout and not module.has_rng(ADAPTER):
                without_stream.add(path)
            _leave_probe(module, "kernel", kernel.ndim)
            _leave_probe(module, "adapter", len(axes.batch) + 2)
        return next_fun(*args, **kwargs)

    def init(inputs, kwargs):
        # Nothing is drawn from these keys: only shapes come out.
        streams = rngs if isinstance(rngs, Mapping) else {"params": jax.random.key(0)}
        streams = {ADAPTER: jax.random.key(0), **streams}
        token = TRACE.set(trace)
        try:
            with nn.intercept_methods(record):
                return model.init(streams, *inputs, method=method, **kwargs)
        finally:
            TRACE.reset(token)

    shapes = flatten(_eval_shape(init, inputs, kwargs).get("params", {}))
    params: dict[str, Any] = {path: value_of(leaf) for path, leaf in shapes.items()}
    base = {path: leaf.shape for path, leaf in params.items() if not is_adapter(path)}
    also_train = ()
    if isinstance(chooser, MoRAConfig):
        check_matches(chooser, linear, base)
        also_train = tuple((path, shape) for path, shape in base.items() if chooser.trains(path))
    elif isinstance(chooser, Plan):
        also_train = chooser.also_train
        if missing := chooser.keys() - seen.keys():
            raise ValueError(
                f"the model was adapted with a plan that has layers at {listing(missing)}, where "
                f"the model has none; its linear layers: {listing(linear)}. "
                "Was the plan made for another model?"
            )
    chosen = [path for path in linear if chooser is not None and chooser.choose(path)]
    if unreached := set(chosen) - seen.keys():
        raise ValueError(
            f"layers were chosen that make no use of `dot_general_cls`, so no adapter reaches "
            f"them: {listing(unreached)}. Leave them out with MoRAConfig.exclude."
        )
    if without_stream:
        warnings.warn(
            f"dropout has no effect in {listing(without_stream)}: the rng stream {ADAPTER!r} does "
            "not get there. Name it in the split_rngs of the nn.scan or nn.vmap around them.",
            stacklevel=3,
        )
    if not seen:
        raise ValueError(
            "the model has no adapters. Adapt it first, plan(adapt(model, config), *inputs), "
            "or build it with MoRADense."
        )
    layers = tuple((path, _spec(path, layer, params)) for path, layer in seen.items())
    total = sum(math.prod(shape) for shape in base.values())
    return Plan(layers, also_train, total, _left(chooser, linear, seen, base))


def _left(chooser, linear, seen, base) -> tuple[tuple[str, str], ...]:
    """(path, why) of what has no adapter: linear layers, and matrices of other layers."""
    left = []
    for path in linear.keys() - seen.keys():
        known = isinstance(chooser, MoRAConfig)
        left.append((path, chooser.reason(path) if known else "not in the plan"))
    for path, shape in base.items():
        layer = path.rpartition("/")[0]
        trained = chooser is not None and chooser.trains(path)
        if len(shape) > 1 and layer not in linear and layer not in seen and not trained:
            left.append((path, "in no linear layer"))
    return tuple(sorted(left))


def _leave_probe(module: nn.Module, name: str, ndim: int) -> None:
    """Makes a parameter whose sizes are found nowhere else beside the adapter.

    Where nn.scan and nn.vmap put the axes of stacked layers shows in its full shape; in the shapes
    of real parameters two axes may be equally long, and a guess would be needed.
    """
    if not module.has_variable("params", name):
        shape = tuple(_PROBE_SIZE + axis for axis in range(ndim))
        module.param(name, lambda key: jnp.zeros(shape, jnp.int8))


def _spec(path: str, layer: _Seen, params: dict[str, jax.ShapeDtypeStruct]) -> AdapterSpec:
    stacks, axes = _axes_of(params[join_path(path, ADAPTER, "kernel")].shape)
    adapter_stacks, adapter_axes = _axes_of(params[join_path(path, ADAPTER, "adapter")].shape)
    batch = range(len(layer.axes.batch))
    return AdapterSpec(
        config=layer.config,
        kernel_shape=params[join_path(path, layer.kernel_name)].shape,
        kernel_name=layer.kernel_name,
        kernel_axes=KernelAxes(
            inputs=tuple(axes[axis] for axis in layer.axes.inputs),
            outputs=tuple(axes[axis] for axis in layer.axes.outputs),
            batch=stacks + tuple(axes[axis] for axis in layer.axes.batch),
        ),
        adapter_batch_axes=adapter_stacks + tuple(adapter_axes[axis] for axis in batch),
    )


def _axes_of(probe_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(axes of stacked layers, the layer's own axes in their order) of a probe's full shape.

    >>> _axes_of((24, _PROBE_SIZE, _PROBE_SIZE + 1))
    ((0,), (1, 2))
    """
    own = tuple(axis for axis, size in enumerate(probe_shape) if size >= _PROBE_SIZE)
    sizes = [probe_shape[axis] for axis in own]
    if sizes != sorted(sizes):
        raise ValueError(
            "a layer's parameters are stored in another order of axes than the layer uses "
            "(nn.map_variables?); such a layer cannot be merged. Leave it out with `exclude`."
        )
    return tuple(axis for axis in range(len(probe_shape)) if axis not in own), own


def _eval_shape(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """`jax.eval_shape` that leaves alone what is no array, such as `deterministic=True`."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    abstract = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def call(arrays):
        arrays = iter(arrays)
        merged = (
            next(arrays) if is_array else leaf
            for leaf, is_array in zip(leaves, abstract, strict=True)
        )
        return function(*structure.unflatten(merged))

    return jax.eval_shape(
        call, [leaf for leaf, is_array in zip(leaves, abstract, strict=True) if is_array]
    )
