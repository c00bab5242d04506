"""The Gemma library's Gemma 3: linen, with an Einsum module of its own, unedited.

Needs Python 3.12 and `pip install gemma`.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.third_party import check

pytestmark = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.filterwarnings("ignore"),  # of its dependencies
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gm = pytest.importorskip("gemma.gm")

    CONFIG = dataclasses.replace(
        gm.nn.Gemma3_270M().config, num_embed=64, embed_dim=32, hidden_dim=48, head_dim=8,
        attention_types=gm.nn.Gemma3_270M().config.attention_types[4:6],  # local and global
    )  # fmt: skip


def test_gemma():
    model = gm.nn.Transformer(config=CONFIG)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)))
    params = model.init(jax.random.key(0), tokens)["params"]

    def logits(params, tokens):
        return model.apply({"params": params}, tokens).logits

    # A dict with two kernels has two layers.
    names = ["attn/q_einsum", "attn/kv_einsum", "attn/attn_vec_einsum"]
    names += ["mlp/gating_einsum", "mlp/linear"]
    layers = {f"layer_*/{name}": 2 for name in names} | {"embedder": 1}
    check("Gemma 3 (gemma)", logits, params, (tokens,), layers, rate=3e-3)
