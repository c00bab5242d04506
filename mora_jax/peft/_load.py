"""Loading an adapter in PEFT's format, with nothing in its two files taken on trust."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import DTypeLike

from mora_jax._arrays.boxes import put_beside, unbox
from mora_jax._arrays.paths import flatten, last_name, list_paths, unflatten_like
from mora_jax._params.checks import check_sizes, check_unadapted
from mora_jax._params.precision import loaded_dtypes
from mora_jax._params.split import Params
from mora_jax._plans.layer import AdapterSpec, LayerConfig
from mora_jax._plans.plan import Plan
from mora_jax._torch.names import KernelName, TorchKernel, torch_kernels
from mora_jax._torch.safetensors_writer import read_header
from mora_jax._torch.tensors import LLAMA
from mora_jax.peft._config import CONFIG, TENSORS, PeftConfig, read_config, tensor_name
from mora_jax.peft._digest import check_digest, metadata_of

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
#: More than the header's entry of one tensor takes.
_BYTES_OF_ENTRY = 1024

#: Name -> (dtype, shape) of a file's tensors.
Header = Mapping[str, tuple[str, tuple[int, ...]]]


def load_adapters(
    directory: str | os.PathLike[str],
    params: Params,
    *,
    names: Iterable[KernelName] = LLAMA,
    dtype: DTypeLike | None = "float32",
) -> tuple[dict[str, Any], Plan]:
    """Loads an adapter of PEFT, or of the authors' fork, beside the parameters of its base model.

    No number is rounded. Matrices in bfloat16 or float16 come in float32, as in PEFT, so that they
    can be trained on. The format says nothing of cycles: sharing goes on in ReMoRA with the
    authors' ("groupings"), so that it can be saved again; placement is "auto".

    Args:
      directory: where `adapter_config.json` and `adapter_model.safetensors` are.
      params: the base model's parameters, without adapters.
      names: which PyTorch modules the kernels are; the first that matches counts.
      dtype: matrices in a narrower dtype are widened to this one, and a note goes to the logger
        "mora_jax". Wider ones keep theirs. None keeps the file's.

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
    kernels, left = torch_kernels(_shapes(leaves), names)
    known = {module for kernel in kernels.values() for module in kernel.modules}
    config, header = read_config_and_header(path, modules=len(known))
    file = path / TENSORS
    chosen = check_modules(file, header, config, known, left)
    config.check_used(chosen)
    dtypes = {name: _DTYPES[own] for name, (own, _) in header.items()}
    dtypes = loaded_dtypes(dtypes, dtype, file)
    specs = _specs(path, config, header, dtypes, chosen, _shapes(leaves), kernels)
    total = sum(int(np.prod(shape)) for shape in _shapes(leaves).values())
    plan = Plan(tuple((layer, spec) for layer, spec, _ in specs), base_parameters=total)
    check_unadapted(plan, leaves)
    check_sizes(plan, leaves)
    tensors = read_tensors(file)
    schemes = {module: config.scheme_of(module) for module in chosen}
    ranks = {module: config.rank_of(module) for module in chosen}
    check_digest(file, metadata_of(schemes, ranks, config.dropout, tensors))
    tensors = {name: tensor.astype(dtypes[name]) for name, tensor in tensors.items()}
    loaded = {
        kernel: _from_torch(file, spec, modules, tensors)
        for kernel, (_, spec, modules) in zip(plan.kernel_paths(), specs, strict=True)
    }
    owners, new = plan.adapter_owners(), {}
    for layer, _ in plan.layers:
        for name, leaf in plan.leaf_paths(layer).items():
            kernel, axes = owners[leaf]
            new[leaf] = put_beside(leaves[kernel], loaded[kernel][name], axes, last_name(leaf))
    return unflatten_like(leaves | new, params), plan


