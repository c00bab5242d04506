"""Forward mode goes through the activations, and elsewhere is refused with what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
W = {"up": {"w": X.T @ X}, "stack": {"w": jnp.stack([X.T @ X] * 2)}}


def base(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer), x @ params["up"]["w"], params["stack"]["w"])[0]


def adapted(**config):
    forward = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing", **config))
    plan = mora_jax.plan(forward, W, X)
    params = jax.tree.map(lambda leaf: leaf + 0.02, mora_jax.attach(plan, W))
    return lambda x: forward(params, x).sum(), lambda x: base(mora_jax.merge(params, plan), x).sum()


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (X,), (X,))[1],
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (X,), (X,))[1],
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,))[1])(X),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "jit of jacfwd": lambda f: jax.jit(jax.jacfwd(f))(X),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
}


@pytest.mark.parametrize("way", FORWARD)
def test_the_kernel_placement_names_the_other(way):
    function, _ = adapted(placement="kernel")
    with pytest.raises(TypeError, match=re.escape("MoRAConfig(placement='activation')")):
        FORWARD[way](function)


@pytest.mark.parametrize("way", ["jvp of jit", "jacfwd"])
def test_the_activations_have_a_forward_mode(way):
    function, merged = adapted(placement="activation")
    np.testing.assert_allclose(FORWARD[way](function), FORWARD[way](merged), rtol=1e-4, atol=1e-5)


def test_reverse_mode_and_second_derivatives_stay():
    function, merged = adapted(placement="kernel")
    for of in (jax.hessian, lambda f: jax.vmap(jax.grad(lambda x: f(x[None])))):
        np.testing.assert_allclose(
            jax.jit(of(function))(X), jax.jit(of(merged))(X), rtol=1e-3, atol=1e-4
        )


def test_the_refusal_leaves_nothing_in_programs():
    function, _ = adapted(placement="kernel")
    text = jax.jit(jax.value_and_grad(function)).lower(X).as_text()
    assert "reverse_only" not in text
