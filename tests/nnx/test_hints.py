"""What an NNX model has beside linear layers: what errors and plans say of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax
from mora_jax import nnx as mora_nnx

CONFIG = mora_jax.MoRAConfig(rank=1, scheme="sharing")


class Backbone(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6)(x)


class Policy(nnx.Module):
    """Holds a linen module, as openpi's pi0 does."""

    def __init__(self, rngs):
        backbone = nnx.bridge.ToNNX(Backbone(), rngs=rngs)
        self.llm = nnx.bridge.lazy_init(backbone, jnp.ones((1, 8)))
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.llm(x))


def test_a_linen_module_inside_is_named():
    base, x = Policy(nnx.Rngs(0)), jnp.ones((2, 8))
    plan = mora_jax.plan(mora_jax.adapt(base, CONFIG))
    assert list(plan) == ["head"]
    reason = "in a linen module; adapt the model as a function"
    assert plan.unadapted == (("llm/Dense_0/kernel", reason),)
    with pytest.raises(ValueError, match=r"no linear layer.*linen modules at ''.*as a function"):
        mora_jax.adapt(base.llm, CONFIG)

    # And as a function it is adapted, as the message says.
    graph, params, rest = nnx.split(base, nnx.Param, ...)

    def function(params, x):
        model = nnx.merge(graph, start, rest, copy=True)
        nnx.update(model, params)
        return model(x)

    start, params = params, nnx.to_pure_dict(params)
    model = mora_jax.adapt(function, CONFIG)
    plan = mora_jax.plan(model, params, x)
    assert set(plan) == {"head", "llm/Dense_0"}
    params = mora_jax.attach(plan, params)
    np.testing.assert_array_equal(model(params, x), base(x))


def test_a_model_of_convolutions_says_how_to_adapt_them():
    base = nnx.Sequential(nnx.Conv(3, 8, (3,), rngs=nnx.Rngs(0)), nnx.relu)
    with pytest.raises(ValueError, match=r"convolutions or embeddings at 'layers/0': name them in"):
        mora_jax.adapt(base, CONFIG)
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", targets="layers/0")
    assert list(mora_jax.plan(mora_jax.adapt(base, config))) == ["layers/0"]


def test_a_transposed_convolution_is_adapted_by_its_axes():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.down = nnx.Conv(3, 4, (3,), rngs=rngs)
            self.up, self.out = (
                nnx.ConvTranspose(4, 6, (3,), rngs=rngs),
                nnx.Linear(6, 6, rngs=rngs),
            )

        def __call__(self, x):
            return self.out(self.up(self.down(x)))

    base, x = Model(nnx.Rngs(0)), jnp.ones((1, 5, 3))
    unadapted = dict(mora_jax.plan(mora_jax.adapt(base, CONFIG)).unadapted)
    assert unadapted == {
        "down/kernel": "not chosen; convolutions are adapted when targets names them",
        "up/kernel": "a ConvTranspose; state its axes in MoRAConfig.kernels",
    }
    with pytest.raises(ValueError, match=r"targets='up' matches none.*other layers at 'up/kernel'"):
        mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, targets="up"))
    kernels = {"up/kernel": mora_jax.KernelAxes((0, 1), (2,))}
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", targets="up", kernels=kernels)
    model = mora_jax.adapt(base, config)
    state = nnx.state(model, mora_nnx.MoRAParam)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.1, state))
    y = model(x)
    assert jnp.abs(y - base(x)).max() > 1e-3
    np.testing.assert_allclose(mora_nnx.merge(model)(x), y, atol=1e-5)


def test_the_cells_of_recurrent_layers_are_linear_layers():
    base = nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)))
    plan = mora_jax.plan(mora_jax.adapt(base, CONFIG))
    assert set(plan) == {"cell/dense_i", "cell/dense_h"}
