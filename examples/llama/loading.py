"""Loads Hugging Face checkpoints of Llamas into the parameters of `model.py`."""

import json
import pathlib
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from safetensors import safe_open

from llama.model import Llama, LlamaConfig

# Where each Hugging Face tensor lives in the parameters; `{}` counts the layers, stacked on axis 0.
# A kernel is the transpose of its tensor, all else is kept as it is.
HF_TENSORS: dict[str, str] = {
    "model.embed_tokens.weight": "embed_tokens/embedding",
    "model.layers.{}.input_layernorm.weight": "layers/input_layernorm/scale",
    "model.layers.{}.self_attn.q_proj.weight": "layers/self_attn/q_proj/kernel",
    "model.layers.{}.self_attn.k_proj.weight": "layers/self_attn/k_proj/kernel",
    "model.layers.{}.self_attn.v_proj.weight": "layers/self_attn/v_proj/kernel",
    "model.layers.{}.self_attn.o_proj.weight": "layers/self_attn/o_proj/kernel",
    "model.layers.{}.post_attention_layernorm.weight": "layers/post_attention_layernorm/scale",
    "model.layers.{}.mlp.gate_proj.weight": "layers/mlp/gate_proj/kernel",
    "model.layers.{}.mlp.up_proj.weight": "layers/mlp/up_proj/kernel",
    "model.layers.{}.mlp.down_proj.weight": "layers/mlp/down_proj/kernel",
    "model.norm.weight": "norm/scale",
    "lm_head.weight": "lm_head/kernel",
}


def params_from_hf(
    config: LlamaConfig,
    names: Collection[str],
    read: Callable[[str], np.ndarray],
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Builds parameters from tensors under Hugging Face names, stacking one kind at a time.

    Args:
      config: the sizes that the tensors must have.
      names: of the tensors there are; `lm_head.weight` among them only where it is not tied.
      read: gives the tensor of a name.
      dtype: of the parameters.

    Returns:
      The tree that `Llama(config).init` makes under "params".

    Raises:
      ValueError: a tensor is missing, is not this model's, or has another shape than the sizes say.
    """
    example = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    abstract = jax.eval_shape(Llama(config).init, *example)["params"]
    shapes: dict[str, Any] = flatten_dict(jax.tree.map(jnp.shape, abstract), sep="/")
    paths = {name: path for name, path in HF_TENSORS.items() if path in shapes}
    wanted = {name.format(layer) for name in paths for layer in range(config.num_layers)}
    if wanted != set(names):
        missing, extra = sorted(wanted - set(names)), sorted(set(names) - wanted)
        raise ValueError(f"not the tensors of {config}: {missing=}, {extra=}")

    params = {}
    for name, path in paths.items():
        stacked = np.empty(shapes[path], dtype)
        for layer, target in enumerate(stacked if "{}" in name else stacked[None]):
            target = target.T if path.endswith("kernel") else target
            tensor = read(name.format(layer))
            if tensor.shape != target.shape:
                got = f"got the shape {tensor.shape}, the config wants {target.shape}"
                raise ValueError(f"{name.format(layer)}: {got}")
            target[...] = tensor
        params[path] = jnp.array(stacked)
    return unflatten_dict(params, sep="/")


def load_hf(
    directory: str | pathlib.Path, dtype: DTypeLike = jnp.float32
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Loads config.json and the safetensors beside it, in one file or in those an index lists."""
    root = pathlib.Path(directory)
    config = LlamaConfig.from_hf(json.loads((root / "config.json").read_text()))
    index = root / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    for file in files:  # an index is somebody else's text: let it name its neighbours alone
        if pathlib.PureWindowsPath(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {file!r} is not a safetensors file in the same directory")
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(root / file, "numpy")) for file in sorted(files)]
        readers = {name: file.get_tensor for file in opened for name in file.keys()}  # noqa: SIM118
        return config, params_from_hf(config, readers, lambda name: readers[name](name), dtype)
