"""Every kind of layer, by its hook and as a function of its parameters: the same gradients."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax
from helpers.arrays import perturb
from mora_jax._product.axes import KernelAxes

X = jax.random.normal(jax.random.key(0), (3, 16, 8))
IDS = jnp.array([[1, 2, 3], [4, 5, 6]])


class Attend(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Embed(11, 8, name="embed").attend(x)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(6, axis=2, batch_dims=(0,))(x)


class OwnEinsum(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (2, 8, 4)))

    def __call__(self, x):
        return jnp.einsum("btd,ndh->btnh", x, self.w[...])


LINEN = {
    "Dense": (nn.Dense(6), X),
    "DenseGeneral": (nn.DenseGeneral((2, 6), axis=(1, 2)), X),
    "experts": (Experts(), X),
    "attention": (nn.MultiHeadDotProductAttention(2), X),
    "Einsum": (nn.Einsum((2, 8, 4), "btd,ndh->btnh"), X),
    "Conv": (nn.Conv(6, (3,)), X),
    "Embed": (nn.Embed(11, 8), IDS),
    "Embed.attend": (Attend(), X),
}
NNX = {
    "Linear": (lambda rngs: nnx.Linear(8, 6, rngs=rngs), X),
    "LinearGeneral": (lambda rngs: nnx.LinearGeneral((16, 8), 12, axis=(1, 2), rngs=rngs), X),
    "attention": (lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs), X),
    "Einsum": (lambda rngs: nnx.Einsum("btd,ndh->btnh", (2, 8, 4), (2, 4), rngs=rngs), X),
    "Conv": (lambda rngs: nnx.Conv(8, 6, (3,), rngs=rngs), X),
    "Embed": (lambda rngs: nnx.Embed(11, 8, rngs=rngs), IDS),
    "own": (OwnEinsum, X),
}
CONFIG = {"rank": 1, "scheme": "sharing", "targets": ".*", "kernels": ()}


def compare(name, hooked, function, plan, params, x):
    """Gradients by the hook, as a function, and of the merged base; prints their FLOPs."""
    trainable, frozen = mora_jax.split(perturb(params), plan)
    runs = {
        "hooked": hooked,
        "function": mora_jax.adapt(function, plan),
        "merged": lambda params, x: function(mora_jax.merge(params, plan), x),
    }
    gradients, flops = {}, {}
    for path, run in runs.items():
        loss = lambda t, x, run=run: jnp.sum(jnp.sin(run(mora_jax.join(t, frozen), x)))
        by = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
        compiled = jax.jit(jax.grad(loss, by)).lower(trainable, x).compile()
        gradients[path] = compiled(trainable, x)
        flops[path] = compiled.cost_analysis()["flops"]
    print(f"{name:24}" + "".join(f"{path} {n:>8,.0f} FLOPs  " for path, n in flops.items()))
    for path in ("hooked", "function"):
        chex.assert_trees_all_close(gradients[path], gradients["merged"], rtol=1e-5, atol=1e-5)
    # Neither forms the gradient of a kernel, where there are products.
    assert flops["hooked"] == flops["function"] <= flops["merged"]


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    base, x = LINEN[name]
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(**CONFIG))
    plan = mora_jax.plan(model, x)
    params = mora_jax.attach(plan, base.init(jax.random.key(0), x)["params"])
    run = lambda module: lambda params, x: module.apply({"params": params}, x)
    compare(f"linen {name}", run(model), run(base), plan, params, x)


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    make, x = NNX[name]
    base = make(nnx.Rngs(0))
    config = CONFIG | ({"kernels": {"w": KernelAxes((1,), (0, 2))}} if name == "own" else {})
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(**config))
    run = lambda model: lambda state, x: nnx.merge(nnx.graphdef(model), state)(x)
    compare(f"NNX {name}", run(model), run(base), mora_jax.plan(model), nnx.state(model), x)
