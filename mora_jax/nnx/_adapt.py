"""Adapters in an NNX model: `adapt` makes them, `plan` reads them off, adapter ids choose."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mora_jax._arrays.boxes import AdapterIds, AlsoTrained
from mora_jax._arrays.paths import ADAPTER, IDS, is_adapter, join_path, path_seed
from mora_jax._plans.config import MoRAConfig
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._product.per_example import check_ids, ids_as_int32
from mora_jax.nnx._guard import LayerPath
from mora_jax.nnx._kernels import (
    Kernel,
    check_adaptable,
    find_kernels,
    parameters_with_shapes,
    reasons,
    with_stacks,
    wrappers_of,
)
from mora_jax.nnx._layers import MoRA, adapted_class
from mora_jax.nnx._state import (
    ModelT,
    adapted_layers,
    is_evaluating,
    owners_of,
    parameters_of,
    split_model,
)
from mora_jax.nnx._trace_check import CheckedPath, check_uses

#: Arguments by which models are told whether they train.
_SWITCHES = {"deterministic", "train", "training", "is_training", "inference"}


def adapt(model: ModelT, chooser: MoRAConfig | Plan, *, key: jax.Array | None = None) -> ModelT:
    """A model like `model` whose chosen layers have adapters. See `mora_jax.adapt`."""
    if next(adapted_layers(model), None):
        raise TypeError("the model is adapted already; adapt the base model instead.")
    adapted = nnx.merge(*split_model(model))
    owners, wrappers = owners_of(adapted), wrappers_of(adapted)
    shapes, quiet = parameters_with_shapes(adapted), is_evaluating(adapted)
    for path, kernel in find_kernels(adapted, chooser, parameters_of(model)).items():
        if (config := chooser.choose(path)) is None:
            continue
        this = id(kernel.variable)
        check_adaptable(path, kernel, config, owners[this], wrappers.get(this))
        if isinstance(chooser, MoRAConfig):
            trained = chooser.trains(join_path(path, kernel.name))
            config = dataclasses.replace(config, train_kernel=trained)
        kernel = with_stacks(path, kernel, chooser, shapes)
        spec = kernel.spec(config)
        _add_adapter(path, kernel, spec, _key_of(path, spec, key, isinstance(chooser, Plan)))
        if config.dropout:
            kernel.layer.mora.deterministic = quiet
        kernel.layer.mora.merged = isinstance(chooser, Plan) and chooser.merges > 0
    for path, variable in parameters_of(adapted).items():
        if chooser.trains(path):
            variable.set_metadata(mora_base=type(variable))
            object.__setattr__(variable, "__class__", AlsoTrained)
    if any(layer.mora.config.dropout for _, layer in adapted_layers(adapted)):
        _warn_of_switch(model)
    return adapted


def _warn_of_switch(model: nnx.Module) -> None:
    """Warns of a model that is told with every call whether to drop."""
    names = inspect.signature(model.__call__).parameters if callable(model) else {}
    if switches := _SWITCHES.intersection(names):
        warnings.warn(
            f"the model takes {' and '.join(sorted(switches))} with every call, which does not "
            "reach the adapters' dropout. Switch that with model.train() and model.eval(), or with "
            "nnx.view(model, deterministic=True).",
            stacklevel=4,
        )


def _key_of(
    path: str, spec: AdapterSpec, key: jax.Array | None, has_plan: bool
) -> jax.Array | None:
    """The key of one layer's adapter; None if it draws nothing, or nothing yet."""
    config = spec.config
    if not spec.draws and not config.dropout:
        return None
    if key is not None:
        # By the path's checksum, so that a layer's numbers do not depend on the others.
        return jax.random.fold_in(key, path_seed(path))
    if not has_plan:
        what = f"dropout={config.dropout}" if config.dropout else f"{config.scheme}"
        raise ValueError(
            f"key is missing: {what} draws random numbers (layer {path!r}). "
            "Pass key=jax.random.key(...)."
        )
    return None


def _add_adapter(path: str, kernel: Kernel, spec: AdapterSpec, key: jax.Array | None) -> None:
    """Makes a layer one of an adapted class, with a new adapter beside its kernel."""
    layer = kernel.layer
    if hasattr(layer, ADAPTER):
        raise ValueError(
            f"a layer of class {type(layer).__name__} has an attribute {ADAPTER!r} of its own. The "
            "library keeps the adapter under this name, so rename it."
        )
    object.__setattr__(layer, "__class__", adapted_class(type(layer)))
    layer.mora = MoRA(spec, kernel.axes, kernel.shape, kernel=kernel.variable, key=key)
    layer.mora.layer_path, layer.mora.kernel_stacks = LayerPath(path), kernel.stacks


