"""Merging, unmerging and ReMoRA's restarts for NNX models."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from mora_jax._arrays.boxes import AlsoTrained
from mora_jax._arrays.paths import flatten, rename_leaves, unflatten
from mora_jax._arrays.rounding import Rounding
from mora_jax._merging import merge as _merge
from mora_jax._merging import remora as _remora
from mora_jax._merging import unmerge as _unmerge
from mora_jax._merging.prune import Reset
from mora_jax._merging.remora import ResetReport
from mora_jax.nnx._adapt import plan
from mora_jax.nnx._kernels import path_of
from mora_jax.nnx._state import ModelT, adapted_layers, copy_with, parameters_of, values_of


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

    >>> import mora_jax.nnx
    >>> layer = mora_jax.nnx.MoRALinear(3, 6, rank=1, scheme="sharing", rngs=nnx.Rngs(0))
    >>> type(merge(layer)) is nnx.Linear
    True
    """
    merged = _merge.merge(values_of(model), plan(model), rounding=rounding, key=key)
    copy = copy_with(model, merged)
    for _, layer in list(adapted_layers(copy)):
        object.__setattr__(layer, "__class__", type(layer).mora_base)
        del layer.mora
    for variable in parameters_of(copy).values():
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

    >>> import mora_jax.nnx
    >>> layer = mora_jax.nnx.MoRALinear(3, 6, rank=1, scheme="sharing", rngs=nnx.Rngs(0))
    >>> type(unmerge(merge(layer), layer)) is mora_jax.nnx.MoRALinear
    True
    """
    values = values_of(merged), values_of(model), plan(model)
    return copy_with(model, _unmerge.unmerge(*values, rounding=rounding, key=key))


def merge_and_reset(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    *,
    key: jax.Array | None = None,
    donate: bool = False,
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
        be used afterwards**.
      rounding: "nearest" or "stochastic", as for `mora_jax.merge`.
      reset: "zero" or a `Prune`, as for `mora_jax.merge_and_reset`.

    Returns:
      What was reset, and what rounding lost.

    Raises:
      ValueError: as `mora_jax.merge_and_reset`, and then nothing is changed.
    """
    state = jax.tree.map(_as_dict, optimizer.opt_state, is_leaf=_is_state)
    values = jax.tree.map(lambda leaf: leaf[...], state, is_leaf=_is_variable)
    before = plan(model)
    options: Any = {"key": key, "donate": donate, "rounding": rounding, "reset": reset}
    try:
        result = _remora.merge_and_reset(
            values_of(model), values, before, optimizer=optimizer.tx, **options
        )
    except ValueError as error:
        if "freeze_base" not in str(error):
            raise
        raise ValueError(
            f"{error} With NNX: nnx.Optimizer(model, mora_jax.freeze_base(optimizer, "
            "mora_jax.plan(model)), wrt=MoRAParam)."
        ) from error
    for path, layer in adapted_layers(model):
        layer.mora.go_on_with(result.plan[path].config)
    params = flatten(result.params)
    for path, variable in parameters_of(model).items():
        variable.set_value(params[path])
    if names := before.renamed(result.plan):
        optimizer.opt_state = rename_leaves(optimizer.opt_state, names)
        state = jax.tree.map(_as_dict, optimizer.opt_state, is_leaf=_is_state)
    jax.tree.map(_set, state, result.opt_state, is_leaf=_is_variable)
    return result.report


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
