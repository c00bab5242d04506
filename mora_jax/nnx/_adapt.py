"""MoRA for Flax NNX: `adapt` for models, a layer, and the type of its parameters.

An adapted layer is an object of a subclass of its own class, so that the graph and the paths of the
base model stay as they are, with its adapter beside the kernel:

    q_proj.kernel         [I, O]    Param, the pretrained kernel, as before
    q_proj.mora.matrix    [R, R]    MoRAParam, the adapter, R the square size

Training is NNX's own, `nnx.Optimizer(model, tx, wrt=MoRAParam)`. What `MoRAConfig.also_train` names
is of the type `AlsoTrained`, a `MoRAParam` too, and so is trained with the adapters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
from flax import nnx

from mora_jax._arrays.boxes import AdapterIds, AlsoTrained, MoRAParam
from mora_jax._arrays.paths import IDS, checksum, flatten, is_adapter, join_path, listing, unflatten
from mora_jax._arrays.rounding import Rounding
from mora_jax._merging import merge as _merge
from mora_jax._merging import remora as _remora
from mora_jax._merging import unmerge as _unmerge
from mora_jax._merging.prune import Reset
from mora_jax._merging.remora import ResetReport
from mora_jax._plans.config import MoRAConfig, check_matches
from mora_jax._plans.plan import Plan
from mora_jax._product.per_example import check_ids
from mora_jax.nnx._kernels import Kernel, kernels, path_of
from mora_jax.nnx._layers import AdaptedLayer, MoRA, MoRALinear, adapted_class, fresh

__all__ = [
    "AdapterIds",
    "AlsoTrained",
    "MoRA",
    "MoRALinear",
    "MoRAParam",
    "adapt",
    "merge",
    "merge_and_reset",
    "plan",
    "set_adapter_ids",
    "unmerge",
]

ModelT = TypeVar("ModelT", bound=nnx.Module)


def adapt(model: ModelT, chooser: MoRAConfig | Plan, *, key: jax.Array | None = None) -> ModelT:
    """A model like `model` whose chosen layers have adapters. See `mora_jax.adapt`."""
    if next(_adapted(model), None):
        raise TypeError("the model is adapted already; adapt the base model instead.")
    adapted = nnx.merge(*_split(model))
    found: dict[str, Kernel] = {}
    for path, kernel in kernels(adapted, chooser):
        if path in found:
            raise ValueError(
                f"layer {path!r} has several kernels, {found[path].name!r} and {kernel.name!r}, "
                "and can have one adapter: narrow the patterns of MoRAConfig.kernels."
            )
        found[path] = kernel
    if isinstance(chooser, MoRAConfig):
        check_matches(chooser, found, _parameters(model))
    elif missing := chooser.keys() - found.keys():
        raise ValueError(
            f"the plan has layers at {listing(missing)}, where the model has none; "
            f"its linear layers: {listing(found)}. Was the plan made for another model?"
        )
    owners = _owners(adapted)
    for path, kernel in found.items():
        config = chooser.choose(path)
        if config is None:
            continue
        if len(tied := owners[id(getattr(kernel.layer, kernel.name))]) > 1:
            raise ValueError(
                f"{listing(tied)} are one tied weight; an adapter in one of these layers would not "
                "be seen by the other. Leave them out with MoRAConfig.exclude, or adapt the model "
                "as a function of its parameters."
            )
        if config.dropout and isinstance(kernel.layer, nnx.Conv | nnx.Embed):
            raise ValueError(
                f"dropout={config.dropout} for layer {path!r}, a {type(kernel.layer).__name__}: "
                "convolutions and embeddings have none."
            )
        if isinstance(chooser, MoRAConfig):
            trained = chooser.trains(join_path(path, kernel.name))
            config = dataclasses.replace(config, train_kernel=trained)
        spec, own = kernel.spec(config), None
        if spec.draws or config.dropout:
            if key is None:
                what = f"dropout={config.dropout}" if config.dropout else f"{config.scheme}"
                raise ValueError(
                    f"key is missing: {what} draws random numbers (layer {path!r}). "
                    "Pass key=jax.random.key(...)."
                )
            own = jax.random.fold_in(key, checksum(path))
        object.__setattr__(kernel.layer, "__class__", adapted_class(type(kernel.layer)))
        variable = getattr(kernel.layer, kernel.name)
        kernel.layer.mora = MoRA(spec, kernel.axes, kernel.shape, kernel=variable, key=own)
    for path, variable in _parameters(adapted).items():
        if chooser.trains(path):
            variable.set_metadata(mora_base=type(variable))
            object.__setattr__(variable, "__class__", AlsoTrained)
    return adapted


def plan(model: nnx.Module) -> Plan:
    """The plan of an adapted model. See `mora_jax.plan`."""
    layers = []
    for path, layer in _adapted(model):
        mora = layer.mora
        kernel = Kernel(layer, mora.kernel_name, mora.kernel_axes, mora.kernel_shape)
        layers.append((path, kernel.spec(mora.config)))
    if not layers:
        raise ValueError(
            "the model has no adapters. Adapt it first, adapt(model, config), or build it with "
            "mora_jax.nnx.MoRALinear."
        )
    base = {path: leaf for path, leaf in _parameters(model).items() if not is_adapter(path)}
    trained = [path for path, leaf in base.items() if isinstance(leaf, AlsoTrained)]
    also_train = tuple((path, tuple(base[path].shape)) for path in trained)
    total = sum(math.prod(leaf.shape) for leaf in base.values())
    found = Plan(tuple(layers), also_train, total)
    others = base.keys() - {*found.kernel_paths(), *trained}
    left = sorted((path, "not chosen") for path in others if base[path].ndim > 1)
    return dataclasses.replace(found, left=tuple(left))


def merge(model: ModelT, *, rounding: Rounding = "nearest", key: jax.Array | None = None) -> ModelT:
    """A model without adapters whose kernels hold their deltas: equation (3).

    The adapted model is not touched. `mora_jax.merge` takes states; so does `merge_losses`:
    `mora_jax.merge_losses(nnx.state(model, nnx.Param), mora_jax.plan(model))`.

    Args:
      model: an adapted model.
      rounding: "nearest" or "stochastic", as for `mora_jax.merge`.
      key: a PRNG key, required for "stochastic".

    Raises:
      ValueError: where an adapter holds a number that is not finite; where a key is missing.

    Warns:
      MergeWarning: as `mora_jax.merge`.

    >>> layer = MoRALinear(3, 6, rank=1, scheme="sharing", rngs=nnx.Rngs(0))
    >>> type(merge(layer)) is nnx.Linear
    True
    """
    merged = _merge.merge(_values(model), plan(model), rounding=rounding, key=key)
    copy = _copy_with(model, merged)
    for _, layer in list(_adapted(copy)):
        object.__setattr__(layer, "__class__", type(layer).mora_base)
        del layer.mora
    for variable in _parameters(copy).values():
        if isinstance(variable, AlsoTrained):
            object.__setattr__(variable, "__class__", variable.get_metadata("mora_base"))
            variable.del_metadata("mora_base")
    return copy


def unmerge(
    merged: ModelT,
    model: ModelT,
    *,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
) -> ModelT:
    """Takes merged adapters out of their kernels again: see `mora_jax.unmerge` for how exactly.

    Args:
      merged: what `merge` gave, perhaps trained further; not touched.
      model: the adapted model, which holds the adapters; not touched.
      rounding: what the merge had.
      key: what the merge had.

    Returns:
      A model like `model`, with the parameters of `merged` less the deltas.

    Raises:
      ValueError: where the two do not fit, or where an adapter is not finite.

    >>> layer = MoRALinear(3, 6, rank=1, scheme="sharing", rngs=nnx.Rngs(0))
    >>> type(unmerge(merge(layer), layer)) is MoRALinear
    True
    """
    values = _values(merged), _values(model), plan(model)
    return _copy_with(model, _unmerge.unmerge(*values, rounding=rounding, key=key))


def merge_and_reset(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    *,
    key: jax.Array | None = None,
    donate: bool = True,
    rounding: Rounding = "nearest",
    reset: Reset = "zero",
) -> ResetReport:
    """One ReMoRA restart, in place: `mora_jax.merge_and_reset` for a model and its optimizer.

    Args:
      model: an adapted model; its adapters move to the next scheme of their cycles.
      optimizer: the `nnx.Optimizer` that trains it.
      key: a PRNG key, required where a scheme draws numbers (`LowRank`), for "stochastic" and for a
        random `Prune`.
      donate: reuse the memory of what changes. The base model shares these kernels and **cannot
        be used afterwards**, unless this is False.
      rounding: "nearest" or "stochastic", as for `mora_jax.merge`.
      reset: "zero" or a `Prune`, as for `mora_jax.merge_and_reset`.

    Returns:
      What was reset, and what rounding lost.

    Raises:
      ValueError: as `mora_jax.merge_and_reset`, and then nothing is changed.
    """
    state = jax.tree.map(_as_dict, optimizer.opt_state, is_leaf=_is_state)
    values = jax.tree.map(lambda leaf: leaf[...], state, is_leaf=_is_variable)
    result = _remora.merge_and_reset(
        _values(model), values, plan(model), key=key, donate=donate, rounding=rounding, reset=reset
    )
    jax.tree.map(_set, state, result.opt_state, is_leaf=_is_variable)
    params = flatten(result.params)
    for path, variable in _parameters(model).items():
        variable.set_value(params[path])
    for path, layer in _adapted(model):
        layer.mora.config = result.plan[path].config
    return result.report


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
    layers = list(_adapted(model))
    if not layers:
        raise ValueError("the model has no adapters. Adapt it first: adapt(model, config).")
    if adapter_ids is not None:
        check_ids(adapter_ids)
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


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    for names, module in nnx.iter_modules(model):
        if isinstance(module, AdaptedLayer):
            yield path_of(names), module


def _owners(model: Any) -> dict[int, list[str]]:
    """Identity of a variable -> its paths, more than one where layers share it."""
    owners: dict[int, list[str]] = {}
    for names, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                owners.setdefault(id(value), []).append(path_of((*names, name)))
    return owners


def _parameters(model: Any) -> dict[str, nnx.Variable]:
    state = nnx.state(model, nnx.Param)
    return {path_of(names): variable for names, variable in nnx.to_flat_state(state)}


def _values(model: Any) -> dict[str, Any]:
    return unflatten({path: leaf[...] for path, leaf in _parameters(model).items()})


def _copy_with(model: ModelT, params: dict[str, Any]) -> ModelT:
    """A model of its own with other parameters; those that `params` lacks stay."""
    copy, values = nnx.merge(*_split(model)), flatten(params)
    for path, variable in _parameters(copy).items():
        if path in values:
            variable.set_value(values[path])
    return copy


def _split(model: Any) -> tuple[Any, Any]:
    graph, state = nnx.split(model)
    return graph, fresh(state)


def _as_dict(leaf: Any) -> Any:
    """A state as nested dicts of variables."""
    if not isinstance(leaf, nnx.State):
        return leaf
    return unflatten({path_of(names): variable for names, variable in nnx.to_flat_state(leaf)})


def _is_state(leaf: Any) -> bool:
    return isinstance(leaf, nnx.State | nnx.Variable)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _set(variable: nnx.Variable, value: jax.Array) -> None:
    variable.set_value(value)
