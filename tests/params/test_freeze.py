"""freeze_base does what the optimizer does on the trainable half of `split`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from optax import contrib

import mora_jax

X = jnp.ones((4, 16))
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "yogi": lambda: optax.yogi(1e-3),
    "flatten": lambda: optax.flatten(optax.adam(1e-3)),
    "galore": lambda: contrib.galore(1e-3, rank=2),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "private": lambda: optax.chain(
        contrib.differentially_private_aggregate(1.0, 0.5, jax.random.key(0)), optax.adam(1e-3)
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
}


def adapted(**config):
    model = mora_jax.adapt(nn.Dense(8), mora_jax.MoRAConfig(rank=2, scheme="sharing", **config))
    plan = mora_jax.plan(model, X)
    return model, plan, mora_jax.attach(plan, nn.Dense(8).init(jax.random.key(0), X)["params"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_the_optimizer_on_splits_half(name):
    model, plan, params = adapted()
    loss = lambda params, x: (model.apply({"params": params}, x) ** 2).sum()
    gradient = jax.grad(loss)
    if name == "private":  # of each example
        gradient = jax.vmap(gradient, in_axes=(None, 0))
    gradients, bare = gradient(params, X), OPTIMIZERS[name]()
    trained, _ = mora_jax.split(params, plan)
    own = {"mora": gradients["mora"]}
    tx = mora_jax.freeze_base(bare, plan)
    state, wanted_state = tx.init(params), bare.init(trained)
    for _ in range(2):
        updates, state = tx.update(gradients, state, params)
        wanted, wanted_state = bare.update(own, wanted_state, trained)
    new = optax.apply_updates(params, updates)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(new["kernel"], params["kernel"])
    for a, b in zip(*map(jax.tree.leaves, (updates["mora"], wanted["mora"])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert name == "MultiSteps" or a.any()


def test_hyperparameters_are_found_once():
    _, plan, params = adapted()
    state = mora_jax.freeze_base(OPTIMIZERS["inject_hyperparams"](), plan).init(params)
    assert optax.tree_utils.tree_get(state, "learning_rate") == np.float32(1e-3)


def test_there_is_a_group_for_what_is_trained_in_full_where_something_is():
    for also_train, groups in ((None, {"adapter", "frozen"}), ("bias", {"also_train"})):
        _, plan, params = adapted(also_train=also_train)
        state = mora_jax.freeze_base(optax.adam(1e-3), plan).init(params)
        assert groups <= state.inner_states.keys()
        assert ("also_train" in state.inner_states) == (also_train is not None)
