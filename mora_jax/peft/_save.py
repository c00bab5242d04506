"""Saving an adapter in PEFT's format: what its two files can say, and the files whole."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.paths import flatten, list_paths
from mora_jax._params.checks import check_adapted, refuse_dora
from mora_jax._params.split import Params
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._product.axes import KernelAxes
from mora_jax._schemes.base import Scheme
from mora_jax._schemes.operators import square_rank
from mora_jax._schemes.registry import MORA_TYPES
from mora_jax._torch.directories import check_new, new_directory
from mora_jax._torch.names import KernelName, torch_kernels
from mora_jax._torch.safetensors_writer import write_tensors
from mora_jax._torch.tensors import LLAMA
from mora_jax.peft._config import CONFIG, TENSORS, PeftConfig, tensor_name
from mora_jax.peft._digest import metadata_of
from mora_jax.peft._patterns import ends_as

_KNOWN = {str(scheme) for scheme in MORA_TYPES}


def save_adapters(
    directory: str | os.PathLike[str],
    params: Params,
    plan: Plan,
    *,
    names: Iterable[KernelName] = LLAMA,
    base_model: str | None = None,
) -> None:
    """Saves adapters for PEFT (`LowRank`) or the authors' fork of it (MoRA) to load.

    In the middle of a ReMoRA cycle the scheme of that moment is written; the adapter then belongs
    to the base as it has been merged so far. Files are written to a temporary name first, so a
    directory is either whole or not there. Of several processes, let one call it.

    Args:
      directory: a path that does not exist yet.
      params: parameters with adapters; the base is not written.
      plan: the plan.
      names: which PyTorch modules the kernels are; the first that matches counts.
      base_model: name or path of the base model, for whoever loads the adapter. Required after
        `merge_and_reset`, which changed the base: where `export.save_merged` wrote the merged one.

    Raises:
      ValueError: where the plan does not fit the parameters; where the base was merged into and
        `base_model` does not say where it is; where the directory exists; where a
        layer has no name; naming the layers that the format has no words for: schemes that the
        authors lack, several schemes in one plan, DoRA, `also_train`; where an adapter holds a
        number that is not finite.

    >>> import tempfile, flax.linen as nn, mora_jax, mora_jax.peft
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> pretrained = nn.Dense(6).init(jax.random.key(0), jax.numpy.ones((1, 3)))["params"]
    >>> params = mora_jax.attach(plan, pretrained)
    >>> names = [mora_jax.peft.KernelName("kernel", "dense")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapters(f"{folder}/adapter", params, plan, names=names)
    ...     loaded, plan = mora_jax.peft.load_adapters(f"{folder}/adapter", pretrained, names=names)
    >>> jax.tree.map(jax.numpy.shape, loaded)
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix_sharing': (3, 3)}}
    """
    path = check_new(directory)
    leaves = flatten(params)
    check_adapted(plan, leaves)
    _check_plan(plan)
    check_base_model(plan, base_model)
    kernels, left = torch_kernels(
        {path: np.shape(unbox(leaf)) for path, leaf in leaves.items()}, names
    )
    tensors, layers, schemes, ranks = {}, {}, {}, {}
    for (layer, spec), kernel in zip(plan.layers, plan.kernel_paths(), strict=True):
        if kernel not in kernels:
            raise ValueError(f"not saved: layer {layer!r} has no module in names: {left[kernel]}.")
        axes, modules = kernels[kernel]
        _check_layer(layer, spec, kernel, axes)
        sides = _to_torch(spec, {k: leaves[v] for k, v in plan.leaf_paths(layer).items()})
        for side, stack in sides.items():
            for module, matrix in zip(modules, stack, strict=True):
                tensors[tensor_name(module, side)] = np.ascontiguousarray(matrix)
        for module in modules:
            layers[module], schemes[module] = layer, spec.scheme
            ranks[module] = spec.config.rank
        if not all(np.isfinite(stack).all() for stack in sides.values()):
            raise ValueError(f"not saved: the adapter of {layer!r} is not finite.")
    others = {module for kernel in kernels.values() for module in kernel.modules} - layers.keys()
    config = config_for(schemes, ranks, others, layers=layers, dropout=_dropout(plan))
    metadata = metadata_of(schemes, ranks, config.dropout, tensors)
    config = dataclasses.replace(config, base_model=base_model)
    write(path, config.to_json(), tensors, metadata)


def check_base_model(plan: Plan, base_model: str | None) -> None:
    """Raises ValueError where adapters of a changed base do not say which it is."""
    if plan.merges and base_model is None:
        raise ValueError(
            "not saved: merge_and_reset has changed the base, and beside the pretrained one these "
            "adapters would give other outputs. Write the base as it is now with "
            "mora_jax.export.save_merged (of mora_jax.split(params, plan)[1]), and say where: "
            "base_model='that/directory'. To serve all that was trained, "
            "mora_jax.export.save_merged(directory, params, plan) writes one model."
        )


def _check_plan(plan: Plan) -> None:
    """Raises ValueError for what an adapter's file has no place for."""
    if plan.also_train:
        raise ValueError(
            "not saved: an adapter's file has no place for parameters trained in full beside it, "
            f"{list_paths(dict(plan.also_train))}. checkpoint.save_adapters saves them."
        )
    refuse_dora(
        plan,
        "saved",
        "has magnitudes relative to the base's here, and absolute ones in PEFT. "
        "checkpoint.save_adapters saves them",
    )


def _check_layer(layer: str, spec: AdapterSpec, kernel: str, axes: KernelAxes) -> None:
    """Raises ValueError unless the authors' code would make this matrix of this kernel."""
    if spec.size != (size := square_rank(*spec.features, spec.config.rank, spec.scheme)):
        raise ValueError(
            f"not saved: layer {layer!r} has a matrix of {spec.size} rows "
            f"(size_multiple={spec.config.size_multiple}); the authors' code makes it {size} "
            f"at rank {spec.config.rank}. checkpoint.save_adapters saves every size."
        )
    if axes != spec.kernel_axes:
        raise ValueError(
            f"not saved: names read {kernel!r} as {axes}, the plan as {spec.kernel_axes}."
        )


def _dropout(plan: Plan) -> float:
    rates = {spec.config.dropout: layer for layer, spec in plan.layers}
    if len(rates) > 1:
        raise ValueError(f"not saved: an adapter has one rate of dropout, the plan has {rates}.")
    return next(iter(rates), 0.0)


def _to_torch(spec: AdapterSpec, adapter: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{"A": [n, rows, columns], "B": ...} as torch has them, n elements of the stack."""
    arrays = {name: jax.device_get(unbox(leaf)) for name, leaf in adapter.items()}
    arrays = {
        name: np.moveaxis(array, spec.adapter_batch_axes, range(len(spec.batch)))
        for name, array in arrays.items()
    }
    flat = {k: v.reshape(-1, *v.shape[-2:]).swapaxes(1, 2) for k, v in arrays.items()}
    first, second = spec.scheme.peft_leaves
    return {"A": flat[first], "B": flat[second]}


def config_for(
    schemes: Mapping[str, Scheme],
    ranks: Mapping[str, int],
    others: set[str],
    *,
    layers: Mapping[str, str],
    dropout: float = 0.0,
) -> PeftConfig:
    """The config of an adapter.

    Args:
      schemes: scheme of every adapted module.
      ranks: its rank.
      others: the model's further modules.
      layers: path of the layer that each module is, for errors.
      dropout: its rate.

    Raises:
      ValueError: naming the layers, where the format has no words for it.
    """
    _check_one_scheme(schemes, layers)
    mora_type = MORA_TYPES.get(next(iter(schemes.values())))
    rank, own_ranks = _usual(ranks)
    found = {module: scheme.lora_alpha(ranks[module]) for module, scheme in schemes.items()}
    alphas = {module: _number(alpha) for module, alpha in found.items() if alpha is not None}
    alpha, own_alphas = _usual(alphas) if alphas else (rank, {})
    targets = _targets(schemes, others)
    config = PeftConfig(mora_type, rank, alpha, targets, own_ranks, own_alphas, dropout=dropout)
    _check_told_apart(config, others, layers)
    return config


def _check_one_scheme(schemes: Mapping[str, Scheme], layers: Mapping[str, str]) -> None:
    """Raises ValueError unless the modules have one scheme, and one that the format knows."""
    kinds: dict[str, set[str]] = {}
    for module, scheme in schemes.items():
        # LoRA's alpha may differ from module to module, nothing else.
        kind = str(scheme) if scheme.lora_alpha(1) is None else type(scheme).__name__
        kinds.setdefault(kind, set()).add(layers[module])
    unknown = {str(s) for s in schemes.values() if s.lora_alpha(1) is None} - _KNOWN
    if unknown:
        found = "; ".join(f"{kind} in layers {list_paths(kinds[kind])}" for kind in sorted(unknown))
        raise ValueError(
            f"not saved: the authors' code lacks {found}. It has {', '.join(sorted(_KNOWN))} and "
            "LowRank. checkpoint.save_adapters saves every scheme."
        )
    if len(kinds) > 1:
        found = "; ".join(f"{kind} in layers {list_paths(kinds[kind])}" for kind in sorted(kinds))
        raise ValueError(f"not saved: an adapter in the authors' format has one scheme: {found}.")


def _targets(adapted: Collection[str], others: set[str]) -> tuple[str, ...]:
    """`target_modules`: the ends of the names, or whole names if an end names another module."""
    short = {module.rpartition(".")[2] for module in adapted}
    clear = not any(ends_as(tuple(short), module) for module in others)
    return tuple(sorted(short if clear else adapted))


def _check_told_apart(config: PeftConfig, others: set[str], layers: Mapping[str, str]) -> None:
    """Raises ValueError if PEFT, which goes by the ends of names, would confuse two modules."""
    if confused := [module for module in others if config.selects(module)]:
        raise ValueError(
            f"not saved: {list_paths(confused)} are not adapted, but their names end as those of "
            "adapted modules do, and PEFT tells them by their ends."
        )
    names = {*config.ranks, *config.alphas}
    config.patterns.add("not saved: rank_pattern", names)
    for name in names:
        for module in layers:
            if module != name and config.patterns.ends("rank_pattern", name, module):
                raise ValueError(
                    f"not saved: {module!r} (layer {layers[module]!r}) ends as {name!r} does, "
                    "which has another rank or alpha, and PEFT tells them by their ends."
                )


def _number(alpha: float) -> float:
    """Whole numbers without a point, as people write them."""
    return int(alpha) if alpha == int(alpha) else alpha


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the commonest value, those that differ from it)."""
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    return usual, {name: value for name, value in values.items() if value != usual}


def write(
    path: pathlib.Path,
    config: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a directory that is either whole or not there."""
    # By a writer of our own: the library puts several keys of metadata in any order.
    shapes = {
        name: jax.ShapeDtypeStruct(tensors[name].shape, tensors[name].dtype)
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    }
    with new_directory(path) as new:
        write_tensors(new / TENSORS, shapes, tensors.__getitem__, metadata=metadata)
        (new / CONFIG).write_text(config)
