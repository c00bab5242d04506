"""What in an NNX model has no adapter, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flax import nnx

from mora_jax._arrays.paths import join_path, list_paths

_BY_FUNCTION = "adapt the model as a function of its parameters, mora_jax.adapt(function, config)"

#: Kinds of modules -> why their parameters have no adapter, for the table of a plan.
_REASONS: dict[type, str] = {
    nnx.Linear: "not chosen",
    nnx.LinearGeneral: "not chosen",
    nnx.Einsum: "not chosen",
    nnx.Conv: "not chosen; convolutions are adapted when targets names them",
    nnx.Embed: "not chosen; embeddings are adapted when targets names them",
    nnx.ConvTranspose: "a ConvTranspose; state its axes in MoRAConfig.kernels",
    nnx.bridge.ToNNX: "in a linen module; adapt the model as a function",
}
_OWN = "of no layer of Flax's; state its axes in MoRAConfig.kernels"


def reason_of(module: Any) -> str:
    """Why the parameters of a module have no adapter."""
    return next((why for kind, why in _REASONS.items() if isinstance(module, kind)), _OWN)


def hints(modules: Iterable[tuple[str, Any]]) -> list[str]:
    """Sentences for an error: what there is beside linear layers, and how to adapt it.

    Args:
      modules: pairs of path and module, all of a model.
    """
    named, linen, stated = [], [], []
    for path, module in modules:
        if isinstance(module, nnx.Conv | nnx.Embed):
            named.append(path)
        elif isinstance(module, nnx.bridge.ToNNX):
            linen.append(path)
        elif reason_of(module) != "not chosen":
            values = vars(module).items()
            params = [name for name, value in values if isinstance(value, nnx.Param)]
            stated += [join_path(path, name) for name in params if vars(module)[name].ndim > 1]
    sentences = []
    if named:
        sentences.append(
            f"It has convolutions or embeddings at {list_paths(named)}: name them in "
            "MoRAConfig.targets."
        )
    if linen:
        sentences.append(
            f"It has linen modules at {list_paths(linen)}, whose layers are not seen: adapt the "
            "linen module itself, before nnx.bridge.ToNNX takes it, or " + _BY_FUNCTION + "."
        )
    if stated:
        sentences.append(
            f"It has parameters of other layers at {list_paths(stated)}: state their axes, "
            f"MoRAConfig(kernels={{{stated[0]!r}: KernelAxes(inputs, outputs)}}), or "
            + _BY_FUNCTION
            + "."
        )
    return sentences
