"""What a scheme of one's own gets from the base class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax
from custom_scheme import RandomGroups


class Gathered(mora_jax.Scheme):
    """Sharing in one block, written as plainly as can be: a sum and a gather in the dtype given."""

    kind = "gathered"

    def compress(self, x, size, *, out_features=None):
        return x.reshape(*x.shape[:-1], -1, size).sum(-2)

    def decompress(self, z, out_features):
        return z[..., np.arange(out_features) % z.shape[-1]]


class Widening(Gathered):
    """Maps that give float32 whatever they get."""

    kind = "widening"

    def compress(self, x, size, *, out_features=None):
        return super().compress(x.astype(jnp.float32), size)

    def decompress(self, z, out_features):
        return super().decompress(z.astype(jnp.float32), out_features)


@pytest.mark.parametrize("scheme", [Gathered(), Widening()], ids=str)
def test_derived_transposes_sum_in_float32_and_keep_the_dtype(scheme):
    ones = jnp.ones((1, 8192), jnp.bfloat16)
    # A sum of ones in bfloat16 ends at 256.
    summed = scheme.decompress_transpose(ones, size=1, in_features=4)
    assert summed.dtype == jnp.bfloat16
    assert summed == 8192
    spread = scheme.compress_transpose(jnp.ones((2, 4), jnp.bfloat16), 8, 8)
    assert spread.dtype == jnp.bfloat16
    np.testing.assert_array_equal(spread, np.ones((2, 8)))


@pytest.mark.parametrize("scheme", [Gathered(), Widening()], ids=str)
def test_a_bfloat16_gradient_is_sharings(scheme):
    x, kernel = jnp.ones((8, 16), jnp.bfloat16), jnp.zeros((16, 8192), jnp.bfloat16)

    def loss(matrix, scheme):
        dimensions, adapter = (((1,), (0,)), ((), ())), {"matrix": matrix}
        y = mora_jax.mora_dot_general(x, kernel, dimensions, adapter, scheme, placement="kernel")
        return y.astype(jnp.float32).sum()

    gradients = [jax.grad(loss)(jnp.zeros((4, 4)), s) for s in (scheme, mora_jax.Sharing())]
    np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_a_scheme_of_ones_own_works_inside_shard_map(placement):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (4, 6)), jax.random.normal(keys[1], (6, 8))
    adapter = {"matrix": jax.random.normal(keys[2], (4, 4))}

    def loss(adapter, x):
        y = mora_jax.mora_dot_general(
            x, kernel, (((1,), (0,)), ((), ())), adapter, RandomGroups(), placement=placement
        )
        return (y**2).mean()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=(spec(), spec("data"))
    )
    def gradients(adapter, x):
        return jax.grad(lambda a, x: jax.lax.pmean(loss(a, x), "data"), argnums=(0, 1))(adapter, x)

    wanted = jax.grad(loss, argnums=(0, 1))(adapter, x)
    found = jax.jit(gradients)(adapter, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)
