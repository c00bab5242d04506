"""An NNX model as a tree: its adapted layers, its parameters by path, and copies of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from flax import nnx

from mora_jax._arrays.paths import flatten, unflatten
from mora_jax.nnx._guard import AdaptedLayer
from mora_jax.nnx._kernels import path_of
from mora_jax.nnx._layers import copy_variables

ModelT = TypeVar("ModelT", bound=nnx.Module)


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every layer that has an adapter."""
    for names, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLayer):
            yield path_of(names), module


def owners_of(model: Any) -> dict[int, list[str]]:
    """Identity of a variable -> its paths, more than one where layers share it."""
    owners: dict[int, list[str]] = {}
    for names, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                owners.setdefault(id(value), []).append(path_of((*names, name)))
    return owners


def is_evaluating(model: Any) -> bool:
    """Whether `model.eval()` was called: all switches that it sets are set."""
    names = ("deterministic", "use_running_average")
    modules = [module for _, module in nnx.iter_modules(model)]
    switches = [vars(module).get(name) for module in modules for name in names]
    switches = [switch for switch in switches if isinstance(switch, bool)]
    return bool(switches) and all(switches)


def parameters_of(model: Any) -> dict[str, nnx.Variable]:
    """Path -> variable, of every parameter."""
    state = nnx.state(model, nnx.Param)
    return {path_of(names): variable for names, variable in nnx.to_flat_state(state)}


def values_of(model: Any) -> dict[str, Any]:
    """The parameters' arrays, as nested dicts."""
    return unflatten({path: leaf[...] for path, leaf in parameters_of(model).items()})


def copy_with(model: ModelT, params: dict[str, Any]) -> ModelT:
    """A model of its own with other parameters; those that `params` lacks stay."""
    copy, values = nnx.merge(*split_model(model)), flatten(params)
    for path, variable in parameters_of(copy).items():
        if path in values:
            variable.set_value(values[path])
    return copy


def split_model(model: Any) -> tuple[Any, Any]:
    """The model's graph, and its arrays in variables that are not the model's own."""
    graph, state = nnx.split(model)
    return graph, copy_variables(state)
