"""Sums over groups and their transposes, in both spellings, on any sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mora_jax
from mora_jax import compress
from mora_jax._arrays import mesh as _mesh
from mora_jax._schemes.groups import Groups

SIDES = [
    {"grouping": "contiguous"},
    {"grouping": "stride"},
    {"grouping": "stride", "circular": True},
    {"grouping": "stride", "circular": True, "shift": 3},
    {"grouping": "stride", "circular": True, "signs": 5, "shift": 1},
    {"grouping": "stride", "signs": 2},
]


@pytest.mark.parametrize("side", SIDES, ids=str)
@given(features=st.integers(1, 40), size=st.integers(1, 24), seed=st.integers(0, 3))
@settings(max_examples=6, deadline=None)
def test_both_spellings_say_the_same(side, features, size, seed):
    groups = Groups(features, size, **side)
    rng = np.random.default_rng(seed)
    x, z = (np.float32(rng.integers(-9, 9, (2, n))) for n in (features, size))
    one_hot = sum(
        weight[:, None] * (np.arange(size) == group[:, None]) for group, weight in groups.tables()
    )

    @jax.jit
    def everything(x, z):
        sums, spreads = (groups.sum, groups._sum_by_table), (groups.spread, groups._spread_by_table)
        return [sum_(x) for sum_ in sums], [spread(z) for spread in spreads]

    sums, spreads = everything(x, z)
    for found in sums:
        np.testing.assert_array_equal(found, x @ one_hot)
    for found in spreads:
        np.testing.assert_array_equal(found, z @ one_hot.T)


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_sum_and_spread_are_transposes(side):
    groups = Groups(11, 4, **side)
    total, spread = jax.jit(groups.sum)(jnp.eye(11)), jax.jit(groups.spread)(jnp.eye(4))
    np.testing.assert_array_equal(total.T, spread)


def test_tables_are_taken_where_nothing_is_known(monkeypatch):
    monkeypatch.setattr(_mesh, "may_be_sharded", lambda: True)

    def text():
        x = jnp.ones((3, 10))
        return str(jax.make_jaxpr(lambda x: compress(x, 4, mora_jax.Sharing()))(x))

    assert "dot_general" in text()
    assert "slice" not in text()
    with _mesh.feature_sharding_is(_mesh.FeatureSharding(())):
        assert "slice" in text()


def test_tpus_multiply_by_tables_on_one_chip_too():
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("d",), abstract_device=device)
    groups, x = Groups(6, 4), jnp.ones((2, 6))
    assert "dot_general" not in str(jax.make_jaxpr(groups.sum)(x))
    with jax.sharding.use_abstract_mesh(mesh):
        assert "dot_general" in str(jax.make_jaxpr(groups.sum)(x))
