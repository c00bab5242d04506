"""Inputs that are no floats of the kernel's dtype: the delta is as precise as the product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax

W = jnp.asarray(np.random.default_rng(0).normal(size=(12, 8)), jnp.float32)
INTEGERS = jnp.asarray(np.random.default_rng(1).integers(-3, 3, (3, 12)))
INPUTS = {
    "int32": INTEGERS,
    "uint8": jnp.abs(INTEGERS).astype(jnp.uint8),
    "bool": INTEGERS > 0,
    "complex64": INTEGERS * (1 + 0.5j),
    "bfloat16": (INTEGERS / 7).astype(jnp.bfloat16),
}
SCHEMES = [
    {"scheme": "sharing", "placement": "kernel"},
    {"scheme": "sharing", "placement": "activation"},
    {"scheme": "low_rank"},
    {"scheme": "sharing", "dora": True},
]


def outcome(function, params, x):
    def loss(params):
        y = function(params, x)
        return jnp.abs(y).sum(), y

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("config", SCHEMES, ids=lambda config: "-".join(map(str, config.values())))
@pytest.mark.parametrize("dtype", INPUTS)
def test_the_delta_follows_the_product(dtype, config):
    base, x = lambda params, x: x @ params["w"], INPUTS[dtype]
    forward = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=2, **config))
    plan = mora_jax.plan(forward, {"w": W}, x)
    params = mora_jax.attach(plan, {"w": W}, key=jax.random.key(0))
    trainable, frozen = mora_jax.split(params, plan)
    trainable = jax.tree.map(lambda leaf: leaf + 0.3, trainable)

    def merged(trainable, x):
        return base(mora_jax.merge(mora_jax.join(trainable, frozen), plan), x)

    (_, y), gradient = outcome(lambda t, x: forward(mora_jax.join(t, frozen), x), trainable, x)
    (_, want), wanted = outcome(merged, trainable, x)
    assert y.dtype == want.dtype
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    # A low precision input has gradients of that precision.
    rtol = 2e-2 if dtype == "bfloat16" else 1e-4
    for a, b in zip(*map(jax.tree.leaves, (gradient, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


def test_integers_through_a_tied_kernel_experts_and_dropout():
    params = {"tied": {"w": W}, "experts": {"w": jnp.stack([W, -W])}}
    sizes = jnp.array([2, 1])

    def base(params, x):
        down = x @ params["tied"]["w"]
        tied = x[:, :8] @ params["tied"]["w"].T
        experts = jax.lax.ragged_dot(x.astype(jnp.float32), params["experts"]["w"], sizes)
        return down, tied, experts

    forward = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing", dropout=0.5))
    plan = mora_jax.plan(forward, params, INTEGERS)
    params = jax.tree.map(lambda leaf: leaf + 0.3, mora_jax.attach(plan, params))
    got, want = forward(params, INTEGERS), base(mora_jax.merge(params, plan), INTEGERS)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    dropped = forward(params, INTEGERS, mora_key=jax.random.key(0))[0] - base(params, INTEGERS)[0]
    # Whole numbers scaled by two, times 0.3: not rounded to whole numbers.
    assert jnp.any(jnp.abs(dropped - jnp.round(dropped)) > 0.05)


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_new_adapters_change_no_bit(dtype, placement, optimized):
    x = INPUTS[dtype]
    product = functools.partial(
        mora_jax.mora_dot_general,
        dimension_numbers=(((1,), (0,)), ((), ())),
        adapter={"matrix": jnp.zeros((4, 4))},
        scheme=mora_jax.Sharing(),
        placement=placement,
        preferred_element_type=jnp.result_type(x, W),
    )
    np.testing.assert_array_equal(jax.jit(product)(x, W), jax.jit(jnp.matmul)(x, W))