def _specs(
    path: pathlib.Path,
    config: PeftConfig,
    header: Header,
    dtypes: Mapping[str, str],
    chosen: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    kernels: Mapping[str, TorchKernel],
) -> list[tuple[str, AdapterSpec, tuple[str, ...]]]:
    """(path, layout, modules) of every adapted layer; its tensors have the shapes they need."""
    found, parents = [], [kernel.rpartition("/")[0] for kernel in kernels]
    for kernel, (axes, modules) in kernels.items():
        outside = [module for module in modules if module not in chosen]
        if len(outside) == len(modules):
            continue
        if outside:
            raise ValueError(
                f"{path / CONFIG}: target_modules leave out {outside[0]!r}, but {kernel!r} is one "
                "stack, which is adapted as a whole."
            )
        parent, _, name = kernel.rpartition("/")
        alone = parents.count(parent) == 1  # or a layer by itself, beside others in one dict
        layer_config = _layer_config(path, config, modules, dtypes)
        batch = tuple(range(len(axes.batch)))
        spec = AdapterSpec(layer_config, shapes[kernel], axes, batch, name if alone else "")
        _check_tensors(path / TENSORS, spec, modules, header)
        found.append((parent if alone else kernel, spec, modules))
    return found


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(np.shape(unbox(leaf))) for path, leaf in leaves.items()}


def _layer_config(
    path: pathlib.Path, config: PeftConfig, modules: tuple[str, ...], dtypes: Mapping[str, str]
) -> LayerConfig:
    """What the modules of one kernel have in common."""
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
        cycle="groupings" if "groupings" in scheme.cycles else "auto",
        dropout=config.dropout,
        dtype=dtypes[tensor_name(modules[0], "A")],
    )


def _check_tensors(
    file: pathlib.Path, spec: AdapterSpec, modules: tuple[str, ...], header: Header
) -> None:
    """Raises ValueError unless the tensors have one dtype, and the shapes that the config says."""
    names = [tensor_name(module, side) for module in modules for side in "AB"]
    held = {header[name][0]: name for name in names}
    if len(held) > 1:
        raise ValueError(f"{file}: one kernel's tensors differ in dtype: {held}.")
    first, second = spec.scheme.peft_leaves
    for name, side in {second: "B", first: "A"}.items():
        rows, columns = spec.shapes[name][-2:]
        for module in modules:
            _, shape = header[tensor_name(module, side)]
            if shape != (columns, rows):
                raise ValueError(
                    f"{file}: {tensor_name(module, side)!r} has shape {shape}; "
                    f"{spec.scheme} of rank {spec.config.rank} on {spec.features[0]} -> "
                    f"{spec.features[1]} features has {(columns, rows)}. "
                    "Is the adapter of another model?"
                )


