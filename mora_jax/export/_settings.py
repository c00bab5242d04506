"""config.json of a merged model: what the base's says, mended to what the weights are.

Sizes of the vocabulary and the dtype are corrected. Other sizes that disagree with the weights are
refused: whoever loads them would get an error, or another model.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mora_jax._torch.safetensors_writer import Shapes, size_of

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"

#: What says how weights are packed; those written are not.
QUANTIZATION = ("quantization_config", "compression_config")
#: Of these models the sizes of heads and of the MLP are known by the same fields.
_LLAMAS = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2"}


def settings_for(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The config for these tensors: dtype, vocabulary, word embeddings tied or not.

    Args:
      config: the base model's.
      shapes: name in PyTorch -> shape and dtype of every tensor that is written.

    Raises:
      ValueError: naming the field, if the config disagrees with the tensors.
    """
    settings = _without_quantization(config)
    _check_tied(settings, shapes)
    sizes = collections.Counter()
    for shape in shapes.values():
        sizes[shape.dtype.name] += size_of(shape)
    dtype = sizes.most_common(1)[0][0]
    if "dtype" not in settings:  # newer versions write this one, and read both
        settings["torch_dtype"] = dtype
    for part in (settings, *_nested(settings)):
        part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    text = settings.get("text_config")
    for part in (settings, text if isinstance(text, dict) else {}):
        _set_vocabulary(part, shapes)
        _check_sizes(part, shapes)
    return settings


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that says nothing of packed weights, at any depth."""
    return {
        key: _without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in QUANTIZATION
    }


def _nested(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for value in config.values():
        if isinstance(value, dict):
            yield value
            yield from _nested(value)


def _check_tied(config: dict[str, Any], shapes: Shapes) -> None:
    headless = HEAD not in shapes
    tied = config.setdefault("tie_word_embeddings", headless)
    if tied and not headless:
        raise ValueError(
            f"config ties word embeddings, but the parameters hold {HEAD!r}, which would not be "
            "read. If the head is one of its own now, say so: config with tie_word_embeddings "
            "false."
        )
    if headless and not tied:
        raise ValueError(
            f"config does not tie word embeddings, but the parameters hold no {HEAD!r}. Is the "
            "head missing, or called otherwise?"
        )


def _set_vocabulary(config: dict[str, Any], shapes: Shapes) -> None:
    """`vocab_size` is the rows of the word embeddings, which may have been resized."""
    embedding = _only(shapes, EMBEDDING)
    if embedding is None or "vocab_size" not in config:
        return
    rows = shapes[embedding].shape[0]
    if HEAD in shapes and shapes[HEAD].shape[0] != rows:
        raise ValueError(
            f"{embedding!r} has {rows:,} rows and {HEAD!r} {shapes[HEAD].shape[0]:,}: config.json "
            "has one vocab_size for both. Resize both alike."
        )
    config["vocab_size"] = rows


def _check_sizes(config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raises ValueError for a size in the config that is not the tensors'."""
    for key, (wanted, tensor) in _sizes(config, shapes).items():
        if isinstance(config.get(key), int) and config[key] != wanted:
            raise ValueError(
                f"config says {key} {config[key]!r}, but {tensor} says {wanted}. Is it the config "
                "of another model? If the model was changed, change the config with it."
            )


def _sizes(config: Mapping[str, Any], shapes: Shapes) -> dict[str, tuple[int, str]]:
    """Field -> (what the tensors say of it, how they say it)."""
    found: dict[str, tuple[int, str]] = {}
    # Some models have embeddings of a width of their own.
    own_width = {"word_embed_proj_dim", "embedding_size"} & config.keys()
    if (embedding := _only(shapes, EMBEDDING)) and not own_width:
        found["hidden_size"] = shapes[embedding].shape[1], _described(embedding, shapes)
    layers = [re.match(r"(?:.*\.)?layers\.(\d+)\.", name) for name in shapes]
    numbers = {match[0]: int(match[1]) for match in layers if match}
    if len({prefix.rpartition("layers.")[0] for prefix in numbers}) == 1:
        count = max(numbers.values()) + 1
        found["num_hidden_layers"] = count, f"the tensors' names count {count} layers, which"
    if config.get("model_type") not in _LLAMAS:
        return found
    for name in shapes:
        if name.endswith("mlp.up_proj.weight"):
            found["intermediate_size"] = shapes[name].shape[0], _described(name, shapes)
    heads, kept = config.get("num_attention_heads"), config.get("num_key_value_heads")
    width = config.get("head_dim") or _ratio(config.get("hidden_size"), heads)
    for key, count, end in (
        ("num_attention_heads", heads, "q_proj"),
        ("num_key_value_heads", kept, "k_proj"),
    ):
        tensor = next((name for name in shapes if name.endswith(f"self_attn.{end}.weight")), None)
        if tensor and width and isinstance(count, int):
            rows = shapes[tensor].shape[0]
            told = rows // width if rows % width == 0 else -1
            found[key] = told, f"{_described(tensor, shapes)}, with heads of {width} features,"
    return found


def _ratio(size: Any, count: Any) -> int | None:
    whole = isinstance(size, int) and isinstance(count, int) and count > 0
    return size // count if whole else None


def _described(name: str, shapes: Shapes) -> str:
    return f"{name!r} of shape {shapes[name].shape}"


def _only(shapes: Shapes, end: str) -> str | None:
    """The one tensor whose name ends so; None if there are several, or none."""
    found = [name for name in shapes if name == end or name.endswith(f".{end}")]
    return found[0] if len(found) == 1 else None
