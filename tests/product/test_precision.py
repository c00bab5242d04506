"""The adapted product in low precision: near to what double precision gives, and in range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax
from helpers.arrays import random_adapter
from helpers.schemes import FAMILIES

MATMUL = (((1,), (0,)), ((), ()))


@pytest.mark.parametrize("placement", ["kernel", "activation"])
@pytest.mark.parametrize("scheme", [mora_jax.Sharing(), mora_jax.Rotation()], ids=str)
def test_bfloat16_stays_near_double_precision(placement, scheme, strict):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((64, 96)), rng.standard_normal((96, 80)) / 10
    adapter = {k: v / 30 for k, v in random_adapter(96, 80, 4, scheme).items()}

    def loss(x, kernel, adapter, placement):
        y = mora_jax.mora_dot_general(x, kernel, MATMUL, adapter, scheme, placement=placement)
        return jnp.square(y.astype(jnp.float32)).sum()

    low = jax.grad(loss, (0, 2))(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16), adapter, placement
    )
    high = jax.grad(loss, (0, 2))(
        jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), adapter, "activation"
    )
    assert low[0].dtype == jnp.bfloat16
    assert low[1]["matrix"].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 2e-2


@pytest.mark.parametrize("scheme", FAMILIES[:-1], ids=str)
def test_bfloat16_gradients_are_as_near_to_float64_as_the_plain_formulas(scheme, float64):
    rng = np.random.default_rng(0)
    x, kernel, dy = (rng.standard_normal(shape) for shape in ((256, 96), (96, 80), (256, 80)))
    adapter = {k: v / 30 for k, v in random_adapter(96, 80, 4, scheme).items()}

    def gradient(dtype, placement):
        def output(adapter):
            low = (jnp.asarray(jnp.asarray(a, jnp.bfloat16), dtype) for a in (x, kernel))
            return mora_jax.mora_dot_general(*low, MATMUL, adapter, scheme, placement=placement)

        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(dtype, "float32")), adapter)
        _, transpose = jax.vjp(output, exact)
        return np.asarray(
            transpose(jnp.asarray(jnp.asarray(dy, jnp.bfloat16), dtype))[0]["matrix"], np.float64
        )

    high = gradient(jnp.float64, "activation")
    rule, plain = (
        np.linalg.norm(gradient(jnp.bfloat16, placement) - high) / np.linalg.norm(high)
        for placement in ("kernel", "activation")
    )
    assert rule <= 1.05 * plain
    assert rule < 5e-3


@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_float16_sums_do_not_leave_its_range(placement, optimized):
    x, kernel = jnp.full((2, 64), 3e4, jnp.float16), jnp.full((64, 64), 1e-3, jnp.float16)
    adapter = {"matrix": jnp.zeros((16, 16))}

    def output(adapter):
        return mora_jax.mora_dot_general(
            x, kernel, MATMUL, adapter, mora_jax.Sharing(), placement=placement
        )

    np.testing.assert_array_equal(output(adapter), jnp.dot(x, kernel))
    gradient = jax.grad(lambda adapter: output(adapter).sum().astype(jnp.float32))(adapter)
    np.testing.assert_allclose(gradient["matrix"], 2 * 4 * 3e4 * 4)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_float16_sums_of_repeated_blocks_do_not_leave_its_range(rows, placement):
    # One block of inputs meets four copies of it in the outputs: 4 * 3e4 is no float16.
    x, kernel = jnp.ones((rows, 16), jnp.float16), jnp.zeros((16, 64), jnp.float16)

    def total(adapter):
        y = mora_jax.mora_dot_general(
            x, kernel, MATMUL, adapter, mora_jax.Decoupling(), placement=placement
        )
        return (y * jnp.float16(3e4)).astype(jnp.float32).sum()

    gradient = jax.grad(total)({"matrix": jnp.zeros((16, 16))})
    np.testing.assert_allclose(gradient["matrix"], rows * 4 * 3e4, rtol=1e-3)


@pytest.mark.parametrize("scheme", [mora_jax.Sharing(), mora_jax.Decoupling()], ids=str)
def test_long_sums_are_not_made_in_bfloat16(scheme):
    rng = np.random.default_rng(0)
    dy = jnp.asarray(rng.standard_normal((8, 8192)), "bfloat16")
    adapter = {"matrix": jnp.asarray(rng.standard_normal((64, 64)), "float32")}
    ones = jnp.ones((8, 1024), "bfloat16")

    def gradient(dtype):
        def total(x):
            return (mora_jax.delta(x, adapter, 8192, scheme) * dy.astype(dtype)).sum()

        by_jax = jax.grad(total)(ones.astype(dtype))
        by_rule = scheme.delta_transpose(dy.astype(dtype), adapter, 1024)
        return [np.asarray(g, "float32") for g in (by_jax, by_rule)]

    # 128 numbers added in bfloat16 would be off by more.
    for rounded, exact in zip(gradient("bfloat16"), gradient("float32"), strict=True):
        assert np.linalg.norm(rounded - exact) < 5e-3 * np.linalg.norm(exact)
