"""Adapters in the format of PEFT and of the authors' fork of it: safetensors and a JSON config.

A directory of two files, as `PeftModel.save_pretrained` writes it:

    adapter_config.json           use_mora, mora_type, r, rank_pattern, target_modules, ...
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight and .lora_B.weight

MoRA's one matrix is stored twice, as both. `LowRank` is LoRA as every PEFT has it. Files hold the
transposes of our matrices. How modules are called is data, `names=`, as in `export`; `LLAMA`, the
same as there, is the default.

Pickles (`adapter_model.bin`) are refused: opening one runs code.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._arrays.boxes import put_beside, value_of
from mora_jax._arrays.paths import flatten, listing, rebuild
from mora_jax._params.checks import check_adapted, check_unadapted, refuse_dora
from mora_jax._params.split import Params
from mora_jax._plans.layer import AdapterSpec, LayerConfig
from mora_jax._plans.plan import Plan
from mora_jax._schemes.base import LowRank, Sharing, square_rank
from mora_jax._torch.directories import check_new
from mora_jax._torch.names import Name, torch_kernels
from mora_jax._torch.tensors import LLAMA
from mora_jax.peft._config import CONFIG, TENSORS, PeftConfig, tensor_name
from mora_jax.peft._read import check_modules, read
from mora_jax.peft._save import config_for, write

__all__ = ["LLAMA", "Name", "load_adapters", "save_adapters"]


def save_adapters(
    directory: str | os.PathLike[str], params: Params, plan: Plan, *, names: Iterable[Name] = LLAMA
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

    Raises:
      ValueError: where the plan does not fit the parameters; where the directory exists; where a
        layer has no name; naming the layers that the format has no words for: schemes that the
        authors lack, several schemes in one plan, DoRA, `also_train`; where an adapter holds a
        number that is not finite.

    >>> import tempfile, flax.linen as nn, jax, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> pretrained = nn.Dense(6).init(jax.random.key(0), jax.numpy.ones((1, 3)))["params"]
    >>> params, names = mora_jax.attach(plan, pretrained), [Name("kernel", "dense")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapters(f"{folder}/adapter", params, plan, names=names)
    ...     loaded, plan = load_adapters(f"{folder}/adapter", pretrained, names=names)
    >>> jax.tree.map(jax.numpy.shape, loaded)
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix': (3, 3)}}
    """
    path = check_new(directory)
    leaves = flatten(params)
    check_adapted(plan, leaves)
    if plan.also_train:
        raise ValueError(
            "not saved: an adapter's file has no place for parameters trained in full beside it, "
            f"{listing(dict(plan.also_train))}. checkpoint.save_adapters saves them."
        )
    refuse_dora(
        plan,
        "saved",
        "has magnitudes relative to the base's here, and absolute ones in PEFT. "
        "checkpoint.save_adapters saves them",
    )
    kernels, left = torch_kernels(_shapes(leaves), names)
    tensors, layers, schemes, ranks = {}, {}, {}, {}
    for (layer, spec), kernel in zip(plan.layers, plan.kernel_paths(), strict=True):
        if kernel not in kernels:
            raise ValueError(f"not saved: layer {layer!r} has no module in names: {left[kernel]}.")
        axes, modules = kernels[kernel]
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
    write(path, config.to_json(), tensors)


def load_adapters(
    directory: str | os.PathLike[str], params: Params, *, names: Iterable[Name] = LLAMA
) -> tuple[dict[str, Any], Plan]:
    """Loads an adapter of PEFT, or of the authors' fork, beside the parameters of its base model.

    Matrices keep their bits and their dtype. The format says nothing of cycles: sharing goes on in
    ReMoRA with the authors' ("groupings"), so that it can be saved again; placement is "auto".

    Args:
      directory: where `adapter_config.json` and `adapter_model.safetensors` are.
      params: the base model's parameters, without adapters.
      names: which PyTorch modules the kernels are; the first that matches counts.

    Returns:
      (params, plan): parameters with adapters, and the plan to `adapt` the base model with.

    Raises:
      FileNotFoundError: where there is no adapter.
      ValueError: naming the file and the tensor or field, where it is damaged, is a pickle, is an
        adapter of another model, or says something that this library does not compute.
    """
    path = pathlib.Path(directory).absolute()
    leaves = flatten(params)
    check_unadapted(Plan(()), leaves)
    config, tensors = read(path)
    file = path / TENSORS
    kernels, left = torch_kernels(_shapes(leaves), names)
    check_modules(file, tensors, config, kernels, left)
    layers, loaded, parents = [], {}, [kernel.rpartition("/")[0] for kernel in kernels]
    for kernel, (axes, modules) in kernels.items():
        chosen = [config.selects(module) for module in modules]
        if not any(chosen):
            continue
        if not all(chosen):
            outside = modules[chosen.index(False)]
            raise ValueError(
                f"{path / CONFIG}: target_modules leave out {outside!r}, but {kernel!r} is one "
                "stack, which is adapted as a whole."
            )
        parent, _, name = kernel.rpartition("/")
        alone = parents.count(parent) == 1  # or a layer by itself, beside others in one dict
        layer_config = _layer_config(path, config, modules, tensors)
        spec = AdapterSpec(
            layer_config,
            tuple(value_of(leaves[kernel]).shape),
            axes,
            tuple(range(len(axes.batch))),
            name if alone else "",
        )
        layers.append((parent if alone else kernel, spec))
        loaded[kernel] = _from_torch(file, spec, modules, tensors)
    total = sum(int(np.prod(shape)) for shape in _shapes(leaves).values())
    plan = Plan(tuple(layers), base_parameters=total)
    check_unadapted(plan, leaves)
    owners, new = plan.adapter_owners(), {}
    for layer, _ in plan.layers:
        for name, leaf in plan.leaf_paths(layer).items():
            kernel, axes = owners[leaf]
            new[leaf] = put_beside(leaves[kernel], loaded[kernel][name], axes)
    return rebuild(leaves | new, params), plan


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(np.shape(value_of(leaf))) for path, leaf in leaves.items()}


