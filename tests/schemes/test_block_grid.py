"""Blocks of a kernel, and their sums and products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mora_jax._schemes.block_grid import BlockGrid


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("sizes", [(12, 12), (10, 23), (23, 10), (3, 9), (9, 3), (40, 7)], ids=str)
def test_blocks_stand_in_their_places(sizes, wrap):
    grid = BlockGrid(*sizes, size=4, wrap=wrap)
    rng = np.random.default_rng(0)
    matrices = jnp.asarray(rng.standard_normal((grid.count, 4, 4)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((5, sizes[0])), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((5, sizes[1])), jnp.float32)

    @jax.jit
    def everything(matrices, x, dy):
        kernel, transpose = jax.vjp(grid.kernel, matrices)
        wanted = kernel, x @ kernel, *transpose(x.T @ dy)
        return wanted, (grid._look_up(matrices), grid.product(x, matrices), grid.gradient(x, dy)[0])

    wanted, found = everything(matrices, x, dy)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[2], wanted[2], rtol=1e-5, atol=1e-5)
