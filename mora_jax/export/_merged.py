"""A merged model as Hugging Face has it: safetensors, config.json, and side files."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.paths import flatten, is_adapter
from mora_jax._merging.merge import check_mergeable
from mora_jax._params.checks import check_adapted, check_adapters_finite
from mora_jax._params.split import Params
from mora_jax._plans.plan import Plan
from mora_jax._torch.directories import check_new, new_directory
from mora_jax._torch.names import KernelName
from mora_jax._torch.safetensors_writer import Shapes, shards, size_of, write_tensors
from mora_jax._torch.tensors import LLAMA, torch_tensors
from mora_jax.export._base import check_like, copy_side_files, read_config
from mora_jax.export._merged_tensor import merged_tensor
from mora_jax.export._settings import settings_for


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
        tokenizer, code and licence are copied, and whose weights, where they are safetensors, must
        have the same names and shapes, but for a resized vocabulary. What it says of the dtype and
        of the vocabulary is replaced, what it says of quantisation is left out, and where it does
        not say whether word embeddings are tied, that is added.
      names: what parameters are called in PyTorch.
      shard_bytes: the most bytes of tensors in one file; a larger tensor has a file of its own.

    Raises:
      ValueError: where the directory exists, the plan does not fit, an adapter or a merged kernel
        is not finite, a parameter has no name, the base directory or the config is of another
        model, or the config ties word embeddings and there is a head (or the reverse).
      TypeError: for a dtype that safetensors lack.

    >>> import tempfile, flax.linen as nn, jax.numpy as jnp, mora_jax
    >>> from mora_jax._torch.safetensors_writer import read_header
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
            copy_side_files(base, new)
        _write_json(new / "config.json", settings)


def _base_and_settings(
    config: Mapping[str, Any] | str | os.PathLike[str], shapes: Shapes
) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """(the base model's directory if there is one, what goes into config.json)."""
    if isinstance(config, Mapping):
        return None, settings_for(config, shapes)
    base = pathlib.Path(config)
    fields = read_config(base)
    check_like(base, fields, shapes)
    return base, settings_for(fields, shapes)


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


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
