"""A merged model as Hugging Face has it: safetensors, config.json, and side files."""

from __future__ import annotations

import collections
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.paths import flatten, is_adapter, list_paths
from mora_jax._merging.merge import check_mergeable
from mora_jax._params.checks import check_adapted, check_adapters_finite
from mora_jax._params.split import Params
from mora_jax._plans.plan import Plan
from mora_jax._torch.directories import check_new, new_directory
from mora_jax._torch.names import KernelName
from mora_jax._torch.safetensors_writer import Shapes, read_header, shards, size_of, write_tensors
from mora_jax._torch.tensors import LLAMA, torch_tensors
from mora_jax.export._merged_tensor import merged_tensor

_HEAD = "lm_head.weight"
#: What a model's directory holds beside its weights: of these kinds, but for indices of weights.
_SIDE_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def save_merged(
    directory: str | os.PathLike[str],
    params: Params,
    plan: Plan | None,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str],
    names: Iterable[KernelName] = LLAMA,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the merged model as safetensors and config.json, for PyTorch's `transformers`.

    Equivalent to `merge_and_unload().save_pretrained(directory)` in PEFT. Each kernel is merged as
    `mora_jax.merge` does it, one layer of a stack at a time, and written before the next: beyond
    the parameters themselves it takes the memory of a few tensors. Dtypes are kept. The directory
    appears under its name when it is whole. Where several processes share the parameters all of
    them call it, and the first writes.

    Args:
      directory: a path that does not exist yet.
      params: parameters with adapters; arrays of NumPy, of memory-mapped files too, stay where
        they are until it is their turn.
      plan: the plan, or None for parameters without adapters (merged already).
      config: what goes into config.json; or the base model's directory, whose config.json,
        tokenizer and licence are copied, and whose weights, where they are safetensors, must have
        the same names and shapes. What it says of the dtype is replaced, and where it does not say
        whether word embeddings are tied, that is added.
      names: what parameters are called in PyTorch.
      shard_bytes: the most bytes of tensors in one file; a larger tensor has a file of its own.

    Raises:
      ValueError: where the directory exists, the plan does not fit, an adapter or a merged kernel
        is not finite, a parameter has no name, the base directory holds another model, or the
        config ties word embeddings and there is a head (or the reverse).
      TypeError: for a dtype that safetensors lack.

    >>> import tempfile, flax.linen as nn, jax.numpy as jnp, mora_jax
    >>> from mora_jax.export import KernelName, TensorName
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> names = [KernelName("kernel", "fc"), TensorName("bias", "fc.bias")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = {"tie_word_embeddings": True}
    ...     save_merged(f"{folder}/model", params, plan, config=config, names=names)
    ...     read_header(f"{folder}/model/model.safetensors")
    {'fc.bias': ('F32', (6,)), 'fc.weight': ('F32', (6, 3))}
    """
    path, leaves, plan = check_new(directory), flatten(params), plan or Plan(())
    if plan or any(map(is_adapter, leaves)):
        check_adapted(plan, leaves)
        check_adapters_finite(plan, leaves, "written")
        check_mergeable(plan, leaves)
    values = {path: unbox(leaf) for path, leaf in leaves.items() if not is_adapter(path)}
    tensors = torch_tensors({path: value.shape for path, value in values.items()}, names)
    shapes = {
        name: jax.ShapeDtypeStruct(tensor.torch_shape, values[tensor.path].dtype)
        for name, tensor in tensors.items()
    }
    base, settings = _base_and_settings(config, shapes)
    files = shards(shapes, shard_bytes)

    def read(name):
        return merged_tensor(tensors[name], leaves, plan)

    if jax.process_index() > 0:
        for name in itertools.chain(*files.values()):
            read(name)  # arrays of all processes come together by the help of all
        return
    with new_directory(path) as new:
        _write_weights(new, files, shapes, read)
        if base is not None:
            _copy_side_files(base, new)
        _write_json(new / "config.json", settings)


def _base_and_settings(
    config: Mapping[str, Any] | str | os.PathLike[str], shapes: Shapes
) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """(the base model's directory if there is one, what goes into config.json)."""
    if isinstance(config, Mapping):
        return None, _config_of(config, shapes)
    base = pathlib.Path(config)
    settings = json.loads((base / "config.json").read_text())
    _check_like(base, shapes)
    return base, _config_of(settings, shapes)


def _write_weights(
    new: pathlib.Path,
    files: Mapping[str, Iterable[str]],
    shapes: Shapes,
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes files of tensors, and where there are several their index.

    Args:
      new: the directory.
      files: file -> names of its tensors.
      shapes: of all tensors, by name.
      read: gives a tensor by its name, when it is its turn.
    """
    for file, own in files.items():
        write_tensors(new / file, {name: shapes[name] for name in own}, read)
    if len(files) > 1:
        total = sum(map(size_of, shapes.values()))
        weight_map = {name: file for file, own in files.items() for name in own}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(new / "model.safetensors.index.json", index)


def _config_of(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The config with the dtype that is written, and with word embeddings tied or not.

    Raises:
      ValueError: where the config says otherwise of the word embeddings than the parameters do.
    """
    config, headless = dict(config), _HEAD not in shapes
    tied = config.setdefault("tie_word_embeddings", headless)
    if tied and not headless:
        raise ValueError(
            f"config ties word embeddings, but the parameters hold {_HEAD!r}, which would not be "
            "read. If the head is one of its own now, say so: config with tie_word_embeddings "
            "false."
        )
    if headless and not tied:
        raise ValueError(
            f"config does not tie word embeddings, but the parameters hold no {_HEAD!r}. Is the "
            "head missing, or called otherwise?"
        )
    sizes = collections.Counter()
    for shape in shapes.values():
        sizes[shape.dtype.name] += size_of(shape)
    # Newer versions write "dtype", and read both.
    key = "dtype" if "dtype" in config else "torch_dtype"
    return config | {key: sizes.most_common(1)[0][0]}


def _check_like(base: pathlib.Path, shapes: Shapes) -> None:
    """Raises ValueError where the base model's safetensors have other names or shapes."""
    theirs = {
        name: shape
        for file in base.glob("model*.safetensors")
        for name, (_, shape) in read_header(file).items()
        if not name.endswith("inv_freq")  # constants that older versions wrote
    }
    missing, surplus = theirs.keys() - shapes.keys(), shapes.keys() - theirs.keys()
    # Whether there is a head of its own is for the config to say.
    if theirs and (missing | surplus) - {_HEAD}:
        raise ValueError(
            f"not the tensors of {base}: missing {list_paths(missing) or 'none'}, surplus "
            f"{list_paths(surplus) or 'none'}. Are the names right?"
        )
    for name in theirs.keys() & shapes.keys():
        if theirs[name] != shapes[name].shape:
            raise ValueError(
                f"{name!r} would have shape {shapes[name].shape}, in {base} it has {theirs[name]}."
            )


def _copy_side_files(base: pathlib.Path, new: pathlib.Path) -> None:
    """Tokenizer, generation config, licence: all that is no weight and no page about the base."""
    for file in base.iterdir():
        kept = file.suffix in _SIDE_FILES or file.stem in ("LICENSE", "NOTICE")
        if kept and file.is_file() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, new / file.name)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
