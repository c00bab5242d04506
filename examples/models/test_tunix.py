"""tunix's Qwen 3 and Llama 3, NNX with einsum layers of their own, by tunix's own PeftTrainer.

Needs Python 3.12 and `pip install google-tunix`.
"""

import time
import warnings

import check
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax
from mora_jax.nnx import MoRAParam, merge

pytestmark = pytest.mark.filterwarnings("ignore")  # of tunix and its dependencies
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
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
POSITIONS = jnp.broadcast_to(jnp.arange(12), (2, 12))
CAUSAL = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
LAYERS = (
    {f"layers/*/attn/{name}_proj": 2 for name in "qkvo"}
    | {f"layers/*/mlp/{name}_proj": 2 for name in ("gate", "up", "down")}
    | {"lm_head": 1}
)


def logits(model):
    # Not under jit, which rounds a whole model differently than its operations one by one.
    return model(TOKENS, POSITIONS, None, CAUSAL)[0]


@pytest.mark.parametrize("name", MODELS)
def test_tunix(name, tmp_path):
    start = time.perf_counter()
    base = MODELS[name]()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(base)))
    config = mora_jax.MoRAConfig(rank=4, scheme="sharing")
    model = mora_jax.adapt(base, config)
    plan = mora_jax.plan(model)
    assert check.counted(plan) == LAYERS
    plain = logits(base)
    np.testing.assert_array_equal(logits(model), plain)

    def loss(model, input_tokens, input_mask):
        del input_mask
        y = model(input_tokens, POSITIONS, None, CAUSAL)[0][:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(y, input_tokens[:, 1:]).mean()

    training = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=20)
    trainer = peft_trainer.PeftTrainer(model, optax.adam(3e-2), training)
    trainer = trainer.with_loss_fn(loss).with_gen_model_input_fn(
        lambda batch: {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}
    )
    batch = peft_trainer.TrainingInput(input_tokens=TOKENS, input_mask=jnp.ones_like(TOKENS))
    first = float(loss(model, TOKENS, None))
    trainer.train([batch] * 20)
    last = float(loss(model, TOKENS, None))
    assert last < 0.9 * first

    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(MoRAParam)))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    y, merged = logits(model), logits(merge(model))
    scale = float(jnp.abs(y).max())
    np.testing.assert_allclose(merged, y, atol=1e-5 * scale)
    check.TABLE.append(
        f"| {name} | {len(plan)} | {first:.3f} -> {last:.3f} | "
        f"{float(jnp.abs(merged - y).max()) / scale:.0e} | {time.perf_counter() - start:.0f} s |"
    )