def _dropout(plan: Plan) -> float:
    rates = {spec.config.dropout: layer for layer, spec in plan.layers}
    if len(rates) > 1:
        raise ValueError(f"not saved: an adapter has one rate of dropout, the plan has {rates}.")
    return next(iter(rates), 0.0)


def _to_torch(spec: AdapterSpec, adapter: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{"A": [n, rows, columns], "B": ...} as torch has them, n elements of the stack."""
    arrays = {name: jax.device_get(value_of(leaf)) for name, leaf in adapter.items()}
    arrays = {
        name: np.moveaxis(array, spec.adapter_batch_axes, range(len(spec.batch)))
        for name, array in arrays.items()
    }
    flat = {k: v.reshape(-1, *v.shape[-2:]).swapaxes(1, 2) for k, v in arrays.items()}
    if isinstance(spec.scheme, LowRank):
        return {"A": flat["a"], "B": flat["b"]}
    return {"A": flat["matrix"], "B": flat["matrix"]}


def _layer_config(
    path: pathlib.Path,
    config: PeftConfig,
    modules: tuple[str, ...],
    tensors: Mapping[str, np.ndarray],
) -> LayerConfig:
    """What the modules of one kernel have in common."""
    dtypes = {
        str(tensors[name].dtype): name
        for module in modules
        for name in (tensor_name(module, "A"), tensor_name(module, "B"))
    }
    if len(dtypes) > 1:
        raise ValueError(f"{path / TENSORS}: one kernel's tensors differ in dtype: {dtypes}.")
    ranks = {config.rank_of(module): module for module in modules}
    schemes = {config.scheme_of(module): module for module in modules}
    if len(ranks) > 1 or len(schemes) > 1:
        raise ValueError(
            f"{path / CONFIG}: modules of one stack differ: ranks {ranks}, schemes {schemes}."
        )
    (scheme,) = schemes
    return LayerConfig(
        next(iter(ranks)),
        scheme,
        cycle="groupings" if isinstance(scheme, Sharing) else "auto",
        dropout=config.dropout,
        dtype=next(iter(dtypes)),
    )


def _from_torch(
    file: pathlib.Path,
    spec: AdapterSpec,
    modules: tuple[str, ...],
    tensors: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The adapter's leaves, [B..., rows, columns]."""
    sides = {"a": "A", "b": "B"} if isinstance(spec.scheme, LowRank) else {"matrix": "A"}
    leaves = {}
    for name, side in sides.items():
        rows, columns = spec.shapes[name][-2:]
        stack = [tensors[tensor_name(module, side)] for module in modules]
        for module, tensor in zip(modules, stack, strict=True):
            if tensor.shape != (columns, rows):
                raise ValueError(
                    f"{file}: {tensor_name(module, side)!r} has shape {tensor.shape}; "
                    f"{spec.scheme} of rank {spec.config.rank} on {spec.features[0]} -> "
                    f"{spec.features[1]} features has {(columns, rows)}. "
                    "Is the adapter of another model?"
                )
        leaves[name] = np.stack([tensor.T for tensor in stack]).reshape(spec.shapes[name])
    if "matrix" in sides:
        for module in modules:
            first, second = (tensors[tensor_name(module, side)] for side in "AB")
            if first.shape != second.shape or first.tobytes() != second.tobytes():
                raise ValueError(
                    f"{file}: {tensor_name(module, 'B')!r} is not the copy of "
                    f"{tensor_name(module, 'A')!r} that MoRA stores there."
                )
    return leaves
