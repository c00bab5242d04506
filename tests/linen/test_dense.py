"""`MoRADense`: an `nn.Dense` with an adapter of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mora_jax
from helpers.arrays import assert_same_bits, perturb


def apply(model, params, *args):
    return jax.jit(model.apply)({"params": params}, *args)


def test_mora_dense_is_a_dense(inputs, optimized):
    layer = mora_jax.MoRADense(6, rank=2, scheme="rotation", use_bias=False)
    params = layer.init(jax.random.key(0), inputs)["params"]
    plain = nn.Dense(6, use_bias=False)
    kernel = {"kernel": params["kernel"]}
    assert_same_bits(apply(layer, params, inputs), apply(plain, kernel, inputs))
    params = perturb(params)
    plan = mora_jax.plan(layer, inputs)
    merged = mora_jax.merge(params, plan)
    assert merged.keys() == kernel.keys()
    np.testing.assert_allclose(
        apply(layer, params, inputs), apply(plain, merged, inputs), rtol=1e-4, atol=1e-5
    )


def test_dropout_keeps_the_mean_and_the_named_rate():
    x = jnp.ones((20_000, 4))
    layer = mora_jax.MoRADense(4, rank=2, scheme="sharing", dropout=0.25, use_bias=False)
    params = {"kernel": jnp.zeros((4, 4)), "mora": {"matrix_sharing": jnp.eye(4)}}
    y = layer.apply({"params": params}, x, rngs={"mora": jax.random.key(0)})
    np.testing.assert_allclose(y.mean(), 1.0, atol=0.02)
    np.testing.assert_allclose((y == 0).mean(), 0.25, atol=0.02)
    np.testing.assert_allclose(y[y != 0], 4 / 3, rtol=1e-6)


def test_mora_dense_uses_the_product_it_is_given(inputs):
    calls = []

    def product(*args, **kwargs):
        calls.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    layer = mora_jax.MoRADense(6, rank=2, scheme="sharing", dot_general=product)
    layer.init(jax.random.key(0), inputs)
    assert calls
    with pytest.raises(ValueError, match="but no `dot_general_cls`"):
        mora_jax.MoRADense(6, dot_general_cls=lambda: product)
