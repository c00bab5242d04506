"""Hugging Face's Flax models, `FlaxPreTrainedModel`: a linen module, its parameters, and methods.

Such a model is no linen module, and the modules in it make products that no interception reaches
(kernels stored transposed, heads that are tied by hand). Everything it does goes through
`module.apply`, so an adapted model is a copy whose module runs as a function (`function.py`).
Told by its attributes, so that transformers need not be installed.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from mora_jax._arrays.paths import ADAPTER, IDS, path_seed
from mora_jax._params.attach import attach
from mora_jax._plans.config import MoRAConfig
from mora_jax._plans.plan import Plan
from mora_jax._tracing import function as _function
from mora_jax._tracing.function import AdaptedFunction


def is_pretrained_model(model: Any) -> bool:
    """Whether it is one of Hugging Face's, adapted or not."""
    inner = getattr(model, "module", None)
    return isinstance(inner, nn.Module | _AdaptedModule) and hasattr(model, "init_weights")


def adapt(model: Any, chooser: MoRAConfig | Plan, *, key: jax.Array | None = None) -> Any:
    """A model like `model` with adapters. See `mora_jax.adapt`."""
    if isinstance(model.module, _AdaptedModule):
        raise TypeError("the model is adapted already; adapt the base model instead.")
    plan = chooser if isinstance(chooser, Plan) else _plan(model, chooser)
    adapted = copy.copy(model)
    adapted.generation_config = copy.deepcopy(model.generation_config)
    adapted._module = _AdaptedModule(model.module, plan)
    if model._is_initialized:
        adapted.params = attach(plan, model.params, key=key)
    return adapted


def plan(model: Any) -> Plan:
    """The plan of an adapted model. See `mora_jax.plan`."""
    if not isinstance(model.module, _AdaptedModule):
        raise ValueError("the model has no adapters. Adapt it first: adapt(model, config).")
    return model.module.mora_plan


class _AdaptedModule:
    """Stands where a model holds its linen module, and applies it with adapters."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.mora_base, self.mora_plan = module, plan

    def __getattr__(self, name: str) -> Any:
        # Not for what copying asks for before there is a base.
        if name.startswith("__") or name == "mora_base":
            raise AttributeError(name)
        return getattr(self.mora_base, name)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`; "params" holds the adapters too.

        Where they are a bank, `{"mora": {"adapter_ids": ids}}` says which one each example has.
        """
        rest = {name: value for name, value in variables.items() if name not in ("params", ADAPTER)}
        ids = variables.get(ADAPTER, {}).get(IDS)
        run = AdaptedFunction(functools.partial(_apply, self.mora_base), self.mora_plan)
        # The adapters' dropout goes with the model's own: `dropout_rng` in training.
        key = (kwargs.get("rngs") or {}).get("dropout")
        if key is not None and _is_deterministic(self.mora_base, args, kwargs):
            key = None
        key = None if key is None else jax.random.fold_in(key, path_seed(ADAPTER))
        own = {"mora_key": key, "mora_adapter_ids": ids}
        return run(variables["params"], rest, *args, **own, **kwargs)


def _is_deterministic(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of `module.apply` asks for no dropout: by `deterministic`, or by `train`.

    Models give it by its place or by its name, and a method may take it among other arguments.
    """
    own = {name: value for name, value in kwargs.items() if name not in _OF_APPLY}
    method = kwargs.get("method") or type(module).__call__
    if isinstance(method, str):
        method = getattr(type(module), method)
    call = inspect.signature(getattr(method, "__func__", method)).bind(module, *args, **own)
    call.apply_defaults()
    given = call.arguments
    for name, parameter in call.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given = {**given, **given[name]}
    if "deterministic" in given:
        return bool(given["deterministic"])
    return not given.get("train", True)


#: Arguments of `flax.linen.Module.apply` itself.
_OF_APPLY = ("rngs", "method", "mutable", "capture_intermediates")


def _apply(module: nn.Module, params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
    return module.apply({"params": params, **rest}, *args, **kwargs)


def _plan(model: Any, config: MoRAConfig) -> Plan:
    """Traces the module on the inputs that the model itself initialises it with."""
    calls = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(model.module, name)

        def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return model.module.init(rngs, *args, **kwargs)

    def run(key: jax.Array) -> Any:
        recording = copy.copy(model)
        recording._module = Recorder()
        recording.init_weights(key, model.input_shape)
        args, kwargs = calls[-1]
        function = AdaptedFunction(functools.partial(_apply, model.module), config)
        plans.append(_function.plan(function, model.params_shape_tree, {}, *args, **kwargs))

    plans: list[Plan] = []
    jax.eval_shape(run, jax.random.key(0))
    return plans[-1]
