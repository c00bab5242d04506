"""A Llama with the authors' adapter: logits, a whole training run, the merged model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mora_jax
from helpers.files import GOLDEN
from llama.loading import load_hf
from llama.model import Llama
from mora_jax import peft


@pytest.fixture(params=["llama_type1", "llama_type6"])
def golden(request):
    """(expected arrays, base model, its params, these with the authors' adapter, its plan)."""
    folder = GOLDEN / request.param
    config, pretrained = load_hf(folder / "base")
    with np.load(folder / "expected.npz", allow_pickle=False) as file:
        expected = dict(file)
    params, plan = peft.load_adapters(folder / "adapter", pretrained)
    return expected, Llama(config), pretrained, params, plan


def test_logits(golden):
    expected, base, pretrained, params, plan = golden
    assert len(plan) == 7
    model = mora_jax.adapt(base, plan)
    tokens = jax.ShapeDtypeStruct(expected["tokens"].shape, jnp.int32)
    assert dict(mora_jax.plan(model, tokens)) == dict(plan)
    merged = mora_jax.merge(params, plan)
    for name, module, tree in (
        ("base_logits", base, pretrained),
        ("adapted_logits", model, params),
        ("merged_logits", base, merged),
    ):
        logits = jax.jit(module.apply)({"params": tree}, expected["tokens"])
        np.testing.assert_allclose(logits, expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_the_authors_training_run(golden, placement):
    expected, base, pretrained, _, plan = golden
    tokens = jnp.asarray(expected["tokens"])
    ((rank, scheme),) = {(spec.config.rank, spec.scheme) for spec in plan.values()}
    config = mora_jax.MoRAConfig(rank=rank, scheme=scheme, targets=".*_proj", placement=placement)
    model = mora_jax.adapt(base, config)
    plan = mora_jax.plan(model, tokens)
    trainable, frozen = mora_jax.split(mora_jax.attach(plan, pretrained), plan)
    tx = optax.adamw(1e-2, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            logits = model.apply({"params": mora_jax.join(trainable, frozen)}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens[:, 1:]
            ).mean()

        loss, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state, losses = tx.init(trainable), []
    for _ in range(12):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, expected["losses"], rtol=0, atol=1e-4)
