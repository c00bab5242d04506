"""`adapt` and `plan`: the doors to a whole model, whatever framework it is written in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, overload

import jax
from flax import linen as nn
from flax import nnx as flax_nnx

from mora_jax import linen, nnx
from mora_jax._arrays.paths import list_paths
from mora_jax._plans.config import MoRAConfig
from mora_jax._plans.plan import Plan
from mora_jax._tracing import function as _function
from mora_jax._tracing.function import AdaptedFunction
from mora_jax.linen import _hugging_face
from mora_jax.linen import _plan as _linen_plan
from mora_jax.linen._adapt import ModuleT
from mora_jax.linen._hugging_face import is_pretrained_model
from mora_jax.nnx import _adapt as _nnx_adapt
from mora_jax.nnx._state import ModelT


# A module is callable too; the first overload that fits is taken.
@overload
def adapt(  # pyright: ignore[reportOverlappingOverload]
    model: ModuleT, config_or_plan: MoRAConfig | Plan
) -> ModuleT: ...


@overload
def adapt(
    model: ModelT, config_or_plan: MoRAConfig | Plan, *, key: jax.Array | None = None
) -> ModelT: ...


@overload
def adapt(model: Callable[..., Any], config_or_plan: MoRAConfig | Plan) -> AdaptedFunction: ...


def adapt(model: Any, config_or_plan: MoRAConfig | Plan, *, key: jax.Array | None = None) -> Any:
    """A model like `model` whose chosen linear layers have MoRA adapters.

    Equivalent to PEFT's `get_peft_model`, but nothing is replaced and nothing is copied: the model
    is not touched, and its parameters keep their paths. With new adapters (`attach`) its outputs
    are those of the base model.

    Args:
      model: a linen module, unbound; or any function `(params, *inputs) -> outputs` of parameters
        in nested dicts (`as_params` makes them of other trees), whose every parameter that enters a
        product as a matrix is a linear layer, named by the dict that it stands in; or an NNX model,
        or a `FlaxPreTrainedModel` of Hugging Face, which hold their parameters.
      config_or_plan: which layers get what. Take a config the first time; take the plan that
        `merge_and_reset` returns to go on with the next grouping.
      key: for models that hold their parameters, whose adapters are made at once: a PRNG key,
        required where the config draws numbers (`LowRank`, dropout in NNX).

    Returns:
      A linen module with the same fields and methods. It is hashable, a static argument for jit,
      even where `model` is not; the same arguments give the same object. Of a function, a function
      like it, whose parameters have adapters in them. Of a model that holds its parameters, a model
      like it that holds the adapters too, over the same arrays.

    Raises:
      TypeError: for what is neither, or adapted already.
      ValueError: for a bound module.

    >>> import flax.linen as nn, jax, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 3)))["params"]
    >>> jax.tree.map(jax.numpy.shape, params)
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix_sharing': (3, 3)}}
    """
    if not isinstance(config_or_plan, MoRAConfig | Plan):
        raise TypeError(
            f"adapt(model, config_or_plan): expected a MoRAConfig or a Plan, got "
            f"{type(config_or_plan).__name__}."
        )
    if isinstance(model, AdaptedFunction):
        raise TypeError("the function is adapted already; adapt the base function instead.")
    if isinstance(model, flax_nnx.Module):
        return nnx.adapt(model, config_or_plan, key=key)
    if is_pretrained_model(model):
        return _hugging_face.adapt(model, config_or_plan, key=key)
    if key is not None:
        raise TypeError(
            "key is for models that hold their parameters; attach(plan, params, key=key) takes it "
            "here."
        )
    if isinstance(model, nn.Module):
        return linen.adapt(model, config_or_plan)
    if callable(model) and not isinstance(model, type):
        return AdaptedFunction(model, config_or_plan)
    raise _not_a_model(model)


def plan(
    model: nn.Module | flax_nnx.Module | AdaptedFunction,
    *inputs: Any,
    rngs: Any = None,
    method: Any = None,
    **kwargs: Any,
) -> Plan:
    """What was adapted in `model`: static data that the tree functions take.

    The model is traced on shapes; no array is made and nothing is computed.

    Args:
      model: what `adapt` returned, or a linen module that uses `MoRADense`.
      *inputs: what the model's method takes: arrays, `jax.ShapeDtypeStruct`s, static values; for a
        function, its parameters first. Models that hold their parameters need none; an NNX model is
        traced on those it gets, to see that it uses its adapted kernels in their layers alone.
      rngs: as for `init`; only needed where the model wants several streams.
      method: as for `init`.
      **kwargs: further arguments of the model's method.

    Returns:
      The plan; `print(plan)` is a table.

    Raises:
      TypeError: for what is no such model.
      ValueError: where a pattern of the config matches nothing, the model has no adapters, a chosen
        layer cannot take one, or a cycle does not fit a layer.

    Warns:
      UserWarning: where a square matrix is larger than its layer, so that some entries cannot act;
        where dropout is asked for in layers that the rng stream `mora` does not reach.

    >>> import flax.linen as nn, jax, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(64), mora_jax.MoRAConfig(rank=2, scheme="sharing"))
    >>> print(mora_jax.plan(model, jax.ShapeDtypeStruct((1, 32), "float32")))
    layer   kernel   scheme     size  trained
    -----------------------------------------
    (root)  32 x 64  Sharing()  14    196
    1 adapter in 1 kernel; 196 trained parameters, 9.28% of the base model's 2,112
    """
    if isinstance(model, AdaptedFunction):
        found = _function.plan(model, *inputs, **kwargs)
    elif isinstance(model, flax_nnx.Module):
        found = nnx.plan(model)
        if inputs or kwargs:
            name = "__call__" if method is None else getattr(method, "__name__", method)

            def call(model, inputs):
                return getattr(model, name)(*inputs[0], **inputs[1])

            _nnx_adapt.check_forward_pass(model, call, (inputs, kwargs))
    elif is_pretrained_model(model):
        found = _hugging_face.plan(model)
    elif not isinstance(model, nn.Module):
        raise _not_a_model(model)
    else:
        found = _linen_plan.plan(model, *inputs, rngs=rngs, method=method, **kwargs)
    found.advance()  # A cycle that cannot go on is an error now, not at the first merge.
    if dead := {path: spec.dead_entries for path, spec in found.items() if spec.dead_entries}:
        warnings.warn(
            f"the square matrix is larger than its layer in {len(dead)} layers, so that up to "
            f"{max(dead.values()):,} entries a matrix cannot act: {list_paths(dead)}. "
            "A smaller rank there (MoRAConfig.ranks) trains as much.",
            stacklevel=2,
        )
    return found


def _not_a_model(model: Any) -> TypeError:
    return TypeError(
        f"expected a module of linen or NNX, a FlaxPreTrainedModel, or a function of parameters, "
        f"got a {type(model).__name__}."
    )
