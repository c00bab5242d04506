"""Adapted NNX models that are pickled and copied."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax
from mora_jax import nnx as mora_nnx


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(7, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, ids):
        return self.out(self.drop(self.embed(ids)))


def adapted():
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", targets=".*", also_train="out/bias")
    model = mora_jax.adapt(Model(nnx.Rngs(0)), config)
    state = nnx.state(model, mora_nnx.MoRAParam)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.1, state))
    model.eval()
    return model


def with_cloudpickle(model):
    return pickle.loads(pytest.importorskip("cloudpickle").dumps(model))


@pytest.mark.parametrize(
    "again", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy, with_cloudpickle]
)
def test_an_adapted_model_comes_back(again):
    model, ids = adapted(), jnp.arange(3)
    back = again(model)
    assert type(back.out) is type(model.out)
    assert back.out.kernel is not model.out.kernel
    assert nnx.graphdef(back) == nnx.graphdef(model)
    assert mora_jax.plan(back) == mora_jax.plan(model)
    np.testing.assert_array_equal(back(ids), model(ids))
    np.testing.assert_array_equal(mora_nnx.merge(back)(ids), mora_nnx.merge(model)(ids))


def test_a_layer_made_by_hand_comes_back():
    layer = mora_nnx.MoRALinear(3, 4, rank=1, scheme="sharing", rngs=nnx.Rngs(0))
    for back in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(back) is mora_nnx.MoRALinear
        np.testing.assert_array_equal(back(jnp.ones((1, 3))), layer(jnp.ones((1, 3))))
