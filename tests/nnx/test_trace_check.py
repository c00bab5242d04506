"""`plan` with inputs follows every adapted kernel through a forward pass."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mora_jax

CONFIG = mora_jax.MoRAConfig(rank=1, scheme="sharing", targets=".*")


class Base(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)

    def kernel_of(self):
        return nnx.state(self.layer)["kernel"][...]


class Loops(Base):
    def __call__(self, x):
        def body(_, x):
            return jax.lax.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: x, x)

        return jax.lax.fori_loop(0, 3, body, x)


class Differentiates(Base):
    def __call__(self, x):
        return jax.grad(lambda x: (self.layer(x) ** 2).sum())(x)


class Returns(Base):
    def __call__(self, x):
        return self.layer(x), self.kernel_of()


class UsesInALoop(Base):
    def __call__(self, x):
        kernel = self.kernel_of()
        return jax.lax.fori_loop(0, 3, lambda _, x: x + kernel.sum(), self.layer(x))


class TakesInOneBranch(Base):
    def __call__(self, x):
        kernel = self.kernel_of()
        return self.layer(x) @ jax.lax.cond(x.sum() > 0, jnp.zeros_like, lambda k: k, kernel).T


def planned(kind, *inputs, **kwargs):
    return mora_jax.plan(mora_jax.adapt(kind(nnx.Rngs(0)), CONFIG), *inputs, **kwargs)


@pytest.mark.parametrize("kind", [Base, Loops, Differentiates])
def test_kernels_that_keep_to_their_layer_are_taken(kind):
    x = jax.ShapeDtypeStruct((2, 6), "float32")
    assert planned(kind, x) == planned(kind)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (Returns, "returns it"),
        (UsesInALoop, "has it in 'reduce_sum'"),
        (TakesInOneBranch, "takes it in one branch"),
    ],
)
def test_kernels_that_are_used_elsewhere_are_refused(kind, how):
    with pytest.raises(ValueError, match=f"'layer/kernel', the kernel of an adapted.*{how}"):
        planned(kind, jnp.ones((2, 6)))


def test_the_method_is_the_one_that_is_named():
    class Model(Returns):
        def other(self, x, scale):
            return scale * self.layer(x)

    assert planned(Model, jnp.ones((2, 6)), scale=2.0, method="other")
    assert planned(Model, jnp.ones((2, 6)), scale=2.0, method=Model.other)
    with pytest.raises(ValueError, match="returns it"):
        planned(Model, jnp.ones((2, 6)))


def test_the_model_stays_as_it_is():
    class Model(Base):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.norm, self.drop = nnx.BatchNorm(6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm(self.layer(x)))

    model = mora_jax.adapt(Model(nnx.Rngs(0)), CONFIG)
    graph, before = nnx.split(model)
    assert mora_jax.plan(model, jnp.ones((2, 6)))
    assert nnx.graphdef(model) == graph
    after = jax.tree.leaves(nnx.state(model))
    assert all(a is b for a, b in zip(jax.tree.leaves(before), after, strict=True))
