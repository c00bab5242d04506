"""A Llama with the authors' adapter: logits, a whole training run, the merged model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import mora_jax
from conftest import GOLDEN
from llama import Llama
from llama_hf import load_hf


@pytest.fixture(params=["llama_type1", "llama_type6"])
def golden(request):
    """(expected arrays, base model, its params, adapted model, plan, the authors' adapters)."""
    folder = GOLDEN / request.param
    config, params = load_hf(folder / "base")
    saved_config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    scheme = mora_jax.scheme_from_mora_type(saved_config["mora_type"])
    base, rank = Llama(config), saved_config["r"]
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=rank, scheme=scheme, targets=".*_proj"))
    plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 16), jnp.int32))
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    with np.load(folder / "expected.npz", allow_pickle=False) as file:
        expected = dict(file)
    adapters = {}
    for path in plan:
        _, group, name = path.split("/")
        prefix = "base_model.model.model.layers.{}." + f"{group}.{name}.lora_A.weight"
        # Their files hold the transpose, one layer at a time.
        adapters[path] = np.stack([saved[prefix.format(layer)].T for layer in range(2)])
    return expected, base, params, model, plan, adapters


def with_adapters(plan, params, adapters):
    params = mora_jax.attach(plan, params)
    for path, matrix in adapters.items():
        _, group, name = path.split("/")
        assert params["layers"][group][name]["mora"]["matrix"].shape == matrix.shape
        params["layers"][group][name]["mora"]["matrix"] = jnp.asarray(matrix)
    return params


def test_logits(golden):
    expected, base, pretrained, model, plan, adapters = golden
    assert len(plan) == 7
    params = with_adapters(plan, pretrained, adapters)
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
    expected, base, pretrained, _, plan, _ = golden
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
