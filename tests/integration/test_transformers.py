"""Hugging Face Flax models (transformers 4.52, the last major version that has them), unedited."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from helpers.third_party import check

#: Run by `python3 run.py test -m slow`.
pytestmark = pytest.mark.slow

pytestmark = pytest.mark.usefixtures("optimized")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own future
    transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)))
PIXELS = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16, 16)), jnp.float32)


def make(kind, config, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"Flax{kind}")
        return model(getattr(transformers, f"{config}Config")(**fields), seed=0)


def test_llama():
    model = make("LlamaForCausalLM", "Llama", vocab_size=64, intermediate_size=48,
                 num_key_value_heads=2, max_position_embeddings=32, **SMALL)  # fmt: skip
    layer = "model/layers/*/"
    projections = [f"{layer}self_attn/{name}_proj" for name in "qkvo"]
    projections += [f"{layer}mlp/{name}_proj" for name in ("gate", "up", "down")]
    layers = dict.fromkeys(projections, 2) | {"lm_head": 1}
    check(
        "Llama (transformers)",
        model,
        model.params,
        (IDS,),
        layers,
        run=lambda model, params, x: model(x, params=params).logits,
    )
    mask, positions = jnp.ones_like(IDS), jnp.broadcast_to(jnp.arange(12), (2, 12))
    check(
        "Llama (transformers), its module",
        model.module,
        model.params,
        (IDS, mask, positions),
        layers,
        run=lambda module, params, *inputs: module.apply({"params": params}, *inputs).logits,
    )


def test_gpt2():
    """Kernels stored transposed, a tied head: neither takes a `dot_general`."""
    model = make(
        "GPT2LMHeadModel", "GPT2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32
    )
    names = ["attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"]
    check(
        "GPT-2 (transformers)",
        model,
        model.params,
        (IDS,),
        {"transformer/wte": 1} | {f"transformer/h/*/{name}": 2 for name in names},
        run=lambda model, params, x: model(x, params=params).logits,
    )


DENSE = ["attention/output/dense", "intermediate/dense", "output/dense"]


def test_bert():
    model = make("BertModel", "Bert", vocab_size=64, intermediate_size=48,
                 max_position_embeddings=32, **SMALL)  # fmt: skip
    names = [f"attention/self/{name}" for name in ("query", "key", "value")] + DENSE
    check(
        "BERT (transformers)",
        model,
        model.params,
        (IDS,),
        {f"encoder/layer/*/{name}": 2 for name in names} | {"pooler/dense": 1},
        run=lambda model, params, x: model(x, params=params).pooler_output,
    )


def test_vit():
    model = make("ViTForImageClassification", "ViT", intermediate_size=48, image_size=16,
                 patch_size=8, num_labels=8, **SMALL)  # fmt: skip
    names = [f"attention/attention/{name}" for name in ("query", "key", "value")] + DENSE
    check(
        "ViT (transformers)",
        model,
        model.params,
        (PIXELS,),
        {f"vit/encoder/layer/*/{name}": 2 for name in names} | {"classifier": 1},
        run=lambda model, params, x: model(x, params=params).logits,
    )


@pytest.fixture
def older_clip(monkeypatch):
    """T5 calls `jnp.clip(a_max=...)`, which JAX has dropped; the model itself is not edited."""
    clip = jnp.clip

    def with_old_names(x, *args, a_min=None, a_max=None, **kwargs):
        old = {"min": a_min, "max": a_max}
        return clip(x, *args, **kwargs, **{k: v for k, v in old.items() if v is not None})

    monkeypatch.setattr(jnp, "clip", with_old_names)


@pytest.mark.usefixtures("older_clip")
def test_t5():
    model = make(
        "T5ForConditionalGeneration", "T5", vocab_size=64, d_model=32, d_kv=8, d_ff=48,
        num_layers=2, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    attention = ["SelfAttention", "EncDecAttention"]
    layers = {
        f"{side}/block/*/layer/*/{kind}/{name}": 2
        for side, kinds in {"encoder": attention[:1], "decoder": attention}.items()
        for kind in kinds
        for name in "qkvo"
    } | {
        f"{side}/block/*/layer/*/DenseReluDense/{name}": 2
        for side in ("encoder", "decoder")
        for name in ("wi", "wo")
    }
    check(
        "T5 (transformers)",
        model,
        model.params,
        (IDS,),
        layers | {"shared": 1},
        run=lambda model, params, x: model(x, decoder_input_ids=x, params=params).logits,
    )
