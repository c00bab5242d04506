"""Stochastic rounding: exact in the mean, and as ever where nothing lies between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax._arrays.rounding import rounded

KEY = jax.random.key(7)
BF16 = "bfloat16"


def half_a_step(dtype):
    """Numbers of every kind: exact ones, between two, subnormal, at the end, beyond it."""
    info = jnp.finfo(dtype)
    step, top = float(info.eps), float(info.max)
    between = [1 + step / 4, -1 - step / 4, 3 + step / 2, 2.0**-5 * (1 + step / 8)]
    if dtype != BF16:  # whose subnormal numbers are float32's too, and those are flushed
        between.append(float(info.smallest_subnormal) * 2.25)
    exact = [0.0, -0.0, 1.0, -2.0, 1 + step, top, -top, float(info.smallest_normal)]
    return np.asarray(between, np.float32), np.asarray(exact, np.float32)


@pytest.mark.parametrize("dtype", [BF16, "float16", "float8_e4m3fn", "float8_e5m2"])
def test_stochastic_rounding_is_exact_in_the_mean(dtype):
    between, exact = half_a_step(dtype)
    draws = 1 << 16
    x = jnp.broadcast_to(jnp.concatenate([between, exact]), (draws, between.size + exact.size))
    narrow, value = jax.jit(rounded, static_argnums=1)(x, dtype, jax.random.bits(KEY, x.shape))
    assert narrow.dtype == dtype
    np.testing.assert_array_equal(narrow.astype(np.float32), value)
    value, narrow = np.asarray(value), np.asarray(narrow)
    bits = narrow.view(f"uint{8 * narrow.itemsize}")
    assert value[:, between.size :].tobytes() == np.asarray(x)[:, between.size :].tobytes()
    for column, number in enumerate(between):
        down, up = np.unique(value[:, column])
        assert down < number < up
        assert np.ptp(bits[:, column].astype(int)) == 1
        # A mean within four of its standard deviations.
        chance = (number - down) / (up - down)
        deviation = (up - down) * np.sqrt(chance * (1 - chance) / draws)
        assert abs(value[:, column].mean(dtype=np.float64) - number) < 4 * deviation


def test_what_is_not_finite_and_what_overflows_is_rounded_as_ever():
    top = float(jnp.finfo(BF16).max)
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, top * 1.001, -top * 1.001, 3.4e38], jnp.float32)
    for seed in range(20):
        got = rounded(x, BF16, jax.random.bits(jax.random.key(seed), x.shape))[0]
        np.testing.assert_array_equal(*(n.astype(np.float32) for n in (got, x.astype(BF16))))
