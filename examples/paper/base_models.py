"""The pretrained model that is adapted, and two in its place for a CPU, which read bytes.

`mini` has been trained on Python (`python_model.py`). `tiny` is random: frozen it is no worse a
base for random UUIDs than any; what it learns of anything else means nothing, but that the programs
run.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama import pretrained
from llama.model import Llama
from paper import python_model
from paper.training import Rows, held_out_loss
from paper.trial import Measures, Task
from train.flags import PRESETS

NAMES = ["smollm2", "mini", "tiny"]


def fingerprint(name: str, base: pretrained.Pretrained) -> str | None:
    """What tells a base model's numbers from others; None for SmolLM2, whose file is always one."""
    if name == "smollm2":
        return None
    leaves = (np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base.params))
    return hashlib.sha256(b"".join(leaves)).hexdigest()[:16]


def finetuning_task(
    args: argparse.Namespace,
    base: pretrained.Pretrained,
    parts: tuple[Rows, Rows, Rows],
    examine: Callable[[Llama, Any], Measures],
    measured_in: str,
) -> Task:
    """Training on text, with rates chosen by the loss of some that is held out.

    Args:
      args: the flags.
      base: the model.
      parts: what is trained on, what the rate is chosen by, what tests the runs at chosen rates.
      examine: (model, its parameters) -> what else tests these.
      measured_in: dtype of the computation that losses are measured with.
    """
    trained, chosen_by, test = parts
    model = Llama(base.config, dtype=args.dtype, param_dtype="float32")
    measuring = dataclasses.replace(model, dtype=measured_in)

    def measure(step: int, seed: int, params: Any) -> Measures:
        found = {"loss": float(held_out_loss(measuring, params, chosen_by, args.batch))}
        if step == args.steps and seed != args.seeds[0]:
            found["test"] = float(held_out_loss(measuring, params, test, args.batch))
            found |= examine(measuring, params)
        return found

    return Task(
        base_model=model,
        start=lambda seed: jax.tree.map(jnp.asarray, base.params),
        rows=lambda seed: trained,
        measure=measure,
        cost=lambda curve: curve[-1]["loss"],
        finish=lambda before, after, adapted, plan: {},
        base=fingerprint(args.model, base),
    )


def load(name: str) -> pretrained.Pretrained:
    """SmolLM2-135M-Instruct, fetched once, or a model of a CPU's size; float32."""
    if name == "smollm2":
        return pretrained.load(None, "float32")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    if name == "mini":
        encode = lambda document: tokenizer.encode(document).ids
        config, params = python_model.load(encode, len(tokens), tokens["<end>"])
        return pretrained.Pretrained(config, params, tokenizer, tokens["<end>"])
    config = dataclasses.replace(
        PRESETS["tiny"], features=64, hidden_features=176, head_features=16, vocab_size=len(tokens)
    )
    params: Any = Llama(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return pretrained.Pretrained(config, params, tokenizer, tokens["<end>"])
