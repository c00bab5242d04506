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
from mora_jax._arrays.mesh import may_be_sharded
from mora_jax._schemes import block_grid as _blocks
from mora_jax._schemes import groups as _groups
from mora_jax._schemes.block_grid import BlockGrid
from mora_jax._schemes.groups import Groups

SIDES = [
    {"grouping": "contiguous"},
    {"grouping": "stride"},
    {"grouping": "stride", "circular": True},
    {"grouping": "stride", "circular": True, "shift": 3},
    {"grouping": "stride", "circular": True, "signs": 5, "shift": 1},
    {"grouping": "stride", "signs": 2},
]


@pytest.fixture
def spread_over_devices(monkeypatch):
    """Makes the spelling for several devices the one that runs."""
    for module in (_groups, _blocks):
        monkeypatch.setattr(module, "may_be_sharded", lambda: True)


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
    with _mesh.spread_is(_mesh.Spread(())):
        assert "slice" in text()


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


def test_one_device_is_not_sharded():
    assert jax.device_count() == 1
    assert not may_be_sharded()


def test_a_mesh_tells_whether_arrays_are_local(monkeypatch):
    monkeypatch.setattr(_mesh.jax, "device_count", lambda: 4)
    assert may_be_sharded()
    kinds = jax.sharding.AxisType
    for kind, sharded in ((kinds.Auto, True), (kinds.Explicit, True), (kinds.Manual, False)):
        mesh = jax.sharding.AbstractMesh((4,), ("d",), axis_types=(kind,))
        with jax.sharding.use_abstract_mesh(mesh):
            assert may_be_sharded() == sharded


def test_tpus_multiply_by_tables_on_one_chip_too():
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("d",), abstract_device=device)
    groups, x = Groups(6, 4), jnp.ones((2, 6))
    assert "dot_general" not in str(jax.make_jaxpr(groups.sum)(x))
    with jax.sharding.use_abstract_mesh(mesh):
        assert "dot_general" in str(jax.make_jaxpr(groups.sum)(x))
