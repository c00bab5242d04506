"""The plan of a linen model: the layers that one trace of it has met, and what was chosen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from mora_jax._arrays.paths import ADAPTER, is_adapter, list_paths
from mora_jax._plans.config import MoRAConfig, check_matches
from mora_jax._plans.plan import Plan
from mora_jax.linen._adapt import AdaptedModule
from mora_jax.linen._recorder import Recorder


def plan(
    model: nn.Module, *inputs: Any, rngs: Any = None, method: Any = None, **kwargs: Any
) -> Plan:
    """The plan of an adapted linen model. See `mora_jax.plan`."""
    chooser = model.mora_chooser if isinstance(model, AdaptedModule) else None
    noted = Recorder(chooser)
    params = noted.trace(model, inputs, kwargs, rngs=rngs, method=method)
    base = {path: leaf.shape for path, leaf in params.items() if not is_adapter(path)}
    if isinstance(chooser, MoRAConfig):
        check_matches(chooser, noted.linear, base)
    elif isinstance(chooser, Plan):
        _check_layers_of(chooser, noted)
    _check_noted(chooser, noted)
    layers = tuple((path, layer.spec(path, params)) for path, layer in noted.adapted.items())
    total = sum(math.prod(shape) for shape in base.values())
    merges = chooser.merges if isinstance(chooser, Plan) else 0
    left = _left(chooser, noted, base)
    return Plan(layers, _also_train(chooser, base), total, merges=merges, unadapted=left)


def _check_layers_of(plan: Plan, noted: Recorder) -> None:
    """Raises ValueError if the model was adapted with a plan of layers that it lacks."""
    if missing := plan.keys() - noted.adapted.keys():
        raise ValueError(
            f"the model was adapted with a plan that has layers at {list_paths(missing)}, where "
            f"the model has none; its linear layers: {list_paths(noted.linear)}. "
            "Was the plan made for another model?"
        )


def _check_noted(chooser: Any, noted: Recorder) -> None:
    """Raises ValueError if no adapter reaches a chosen layer, or any; warns of idle dropout."""
    chosen = [path for path in noted.linear if chooser is not None and chooser.choose(path)]
    if unreached := set(chosen) - noted.adapted.keys():
        raise ValueError(
            f"layers were chosen that make no use of `dot_general_cls`, so no adapter reaches "
            f"them: {list_paths(unreached)}. Leave them out with MoRAConfig.exclude."
        )
    if noted.without_stream:
        warnings.warn(
            f"dropout has no effect in {list_paths(noted.without_stream)}: the rng stream "
            f"{ADAPTER!r} does not get there. Name it in the split_rngs of the nn.scan or nn.vmap "
            "around them.",
            stacklevel=4,
        )
    if not noted.adapted:
        raise ValueError(
            "the model has no adapters. Adapt it first, plan(adapt(model, config), *inputs), "
            "or build it with MoRADense."
        )


def _also_train(chooser: Any, base: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(path, shape) of every parameter that is trained in full beside the adapters."""
    if isinstance(chooser, MoRAConfig):
        return tuple((path, shape) for path, shape in base.items() if chooser.trains(path))
    return chooser.also_train if isinstance(chooser, Plan) else ()


def _left(chooser: Any, noted: Recorder, base: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(path, why) of what has no adapter: linear layers, and matrices of other layers."""
    left = []
    for path in noted.linear.keys() - noted.adapted.keys():
        known = isinstance(chooser, MoRAConfig)
        left.append((path, chooser.reason(path) if known else "not in the plan"))
    for path, shape in base.items():
        layer = path.rpartition("/")[0]
        trained = chooser is not None and chooser.trains(path)
        known = layer in noted.linear or layer in noted.adapted
        if len(shape) > 1 and not known and not trained:
            left.append((path, "in no linear layer"))
    return tuple(sorted(left))
