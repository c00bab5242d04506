"""Trees that paths cannot describe, or that hold the library's own name: refused, or kept."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax

CONFIG = mora_jax.MoRAConfig(rank=1, scheme="sharing")
KERNEL, X = jnp.ones((4, 6)), jnp.ones((2, 4))


def test_empty_dicts_survive_every_way():
    params = {"up": {"kernel": KERNEL, "state": {}}, "none": {}}
    model = mora_jax.adapt(lambda params, x: x @ params["up"]["kernel"], CONFIG)
    plan = mora_jax.plan(model, params, X)
    adapted = mora_jax.attach(plan, params)
    assert (adapted["none"], adapted["up"]["state"]) == ({}, {})
    trainable, frozen = mora_jax.split(adapted, plan)
    structure = jax.tree.structure
    assert structure(mora_jax.join(trainable, frozen)) == structure(adapted)
    assert structure(mora_jax.trainable_mask(adapted, plan)) == structure(adapted)
    assert structure(mora_jax.merge(adapted, plan)) == structure(params)
    assert model(adapted, X).shape == (2, 6)


def test_keys_that_make_one_path_are_refused_by_name():
    for params, said in (
        ({"up": {1: KERNEL, "1": KERNEL}}, "the dict at 'up' has keys that make one path"),
        ({"": {"kernel": KERNEL}}, "has an empty key"),
    ):
        model = mora_jax.adapt(lambda params, x: x, CONFIG)
        with pytest.raises(ValueError, match=said):
            mora_jax.plan(model, params, X)


def test_the_librarys_name_is_refused_in_every_kind_of_model():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="mora")(nn.Dense(4, name="up")(x))

    class Own(nnx.Linear):
        mora = 3

    class Holder(nnx.Module):
        def __init__(self):
            self.mora = nnx.Linear(4, 6, rngs=nnx.Rngs(0))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Linen(name="block")(x)

    with pytest.raises(ValueError, match=r"parameters of its own under the name 'mora'.*rename"):
        mora_jax.plan(mora_jax.adapt(Block(), CONFIG), X)
    with pytest.raises(ValueError, match="parameters of its own under the name 'mora': 'mora"):
        mora_jax.adapt(Holder(), CONFIG)
    with pytest.raises(ValueError, match="class Own has an attribute 'mora' of its own"):
        mora_jax.adapt(Own(4, 6, rngs=nnx.Rngs(0)), CONFIG)
    function = mora_jax.adapt(lambda params, x: x @ params["mora"]["kernel"], CONFIG)
    with pytest.raises(ValueError, match=r"reads params\[...\]\['mora'\].*rename the dict"):
        mora_jax.plan(function, {"mora": {"kernel": KERNEL}}, X)
