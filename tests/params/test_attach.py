"""Trees of parameters: attach, split, join, mask."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import freeze

import mora_jax
from helpers.models import adapted_network

PRETRAINED = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, "norm": {"scale": 1.0}}


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="norm", use_bias=False)(nn.Dense(6, name="dense")(x))


@pytest.fixture
def tiny():
    def make(**config):
        model = mora_jax.adapt(Tiny(), mora_jax.MoRAConfig(**{"rank": 1, **config}))
        params = Tiny().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
        return mora_jax.plan(model, jnp.ones((1, 4))), params

    return make


def test_attach_split_join_mask(tiny):
    plan, pretrained = tiny(scheme="sharing", also_train="norm/scale")
    params = mora_jax.attach(plan, freeze(pretrained))
    assert jax.tree.map(jnp.shape, params) == {
        "dense": {"kernel": (4, 6), "bias": (6,), "mora": {"matrix_sharing": (3, 3)}},
        "norm": {"scale": (6,)},
    }
    assert params["dense"]["kernel"] is pretrained["dense"]["kernel"]
    trainable, frozen = mora_jax.split(params, plan)
    assert jax.tree.map(jnp.shape, trainable) == {
        "dense": {"mora": {"matrix_sharing": (3, 3)}}, "norm": {"scale": (6,)},
    }  # fmt: skip
    assert jax.tree.map(jnp.shape, frozen) == {"dense": {"kernel": (4, 6), "bias": (6,)}}
    joined = mora_jax.join(trainable, frozen)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, joined, params))
    assert mora_jax.trainable_mask(params, plan) == {
        "dense": {"kernel": False, "bias": False, "mora": {"matrix_sharing": True}},
        "norm": {"scale": True},
    }


def test_new_low_rank_adapters_are_drawn_from_the_key(tiny):
    plan, pretrained = tiny(scheme=mora_jax.LowRank())
    first, again, other = (
        mora_jax.attach(plan, pretrained, key=jax.random.key(i))["dense"]["mora"] for i in (0, 0, 1)
    )
    assert (first["a"] == again["a"]).all()
    assert (first["a"] != other["a"]).all()
    assert not first["b"].any()
    assert jnp.abs(first["a"]).max() <= 0.5
    with pytest.raises(ValueError, match=r"key is missing: LowRank\(\) draws .*'dense'"):
        mora_jax.attach(plan, pretrained)


def test_equal_layers_draw_different_numbers(inputs):
    *_, params = adapted_network(inputs, scheme="low_rank", key=jax.random.key(0))
    query, key = (params["attention"][name]["mora"]["a"] for name in ("query", "key"))
    assert query.shape == key.shape
    assert (query != key).all()
    first, second, _ = params["layers"]["up"]["mora"]["a"]
    assert (first != second).all()


def test_the_adapters_dtype_is_the_configs(tiny):
    plan, pretrained = tiny(dtype=jnp.bfloat16)
    (matrix,) = mora_jax.attach(plan, pretrained)["dense"]["mora"].values()
    assert matrix.dtype == jnp.bfloat16


def test_trees_that_do_not_fit_are_named(tiny):
    plan, pretrained = tiny(scheme="sharing")
    params = mora_jax.attach(plan, pretrained)
    wide = {"dense": {"kernel": jnp.ones((4, 7)), "bias": jnp.ones(7)}}
    integers = {"dense": {"kernel": jnp.ones((4, 6), jnp.int8)}}
    with pytest.raises(ValueError, match="have adapters already: 'dense/mora/matrix_sharing'"):
        mora_jax.attach(plan, params)
    with pytest.raises(ValueError, match=r"no parameter at 'dense/kernel'.*'other/kernel'"):
        mora_jax.attach(plan, {"other": {"kernel": jnp.ones((4, 6))}})
    with pytest.raises(ValueError, match=r"'dense/kernel' has shape \(4, 7\).* \(4, 6\)"):
        mora_jax.attach(plan, wide)
    with pytest.raises(TypeError, match="'dense/kernel' is int8"):
        mora_jax.attach(plan, integers)
    with pytest.raises(ValueError, match="hold no adapters; call attach"):
        mora_jax.split(pretrained, plan)
    with pytest.raises(ValueError, match="share leaves: 'dense/kernel'"):
        mora_jax.join({"dense": {"kernel": 1}}, {"dense": {"kernel": 2}})
    params["dense"]["mora"]["matrix_sharing"] = jnp.ones((4, 4))
    with pytest.raises(
        ValueError, match=r"'dense/mora/matrix_sharing' has shape \(4, 4\).* \(3, 3\)"
    ):
        mora_jax.trainable_mask(params, plan)
    params["norm"]["mora"] = {"matrix_sharing": jnp.ones((3, 3))}
    with pytest.raises(
        ValueError, match="adapters that the plan lacks: 'norm/mora/matrix_sharing'"
    ):
        mora_jax.merge(params, plan)


def test_stacked_layers_get_stacked_adapters(inputs):
    *_, params = adapted_network(inputs, scheme="sharing")
    assert params["layers"]["up"]["mora"]["matrix_sharing"].shape == (3, 9, 9)
