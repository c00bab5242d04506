"""The pretrained model that is adapted, and a random one in its place that a CPU trains in seconds.

The random one is an untrained Llama that reads bytes. Frozen, it is no worse a base for random
UUIDs than any; what it learns of anything else means nothing, but that the programs run.
"""

import dataclasses
import os
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import pretrained
from llama import Llama
from train_flags import PRESETS

NAMES = ["smollm2", "tiny"]


def load(name: str) -> pretrained.Pretrained:
    """SmolLM2-135M-Instruct, fetched once, or `tiny`; float32."""
    if name == "smollm2":
        return pretrained.load(None, "float32")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    config = dataclasses.replace(
        PRESETS["tiny"], features=64, hidden_features=176, head_features=16, vocab_size=len(tokens)
    )
    params: Any = Llama(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return pretrained.Pretrained(config, params, tokenizer, tokens["<end>"])
