"""Dropout of adapters in Hugging Face's models follows the model's own switch."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax
from mora_jax.linen._hugging_face import _is_deterministic

IDS = jnp.arange(8)[None]


class Layer(nn.Module):
    def __call__(self, x, mask=None, deterministic: bool = True):
        return x

    def encode(self, x, train: bool = False):
        return x

    def plain(self, x):
        return x


def _decoder_forward(module, x, **kwargs):
    return module(x, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "off"),
    [
        ((1,), {}, True),
        ((1, None, False), {}, False),
        ((1, None, True), {"rngs": {}}, True),
        ((1,), {"deterministic": False}, False),
        ((1,), {"deterministic": True, "method": _decoder_forward}, True),
        ((1,), {"deterministic": False, "method": _decoder_forward, "mutable": ["c"]}, False),
        ((1,), {"method": Layer.encode}, True),
        ((1, True), {"method": "encode"}, False),
        ((1,), {"method": Layer.plain}, False),
    ],
)
def test_the_switch_is_found_wherever_it_is_given(args, kwargs, off):
    assert _is_deterministic(Layer(), args, kwargs) is off


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "encoder and decoder"])
def test_dropout_in_training_alone(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own future
        transformers = pytest.importorskip("transformers")
        if kind == "decoder":
            config = transformers.LlamaConfig(
                vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
            )  # fmt: skip
            base = transformers.FlaxLlamaForCausalLM(config, seed=0)
            call = lambda model, **kwargs: model(IDS, **kwargs).logits
        else:
            config = transformers.BartConfig(
                vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, dropout=0.0,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                decoder_ffn_dim=24, max_position_embeddings=32,
            )  # fmt: skip
            base = transformers.FlaxBartForConditionalGeneration(config, seed=0)

            def call(model, **kwargs):
                hidden = model.encode(IDS, **kwargs)
                return model.decode(IDS, hidden, **kwargs).logits

    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", dropout=0.5)
    model = mora_jax.adapt(base, config)
    model.params = jax.tree.map(lambda leaf: leaf + 0.05, model.params)
    key = jax.random.key(1)
    still = call(model, train=False)
    np.testing.assert_array_equal(call(model, train=False, dropout_rng=key), still)
    assert jnp.abs(call(model, train=True, dropout_rng=key) - still).max() > 1e-3
