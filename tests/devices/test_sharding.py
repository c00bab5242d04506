"""Where adapters lie beside a sharded base: a mesh of one device has all the names there are."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mora_jax
from mora_jax import checkpoint, sharding

MESH = jax.make_mesh((1, 1), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"dense": {"w": P("fsdp")}, "experts": {"w": P("expert", "fsdp")}}


def forward(params, x):
    return jnp.einsum("etd,edf->etf", jnp.stack([x @ params["dense"]["w"]] * 3),
                      params["experts"]["w"])  # fmt: skip


def adapted():
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing")
    base = {"dense": {"w": jnp.ones((8, 8))}, "experts": {"w": jnp.ones((3, 8, 8))}}
    where = jax.tree.map(lambda spec: NamedSharding(MESH, spec), SPECS)
    base = jax.device_put(base, where)
    return base, mora_jax.plan(mora_jax.adapt(forward, config), base, jnp.ones((2, 8)))


WANTED = {"dense": P(None, None), "experts": P("expert", None, None)}


def test_experts_are_split_and_matrices_are_whole():
    base, plan = adapted()
    params = mora_jax.attach(plan, base)
    for given in (SPECS, base, jax.tree.map(lambda leaf: leaf.sharding, base)):
        found = sharding.param_shardings(plan, given)
        for layer, spec in WANTED.items():
            leaf = found[layer]["mora"]["matrix_sharing"]
            assert (leaf if given is SPECS else leaf.spec) == spec
            assert params[layer]["mora"]["matrix_sharing"].sharding.spec == spec
    shardings = sharding.param_shardings(plan, base)
    optimizer = mora_jax.freeze_base(optax.adam(1e-3), plan)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, optimizer.init(params))
    found = sharding.optimizer_shardings(optimizer, params, shardings)
    moments = [leaf.spec for leaf in jax.tree.leaves(found)]
    assert sorted(map(str, moments)) == sorted(
        str(leaf.spec if isinstance(leaf, NamedSharding) else P())
        for leaf in jax.tree.leaves(wanted)
    )
    assert moments.count(P("expert", None, None)) == 2


def test_loaded_adapters_lie_beside_their_kernels(tmp_path):
    base, plan = adapted()
    params = mora_jax.attach(plan, base)
    checkpoint.save_adapters(tmp_path / "adapters", params, plan)
    loaded, _ = checkpoint.load_adapters(tmp_path / "adapters", base)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_metadata_of_nnx_goes_with_the_adapters():
    with jax.set_mesh(MESH):
        base = nnx.LinearGeneral(
            8, 6, batch_axis={0: 3}, rngs=nnx.Rngs(0),
            kernel_init=nnx.with_partitioning(
                nnx.initializers.ones, ("expert", "fsdp", None)
            ),
        )  # fmt: skip
        model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
        specs = nnx.get_partition_spec(nnx.state(model))
    assert specs["mora"]["matrix_sharing"].get_value() == P("expert", None, None)
    assert model.mora.matrix_sharing[...].sharding.spec == P("expert", None, None)


def test_metadata_of_linen_gives_the_same_specs():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", None))
    base, x = nn.Dense(8, kernel_init=init), jnp.ones((2, 8))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    of_base = jax.eval_shape(base.init, jax.random.key(0), x)["params"]
    found = sharding.param_shardings(mora_jax.plan(model, x), nn.get_partition_spec(of_base))
    assert found == nn.get_partition_spec(shapes)


def test_what_says_nothing_of_a_mesh_is_named():
    base, plan = adapted()
    with pytest.raises(TypeError, match=r"'dense/w' is a ndarray that says nothing of a mesh"):
        sharding.param_shardings(plan, jax.device_get(base))
    with pytest.raises(ValueError, match=r"no parameter at 'experts/w'"):
        sharding.param_shardings(plan, {"dense": base["dense"]})
    with pytest.raises(ValueError, match=r"batch names 'nope', no axis .* of 'fsdp', 'expert'\."):
        sharding.on_mesh(plan, base, batch=("fsdp", "nope"))
