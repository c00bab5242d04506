"""Restarts of NNX models whose optimizer also trains the base, and adapters that draw numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax
from mora_jax import nnx as mora_nnx


def test_an_optimizer_with_one_state_for_all_is_refused_with_the_remedy():
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", also_train="bias")
    model = mora_jax.adapt(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), config)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=mora_nnx.MoRAParam)
    with pytest.raises(ValueError, match=r"nnx.Optimizer\(model, mora_jax.freeze_base\(optimizer"):
        mora_nnx.merge_and_reset(model, optimizer, donate=False)
    optimizer = mora_jax.freeze_base(optax.adam(1e-3), mora_jax.plan(model))
    optimizer = nnx.Optimizer(model, optimizer, wrt=mora_nnx.MoRAParam)
    assert mora_nnx.merge_and_reset(model, optimizer, donate=False).layers == 1


def test_numbers_that_are_replaced_need_no_key():
    base, x = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 6))
    config = mora_jax.MoRAConfig(rank=2, scheme=mora_jax.LowRank(), dropout=0.5)
    model = mora_jax.adapt(base, config, key=jax.random.key(0))
    adapters = nnx.state(model, mora_nnx.MoRAParam)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    nnx.update(model, adapters)
    model.eval()
    again = mora_jax.adapt(base, mora_jax.plan(model))
    again.eval()
    # What is forgotten shows.
    assert jnp.isnan(again(x)).all()
    with pytest.raises(ValueError, match="not finite"):
        mora_nnx.merge(again)
    nnx.update(again, adapters)
    np.testing.assert_array_equal(again(x), model(x))
    again.train()
    with pytest.raises(ValueError, match=r"dropout=0.5 and no key.*model.eval\(\)"):
        again(x)
    with pytest.raises(ValueError, match="key is missing"):
        mora_jax.adapt(base, config)


def test_dropout_starts_as_the_model_is_switched():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.drop = nnx.Linear(6, 6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.layer(x))

    config, base = mora_jax.MoRAConfig(rank=1, scheme="sharing", dropout=0.5), Model(nnx.Rngs(0))
    key, x = jax.random.key(0), jnp.ones((8, 6))
    assert not mora_jax.adapt(base, config, key=key).layer.mora.deterministic
    base.eval()
    model = mora_jax.adapt(base, config, key=key)
    state = nnx.state(model, mora_nnx.MoRAParam)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.1, state))
    np.testing.assert_array_equal(model(x), model(x))
    np.testing.assert_allclose(model(x), mora_nnx.merge(model)(x), atol=1e-6)


def test_a_switch_that_comes_with_the_call_is_warned_of():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x, *, deterministic):
            return self.layer(x)

    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", dropout=0.5)
    with pytest.warns(UserWarning, match="takes deterministic with every call.*model.eval"):
        mora_jax.adapt(Model(nnx.Rngs(0)), config, key=jax.random.key(0))
    mora_jax.adapt(Model(nnx.Rngs(0)), mora_jax.MoRAConfig(rank=1))
