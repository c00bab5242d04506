"""tunix's Qwen 3 and Llama 3, NNX with einsum layers of their own, by tunix's own PeftTrainer.

Needs Python 3.12 and `pip install google-tunix`.
"""

import dataclasses
import functools
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax
from helpers import third_party
from llama import smollm2
from llama.model import Llama
from mora_jax.nnx import MoRAParam, merge, merge_and_reset

pytestmark = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.filterwarnings("ignore"),  # of tunix and its dependencies
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix")
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft import peft_trainer

SIZES = {
    "num_layers": 2, "vocab_size": 64, "embed_dim": 32, "hidden_dim": 48,
    "num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-6,
}  # fmt: skip
MODELS = {
    "Qwen 3 (tunix)": lambda: qwen3.Qwen3(qwen3.ModelConfig(**SIZES), rngs=nnx.Rngs(0)),
    "Llama 3 (tunix)": lambda: llama3.Llama3(llama3.ModelConfig(**SIZES), rngs=nnx.Rngs(0)),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)))
PROJECTIONS = [f"attn/{name}_proj" for name in "qkvo"]
PROJECTIONS += [f"mlp/{name}_proj" for name in ("gate", "up", "down")]


def layers(count):
    return {f"layers/*/{name}": count for name in PROJECTIONS}


def forward(model, tokens):
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    return model(tokens, positions, None, causal)[0]


def check_trained_by_tunix(name, base, tokens, wanted, run, rate):
    """What `third_party.check` does, trained by tunix; `run` may be `forward` or jitted."""
    start = time.perf_counter()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(base)))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=4, scheme="sharing"))
    plan = mora_jax.plan(model)
    assert third_party.counted(plan) == wanted
    np.testing.assert_array_equal(run(model, tokens), run(base, tokens))

    def loss(model, input_tokens, input_mask):
        del input_mask
        y = forward(model, input_tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(y, input_tokens[:, 1:]).mean()

    training = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=20)
    trainer = peft_trainer.PeftTrainer(model, optax.adam(rate), training)
    trainer = trainer.with_loss_fn(loss).with_gen_model_input_fn(
        lambda batch: {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}
    )
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=jnp.ones_like(tokens))
    first = float(loss(model, tokens, None))
    trainer.train([batch] * 20)
    last = float(loss(model, tokens, None))
    assert last < 0.9 * first

    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(MoRAParam)))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    y, merged = run(model, tokens), run(merge(model), tokens)
    scale = float(jnp.abs(y).max())
    np.testing.assert_allclose(merged, y, atol=1e-5 * scale)
    report = merge_and_reset(model, trainer.optimizer, donate=False)
    assert report[:3] == (len(plan), 2 * len(plan), 1)
    np.testing.assert_allclose(run(model, tokens), y, atol=1e-5 * scale)
    third_party.TABLE.append(
        f"| {name} | {len(plan)} | {first:.3f} -> {last:.3f} | "
        f"{float(jnp.abs(merged - y).max()) / scale:.0e} | {time.perf_counter() - start:.0f} s |"
    )


@pytest.mark.parametrize("name", MODELS)
def test_tunix(name):
    # Not under jit, which rounds a whole model differently than its operations one by one.
    wanted = layers(2) | {"lm_head": 1}
    check_trained_by_tunix(name, MODELS[name](), TOKENS, wanted, forward, 3e-2)


def smollm2_in_nnx(config, params):
    """tunix's Llama 3 with the weights of SmolLM2-135M."""
    model = llama3.Llama3(
        llama3.ModelConfig(
            num_layers=config.num_layers, vocab_size=config.vocab_size,
            embed_dim=config.features, hidden_dim=config.hidden_features,
            num_heads=config.num_heads, head_dim=config.head_features,
            num_kv_heads=config.num_kv_heads, rope_theta=config.rope_theta,
            norm_eps=config.norm_epsilon, weight_tying=config.tie_embeddings,
        ),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    stack = params["layers"]
    pairs = {
        "input_layernorm": (("input_layernorm", "w"), ("input_layernorm", "scale")),
        "post_attention_layernorm": (
            ("post_attention_layernorm", "w"), ("post_attention_layernorm", "scale"),
        ),
    }  # fmt: skip
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        pairs[name] = (("attn", name, "w"), ("self_attn", name, "kernel"))
    for name in ("gate_proj", "up_proj", "down_proj"):
        pairs[name] = (("mlp", name, "kernel"), ("mlp", name, "kernel"))

    def put(owner, path, value):
        variable = functools.reduce(getattr, path, owner)
        variable[...] = value.reshape(variable.shape)

    for index, layer in enumerate(model.layers):
        for ours, theirs in pairs.values():
            put(layer, ours, functools.reduce(lambda node, part: node[part], theirs, stack)[index])
    put(model, ("embedder", "input_embedding"), params["embed_tokens"]["embedding"])
    put(model, ("final_norm", "w"), params["norm"]["scale"])
    return model


def test_smollm2():
    """Real weights: the same logits as the linen Llama of the examples, and all the rest."""
    config, params, tokenizer = smollm2.load(smollm2.fetch())
    tokens = jnp.asarray([tokenizer.encode("The capital of France is Paris, on the Seine.").ids])
    model = smollm2_in_nnx(config, params)
    # tunix 0.1.7 rotates by a million whatever its config says.
    same = dataclasses.replace(config, rope_theta=1e6)
    theirs = Llama(same).apply({"params": params}, tokens)
    np.testing.assert_allclose(forward(model, tokens), theirs, atol=1e-3 * float(theirs.max()))
    check_trained_by_tunix(
        "SmolLM2-135M, real weights, in tunix's Llama 3", model, tokens,
        layers(config.num_layers), forward, 1e-3,
    )  # fmt: skip
