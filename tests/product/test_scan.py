"""Stacked layers under a scan: their kernels are not kept once more for the backward pass."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend import core

import mora_jax

LAYERS, WIDTH, HIDDEN = 24, 6, 10
X = jnp.ones((2, WIDTH))


class Block(nn.Module):
    """A layer with a hook, and one that runs as a function of its kernel."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.relu(nn.Dense(HIDDEN, name="up")(x))
        return x + nn.Einsum((HIDDEN, WIDTH), "bf,fd->bd", name="down")(y), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return stack(name="stack")(x, None)[0]


def linen(config):
    model = mora_jax.adapt(Linen(), config)
    params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    return lambda params, x: model.apply({"params": params}, x), params, mora_jax.plan(model, X)


def function(config):
    def forward(params, x):
        def layer(x, w):
            return x + nn.relu(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, params["stack"])[0]

    base = {"up": jnp.ones((LAYERS, WIDTH, HIDDEN)), "down": jnp.ones((LAYERS, HIDDEN, WIDTH))}
    adapted = mora_jax.adapt(forward, config)
    plan = mora_jax.plan(adapted, {"stack": base}, X)
    return adapted, mora_jax.attach(plan, {"stack": base}), plan


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Einsum("bf,fd->bd", (HIDDEN, WIDTH), rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


def nnx_model(config):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stack = nnx.vmap(NNXBlock)(rngs.split(LAYERS))

        def __call__(self, x):
            graph, state = nnx.split(self.stack)
            return jax.lax.scan(lambda x, s: (nnx.merge(graph, s)(x), None), x, state)[0]

    model = mora_jax.adapt(Model(nnx.Rngs(0)), config)
    graph, params = nnx.split(model)
    return lambda params, x: nnx.merge(graph, params)(x), params, mora_jax.plan(model)


def scanned_out(jaxpr):
    """Shapes of everything that scans give out, however deep they are."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield from (out.aval.shape for out in equation.outvars)
        for inner in core.jaxprs_in_params(equation.params):
            yield from scanned_out(inner)


@pytest.mark.parametrize("placement", ["kernel", "activation"])
@pytest.mark.parametrize("make", [linen, function, nnx_model])
def test_the_base_is_not_copied(make, placement):
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", placement=placement)
    run, params, plan = make(config)
    assert len(plan) == 2
    assert all(spec.batch == (LAYERS,) for spec in plan.values())
    trainable, frozen = mora_jax.split(params, plan)

    def loss(trainable, frozen, x):
        return jnp.square(run(mora_jax.join(trainable, frozen), x)).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 2)))(trainable, frozen, X)
    shapes = set(scanned_out(jaxpr.jaxpr))
    assert (LAYERS, 4, 4) in shapes  # the adapters' gradients
    assert not shapes & {(LAYERS, WIDTH, HIDDEN), (LAYERS, HIDDEN, WIDTH)}
