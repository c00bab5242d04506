"""Stacks of layers that are as many as heads or features: along which axis they are stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax
from helpers.arrays import draw_adapters
from mora_jax import nnx as mora_nnx
from mora_jax.nnx._stacks import Stacked

COUNT, WIDTH = 4, 8
CONFIG = mora_jax.MoRAConfig(rank=1, scheme="sharing")


def stacked(make, axis, count=COUNT):
    return nnx.vmap(make, in_axes=0, out_axes=axis)(nnx.Rngs(0).split(count))


def attention(rngs):
    return nnx.MultiHeadAttention(num_heads=COUNT, in_features=WIDTH, decode=False, rngs=rngs)


def through(stack, x, axis):
    """The layers of a stack one after the other."""
    run = nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)
    return run(x, stack)


@pytest.mark.parametrize("axis", [0, 1])
def test_as_many_layers_as_heads(axis):
    base, x = stacked(attention, axis), jax.random.normal(jax.random.key(1), (1, 3, WIDTH))
    model = mora_jax.adapt(base, CONFIG)
    plan = mora_jax.plan(model)
    assert {spec.kernel_axes.batch for spec in plan.values()} == {(axis,)}
    assert mora_jax.plan(mora_jax.adapt(base, plan)) == plan
    y = through(draw_adapters(model), x, axis)
    assert jnp.abs(y - through(base, x, axis)).max() > 1e-3
    np.testing.assert_allclose(through(mora_nnx.merge(model), x, axis), y, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_nothing_tells_is_said_in_the_config(axis):
    base = stacked(lambda rngs: nnx.Linear(COUNT, COUNT, rngs=rngs), axis)
    with pytest.raises(
        ValueError, match=r"'kernel' is a kernel of shape \(4, 4, 4\).*kernels=\{'k"
    ):
        mora_jax.adapt(base, CONFIG)
    axes = [mora_jax.KernelAxes((1,), (2,), (0,)), mora_jax.KernelAxes((0,), (2,), (1,))][axis]
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", kernels={"kernel": axes})
    model = draw_adapters(mora_jax.adapt(base, config))
    plan = mora_jax.plan(model)
    assert plan[""].kernel_axes == axes
    assert mora_jax.plan(mora_jax.adapt(base, plan)) == plan
    x = jnp.ones((1, COUNT))
    y = through(model, x, axis)
    np.testing.assert_allclose(through(mora_nnx.merge(model), x, axis), y, atol=1e-5)


def test_a_neighbour_of_the_same_stack_decides():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
            self.up = nnx.Linear(COUNT, 5, use_bias=False, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self):
            self.blocks, self.head = stacked(Block, 1), nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0))

    plan = mora_jax.plan(mora_jax.adapt(Model(), CONFIG))
    assert plan["blocks/up"].kernel_axes.batch == (1,)

    class Beside(nnx.Module):
        def __init__(self):
            self.square = stacked(lambda rngs: nnx.Linear(COUNT, COUNT, rngs=rngs), 1)
            self.head = nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=r"'square/kernel'.*no other parameter tells which"):
        mora_jax.adapt(Beside(), CONFIG)


def test_a_stack_is_counted_from_the_front_or_from_the_back():
    kernel = Stacked("layer", (4, 4, 8), (4, 8))
    assert kernel.fitting() == [(0,), (1,)]
    assert Stacked("layer", (4, 8), (8,)).allows((0,), 3)
    assert not Stacked("layer", (8, 4), (8,)).allows((0,), 3)
    assert Stacked("layer", (8, 4), (8,)).allows((2,), 3)


def test_a_kernel_that_does_not_fit_its_layer_is_refused():
    base = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    base.kernel = nnx.Param(jnp.ones((5, 4)))
    with pytest.raises(ValueError, match=r"'kernel' is a kernel of shape \(5, 4\).*says \(3, 4\)"):
        mora_jax.adapt(base, CONFIG)