def check_forward_pass(model: nnx.Module, call: Callable[..., Any], inputs: Any) -> None:
    """Raises ValueError if one forward pass uses an adapted kernel past its layer.

    Args:
      model: an adapted model; it is not touched.
      call: a function of a model and inputs, which is traced.
      inputs: a tree of arrays, shapes and static values.
    """
    copy, kernels = nnx.merge(*split_model(model)), {}
    for path, layer in adapted_layers(copy):
        mora = layer.mora
        mora.layer_path = CheckedPath(path)
        kernels[join_path(path, mora.kernel_name)] = vars(layer)[mora.kernel_name]
    check_uses(copy, kernels, call, inputs)


def plan(model: nnx.Module) -> Plan:
    """The plan of an adapted model. See `mora_jax.plan`."""
    layers = [(path, _spec_of(model, path, layer)) for path, layer in adapted_layers(model)]
    if not layers:
        raise ValueError(
            "the model has no adapters. Adapt it first, adapt(model, config), or build it with "
            "mora_jax.nnx.MoRALinear."
        )
    base = {path: leaf for path, leaf in parameters_of(model).items() if not is_adapter(path)}
    trained = [path for path, leaf in base.items() if isinstance(leaf, AlsoTrained)]
    also_train = tuple((path, tuple(base[path].shape)) for path in trained)
    total = sum(math.prod(leaf.shape) for leaf in base.values())
    merged = any(layer.mora.merged for _, layer in adapted_layers(model))
    found = Plan(tuple(layers), also_train, total, merges=int(merged))
    others = base.keys() - {*found.kernel_paths(), *trained}
    left = sorted(reasons(model, (path for path in others if base[path].ndim > 1)))
    return dataclasses.replace(found, unadapted=tuple(left))


def _spec_of(model: nnx.Module, path: str, layer: Any) -> AdapterSpec:
    """The full layout of an adapted layer."""
    mora = layer.mora
    kernel = Kernel(layer, mora.kernel_name, mora.kernel_axes, mora.kernel_shape)
    if len(kernel.variable.shape) != len(kernel.shape) + len(mora.kernel_stacks):
        # `nnx.vmap` of a function that makes a `MoRALinear`, or one element of a stack.
        kernel = with_stacks(path, kernel, Plan(()), parameters_with_shapes(model))
    else:
        kernel = dataclasses.replace(kernel, stacks=mora.kernel_stacks)
    return kernel.spec(mora.config)


def set_adapter_ids(model: nnx.Module, adapter_ids: jax.Array | None) -> None:
    """Says which adapter of a bank each example has, in place: `AdapterIds` beside the adapters.

    The model holds a bank after `nnx.update(model, bank.adapters)`. To set other ids, inside
    `nnx.jit` too, compiles nothing again. `AdapterBank.adapter_ids` says what layers must see.

    Args:
      model: an adapted model.
      adapter_ids: [E] int, as `AdapterBank.adapter_ids` makes them, -1 for none; None takes them
        out again, for a model that holds one adapter.

    Raises:
      TypeError: for what is no array of integers.
      ValueError: for ids of more than one axis, for a model without adapters, and where layers are
        stacked along another axis than the first.
    """
    layers = list(adapted_layers(model))
    if not layers:
        raise ValueError("the model has no adapters. Adapt it first: adapt(model, config).")
    if adapter_ids is not None:
        check_ids(adapter_ids)
        adapter_ids = ids_as_int32(adapter_ids)  # without x64, JAX would wrap 64 bits around
    for path, spec in plan(model).items():
        mora = dict(layers)[path].mora
        if adapter_ids is None:
            if hasattr(mora, IDS):
                delattr(mora, IDS)
            continue
        count = len(spec.batch) - len(mora.kernel_axes.batch)
        stacks = spec.adapter_batch_axes[:count]
        if stacks != tuple(range(count)):
            raise ValueError(
                f"layer {path!r} is stacked along axes {stacks}: adapter ids go with layers "
                "stacked along their first axis."
            )
        value = jax.numpy.broadcast_to(adapter_ids, (*spec.batch[:count], len(adapter_ids)))
        if hasattr(mora, IDS):
            getattr(mora, IDS).set_value(value)
        else:
            setattr(mora, IDS, AdapterIds(value, layer=path))