def _from_torch(
    file: pathlib.Path,
    spec: AdapterSpec,
    modules: tuple[str, ...],
    tensors: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The adapter's leaves, [B..., rows, columns]."""
    first, second = spec.scheme.peft_leaves
    leaves = {}
    for name, side in {second: "B", first: "A"}.items():
        stack = [tensors[tensor_name(module, side)] for module in modules]
        leaves[name] = np.stack([tensor.T for tensor in stack]).reshape(spec.shapes[name])
    if first == second:
        for module in modules:
            first, second = (tensors[tensor_name(module, side)] for side in "AB")
            if first.shape != second.shape or first.tobytes() != second.tobytes():
                raise ValueError(
                    f"{file}: {tensor_name(module, 'B')!r} is not the copy of "
                    f"{tensor_name(module, 'A')!r} that MoRA stores there."
                )
    return leaves


def read_config_and_header(path: pathlib.Path, *, modules: int) -> tuple[PeftConfig, Header]:
    """The config, and what tensors there are; none of them is read.

    Args:
      path: the adapter's directory.
      modules: how many the model has, each with two tensors at most.

    Raises:
      FileNotFoundError: where one of the two files is missing.
      ValueError: naming the file, where it is a pickle, is damaged, or holds what no adapter does.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no adapter at {path}: not a directory.")
    if (index := path / f"{TENSORS}.index.json").exists():
        raise ValueError(f"{index}: an adapter is one file; no index is followed to others.")
    if not (path / TENSORS).is_file() and (path / "adapter_model.bin").exists():
        raise ValueError(
            f"{path / 'adapter_model.bin'} is a pickle, which runs code when it is opened: not "
            "read. Let PEFT save the adapter as safetensors (safe_serialization=True)."
        )
    for name in (CONFIG, TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"no adapter at {path}: there is no file {name}.")
    config, file = read_config(path / CONFIG), path / TENSORS
    with file.open("rb") as opened:
        data = opened.read(9)
    # A zip of torch.save, or a pickle; safetensors may begin so too, with the size of its header.
    if data.startswith(b"PK\x03\x04") or (data[:1] == b"\x80" and data[8:9] != b"{"):
        raise ValueError(f"{file} is a pickle under another name, not safetensors: not read.")
    header = read_header(file, limit=2**16 + 2 * modules * _BYTES_OF_ENTRY)
    for name, (dtype, _) in header.items():
        _check_dtype(file, name, dtype)
    return config, header


def _check_dtype(file: pathlib.Path, name: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ValueError(
            f"{file}: {name!r} is {dtype}; an adapter's numbers are one of {', '.join(_DTYPES)}."
        )
    if dtype == "F64" and jnp.result_type(float) != "float64":
        raise ValueError(
            f"{file}: {name!r} is F64, which JAX holds only with jax_enable_x64; not narrowed."
        )


def read_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors in the file's dtypes, floating and finite.

    Raises:
      ValueError: naming the tensor, where it is not finite.
    """
    # Raw bytes, as framework="numpy" has no bfloat16 in every version.
    entries = safetensors.deserialize(file.read_bytes())
    return {name: _array(file, name, entry) for name, entry in entries}


def _array(file: pathlib.Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    dtype = jnp.dtype(_DTYPES[entry["dtype"]])
    array = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    if not np.isfinite(array).all():
        raise ValueError(f"{file}: {name!r} holds numbers that are not finite.")
    return array


def check_modules(
    file: pathlib.Path,
    tensors: Collection[str],
    config: PeftConfig,
    known: Collection[str],
    left: Mapping[str, str],
) -> set[str]:
    """The modules that the config adapts.

    Raises:
      ValueError: unless the tensors are theirs.
    """
    matches = {name: _TENSOR.fullmatch(name) for name in tensors}
    if odd := [name for name, match in matches.items() if match is None]:
        raise ValueError(
            f"{file} holds {list_paths(odd)}; an adapter holds 'base_model.model.<module>."
            "lora_A.weight' and '...lora_B.weight' alone (PEFT adds embeddings and heads unless it "
            "saves with save_embedding_layers=False)."
        )
    present = {match[1]: name for name, match in matches.items() if match is not None}
    if strange := present.keys() - set(known):
        raise ValueError(
            f"{file}: {list_paths(present[module] for module in strange)}: the model has no such "
            f"modules. By names it has {list_paths(known) or 'none'}"
            + (f"; left out: {'; '.join(sorted(left.values())[:4])}" if left else "")
            + ". Is the adapter of another model, or do its names differ (names=)?"
        )
    chosen = {module for module in known if config.selects(module)}
    if surplus := present.keys() - chosen:
        raise ValueError(
            f"{file} holds {list_paths(present[module] for module in surplus)}, which "
            f"target_modules of {CONFIG} do not name; PEFT would leave them out without a word."
        )
    wanted = {tensor_name(module, side) for module in chosen for side in "AB"}
    if missing := wanted.difference(tensors):
        raise ValueError(f"{file} lacks {list_paths(missing)}, which {CONFIG} speaks of.")
    if not chosen:
        raise ValueError(f"{file} holds no adapter.")
    return chosen
