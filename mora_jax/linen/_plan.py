"""The plan of a linen model: the layers that one trace of it has met, and what was chosen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from mora_jax._arrays.paths import ADAPTER, is_adapter, list_paths
from mora_jax._plans.config import MoRAConfig, check_matches
from mora_jax._plans.patterns import matches
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
        _check_reachable(chooser, noted, base)
        check_matches(chooser, noted.linear, base)
    elif isinstance(chooser, Plan):
        _check_layers_of(chooser, noted)
    _check_noted(chooser, noted)
    layers = tuple((path, layer.spec(path, params)) for path, layer in noted.adapted.items())
    total = sum(math.prod(shape) for shape in base.values())
    merges = chooser.merges if isinstance(chooser, Plan) else 0
    left = _left(chooser, noted, base)
    return Plan(layers, _also_train(chooser, base), total, merges=merges, unadapted=left)


#: How to reach what no interception of layers reaches.
_AS_A_FUNCTION = (
    "adapt the model as a function of its parameters, mora_jax.adapt(lambda params, *inputs: "
    "model.apply({'params': params}, *inputs), config), or the FlaxPreTrainedModel itself where "
    "this is the module of one"
)


def _check_reachable(config: MoRAConfig, noted: Recorder, base: Mapping[str, Any]) -> None:
    """Raises ValueError if the config speaks of layers that are there, but out of reach."""
    matrices = sorted({path.rpartition("/")[0] for path, shape in base.items() if len(shape) > 1})
    kinds = {path: noted.kinds.get(path, "a parameter") for path in matrices}
    kinds |= dict.fromkeys(noted.nested, "under an `apply` of its own")
    name = lambda path: f"{path or '(root)'} ({kinds[path]})"
    if not noted.linear:
        raise ValueError(
            f"the model has no linear layer to adapt. Its matrices are in "
            f"{list_paths(map(name, kinds))}. nn.Conv and nn.Embed are adapted where `targets` "
            f"matches their paths. To reach the others, {_AS_A_FUNCTION}."
        )
    for field, pattern in config.patterns().items():
        of_layers = field.partition("[")[0] in ("targets", "ranks", "schemes")
        if not of_layers or any(matches(pattern, path) for path in noted.linear):
            continue
        if found := [path for path in kinds if matches(pattern, path)]:
            raise ValueError(
                f"MoRAConfig.{field}={pattern!r} matches no layer that can be adapted here, but "
                f"{list_paths(map(name, found))}. To reach these, {_AS_A_FUNCTION}."
            )


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
    left = [(path, "under an `apply` of its own") for path in noted.nested]
    matrices = {path for path, shape in base.items() if len(shape) > 1}
    trained = {path for path in matrices if chooser is not None and chooser.trains(path)}
    in_full = {path.rpartition("/")[0] for path in trained}
    for path in noted.linear.keys() - noted.adapted.keys() - in_full:
        known = isinstance(chooser, MoRAConfig)
        left.append((path, chooser.reason(path) if known else "not in the plan"))
    for path in matrices - trained:
        layer = path.rpartition("/")[0]
        if layer not in noted.linear and layer not in noted.adapted:
            left.append((path, "in no linear layer"))
    return tuple(sorted(left))
