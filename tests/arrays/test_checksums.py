"""Checksums of arrays."""

import jax.numpy as jnp
import pytest

from mora_jax._arrays.checksums import checksums


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_checksums_know_signs_places_and_every_bit(dtype):
    x = jnp.linspace(0.1, 1, 6, dtype=dtype).reshape(2, 3)
    others = [-x, x.at[0, :2].multiply(-1), x.T, x[::-1], x.at[1, 2].multiply(1.01), x * 2]
    assert len(set(checksums(dict(enumerate([x, *others]))).values())) == 7
