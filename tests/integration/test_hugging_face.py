"""An unedited Hugging Face Flax Llama, whose modules do not hash."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mora_jax
from helpers.arrays import assert_same_bits, perturb

#: Run by `python3 run.py test -m slow`.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama():
    """(linen module, pretrained parameters, tokens)."""
    with warnings.catch_warnings():
        # transformers 4.52 warns of its own future at import.
        warnings.simplefilter("ignore")
        from transformers import FlaxLlamaForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        model = FlaxLlamaForCausalLM(config, seed=0, dtype=jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)))
    inputs = (tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(12), (2, 12)))
    return model, model.module, model.params, inputs


def logits_of(model, params, tokens):
    return jax.jit(lambda params: model(tokens, params=params).logits)(params)


def test_new_adapters_change_no_bit(llama, optimized):
    base, module, pretrained, inputs = llama
    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", targets=".*_proj")
    whole, model = mora_jax.adapt(base, config), mora_jax.adapt(module, config)
    params = mora_jax.attach(mora_jax.plan(model, *inputs), pretrained)
    ours, theirs = logits_of(whole, whole.params, inputs[0]), logits_of(base, pretrained, inputs[0])
    assert_same_bits(ours, theirs)
    ours, theirs = (
        jax.jit(functools.partial(each.apply, return_dict=False))({"params": tree}, *inputs)[0]
        for each, tree in ((model, params), (module, pretrained))
    )
    assert_same_bits(ours, theirs)


def test_a_pretrained_model_is_adapted_as_it_is(llama):
    base, _, pretrained, (tokens, *_) = llama
    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", targets=".*_proj")
    model = mora_jax.adapt(base, config)
    plan = mora_jax.plan(model)
    assert len(plan) == 14
    assert type(model) is type(base)
    assert_same_bits(dict(base.params), dict(pretrained))
    model.params = perturb(model.params)
    logits = logits_of(model, model.params, tokens)
    merged = mora_jax.merge(model.params, plan)
    assert not np.allclose(logits, logits_of(base, base.params, tokens), atol=1e-2)
    np.testing.assert_allclose(logits, logits_of(base, merged, tokens), rtol=1e-4, atol=1e-4)
    # Its own methods, with a cache, go through the adapters too.
    written = model.generate(tokens, max_new_tokens=3, pad_token_id=0).sequences
    theirs = base.generate(tokens, params=merged, max_new_tokens=3, pad_token_id=0).sequences
    np.testing.assert_array_equal(written, theirs)
    with pytest.raises(TypeError, match="adapted already"):
        mora_jax.adapt(model, config)
    with pytest.raises(ValueError, match="no adapters"):
        mora_jax.plan(base)


def test_trains_through_a_cycle_with_one_compilation_per_scheme(llama):
    _, module, pretrained, inputs = llama
    with pytest.raises(TypeError, match="unhashable"):
        hash(module)
    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", targets=".*_proj", cycle="groupings")
    model = mora_jax.adapt(module, config)
    plan = mora_jax.plan(model, *inputs)
    assert len(plan) == 14
    params = mora_jax.attach(plan, pretrained)
    tx = mora_jax.freeze_base(optax.adam(3e-2), plan)
    traces = []

    def apply(model, params):
        return model.apply({"params": params}, *inputs, return_dict=False)[0]

    @functools.partial(jax.jit, static_argnames="model")
    def step(model, params, state):
        traces.append(1)

        def loss(params):
            logits, tokens = apply(model, params), inputs[0]
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens[:, 1:]
            ).mean()

        loss, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(8):
        model = mora_jax.adapt(module, plan)
        for _ in range(2):
            params, state, loss = step(model, params, state)
            losses.append(float(loss))
        params, state, plan, _ = mora_jax.merge_and_reset(params, state, plan, donate=False)
    assert len(traces) == 4
    assert losses[-1] < 0.97 * losses[0]
    merged = mora_jax.merge(params, plan)
    np.testing.assert_allclose(
        jax.jit(functools.partial(apply, module))(merged),
        jax.jit(functools.partial(apply, mora_jax.adapt(module, plan)))(params),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, dict(pretrained))
