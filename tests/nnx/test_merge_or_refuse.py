"""Random NNX models of wrappers: they are refused by layer, or merge exactly.

Every run takes a sample. MORA_JAX_MODELS=250 takes that many.
"""

import collections
import operator
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax
from mora_jax import nnx as mora_nnx

WIDTH = 4
COUNT = int(os.environ.get("MORA_JAX_MODELS", "8"))


class Two(nnx.Module):
    """Two layers, of which the second is the pieces' own."""

    def __init__(self, rngs):
        self.a = nnx.Linear(WIDTH, 6, rngs=rngs)
        self.b = nnx.Linear(6, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


class Heads(nnx.Module):
    def __init__(self, rngs):
        self.split = nnx.LinearGeneral(WIDTH, (2, 2), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 2), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.join(self.split(x))


class Transposed(Two):
    """A square kernel, turned over in the forward pass."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        nnx.update(self.a, {"kernel": nnx.state(self.a)["kernel"][...].T})
        return super().__call__(x)


class TwiceTheSame(Two):
    def __call__(self, x):
        return super().__call__(super().__call__(x))


class Remat(Two):
    def __call__(self, x):
        return nnx.remat(lambda two, x: two.b(jnp.tanh(two.a(x))))(self, x)


class SharedVariable(Two):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2))
        self.b.kernel = self.a.kernel


class Tied(Two):
    def __call__(self, x):
        return self.a(x) @ self.a.kernel[...].T


class TiedByState(Two):
    def __call__(self, x):
        return self.a(x) @ nnx.state(self.a)["kernel"][...].T


class Assigned(Two):
    def __call__(self, x):
        self.b.kernel.set_value(self.a.kernel[...].T)
        return super().__call__(x)


class AssignedByUpdate(Two):
    def __call__(self, x):
        nnx.update(self.b, {"kernel": nnx.state(self.a)["kernel"][...].T})
        return super().__call__(x)


class AssignedFromElsewhere(Two):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.own = nnx.Variable(jax.random.normal(rngs.params(), (6, WIDTH)))

    def __call__(self, x):
        nnx.update(self.b, {"kernel": self.own[...]})
        return super().__call__(x)


class NormByAttribute(Two):
    def __call__(self, x):
        self.a.kernel[...] = self.a.kernel[...] / 2
        return super().__call__(x)


class NormByState(Two):
    """As flax.nnx.SpectralNorm reaches its layer."""

    def __call__(self, x):
        for _, param in nnx.to_flat_state(nnx.state(self.a, nnx.Param)):
            param[...] = param[...] / jnp.linalg.norm(param[...])
        return super().__call__(x)


class WithMethods(nnx.Linear):
    def project(self, x):
        return x @ self.kernel[...]

    def _hidden(self, x):
        return x @ self.kernel[...]

    @property
    def transposed(self):
        return self.kernel[...].T


class Method(nnx.Module):
    def __init__(self, rngs):
        self.layer = WithMethods(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.layer.project(x)


class PrivateMethod(Method):
    def __call__(self, x):
        return self.layer._hidden(x)


class Property(Method):
    def __call__(self, x):
        return self.layer(x) @ self.layer.transposed


class Stack(nnx.Module):
    def __init__(self, rngs, make=None, count=3, axis=0):
        make = make or (lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))
        self.axis = axis
        self.layers = nnx.vmap(make, in_axes=0, out_axes=axis)(rngs.split(count))

    def __call__(self, x):
        axes = {"in_axes": (nnx.Carry, self.axis), "out_axes": nnx.Carry}
        return nnx.scan(lambda x, layer: jnp.tanh(layer(x)), **axes)(x, self.layers)


class Ensemble(Stack):
    def __call__(self, x):
        run = nnx.vmap(lambda layer, x: layer(x), in_axes=(self.axis, None))
        return run(self.layers, x).mean(0)


class StackTwice(Stack):
    def __call__(self, x):
        return super().__call__(super().__call__(x))


class Loop(Stack):
    """Takes the layers of a stack one by one."""

    def __call__(self, x):
        graph, state = nnx.split(self.layers)
        for index in range(3):
            layer = nnx.merge(graph, jax.tree.map(operator.itemgetter(index), state))
            x = layer(x)
        return x


def attention(rngs):
    return nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)


PIECES = {
    "two": Two,
    "heads": Heads,
    "twice": TwiceTheSame,
    "remat": Remat,
    "conv": lambda rngs: nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs),
    "einsum": lambda rngs: nnx.Einsum("btf,fd->btd", (WIDTH, WIDTH), rngs=rngs),
    "attention": attention,
    "shared variable": SharedVariable,
    "tied": Tied,
    "tied by state": TiedByState,
    "transposed": Transposed,
    "assigned": Assigned,
    "assigned by update": AssignedByUpdate,
    "assigned from elsewhere": AssignedFromElsewhere,
    "norm by attribute": NormByAttribute,
    "norm by state": NormByState,
    "weight norm": lambda rngs: nnx.WeightNorm(nnx.Linear(WIDTH, WIDTH, rngs=rngs), rngs=rngs),
    "spectral norm": lambda rngs: nnx.SpectralNorm(nnx.Linear(WIDTH, WIDTH, rngs=rngs), rngs=rngs),
    "method": Method,
    "private method": PrivateMethod,
    "property": Property,
    "scan": Stack,
    "scan axis 1": lambda rngs: Stack(rngs, axis=1),
    "scan square": lambda rngs: Stack(rngs, count=WIDTH),
    "scan as many as heads": lambda rngs: Stack(rngs, attention, count=2),
    "scan as many as heads, axis 1": lambda rngs: Stack(rngs, attention, count=2, axis=1),
    "ensemble": Ensemble,
    "ensemble axis 1": lambda rngs: Ensemble(rngs, axis=1),
    "stack twice": StackTwice,
    "loop": Loop,
}


class Model(nnx.Module):
    def __init__(self, names, rngs):
        self.pieces = nnx.List([PIECES[name](rngs) for name in names])

    def __call__(self, x):
        for piece in self.pieces:
            x = x + piece(x)
        return x


def draw(model, seed):
    state = nnx.state(model, mora_nnx.MoRAParam)
    leaves, structure = jax.tree.flatten(state)
    numbers = np.random.default_rng(seed)
    drawn = [jnp.asarray(0.1 * numbers.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    nnx.update(model, structure.unflatten(drawn))


def outcome(names, seed):
    """ "refused", or by how much merging moved the output, of which the adapters' part is."""
    choose = random.Random(seed)
    base = Model(names, nnx.Rngs(seed))
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3, WIDTH)), "float32")
    left_out = choose.choice([None, r"pieces/0(/.*)?"]) if len(names) > 1 else None
    config = mora_jax.MoRAConfig(
        rank=1, scheme=choose.choice(["sharing", "rotation"]), exclude=left_out,
        targets=choose.choice(["all-linear", ".*"]),
    )  # fmt: skip
    try:
        model = mora_jax.adapt(base, config)
        mora_jax.plan(model, x)
    except ValueError as error:
        if "'pieces/" not in str(error):
            raise
        return "refused"
    draw(model, seed)
    # Statistics and overwritten kernels that are not adapted change with every call.
    y = nnx.clone(model)(x)
    moved = jnp.abs(mora_nnx.merge(model)(x) - y).max()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=mora_nnx.MoRAParam)
    mora_nnx.merge_and_reset(model, optimizer, donate=False)
    return float(moved), float(jnp.abs(model(x) - y).max()), float(jnp.abs(base(x) - y).max())


def test_models_are_refused_or_merge_exactly():
    choose, found = random.Random(0), collections.Counter()
    with jax.disable_jit():
        for seed in range(COUNT):
            exact = choose.random() < 0.7
            pieces = sorted(PIECES.keys() - REFUSED) if exact else sorted(PIECES)
            names = choose.sample(pieces, choose.choice([1, 2, 3]))
            result = outcome(names, seed)
            found["refused" if result == "refused" else "exact"] += 1
            if result != "refused":
                merged, reset, effect = result
                assert max(merged, reset) < 1e-5, (names, seed, result)
                assert effect > 1e-4, (names, seed, result)
    assert min(found["refused"], found["exact"]) > COUNT / 10, found
    print(dict(found))


REFUSED = {
    "shared variable", "tied", "tied by state", "assigned", "assigned by update",
    "assigned from elsewhere", "transposed", "norm by attribute", "norm by state", "weight norm",
    "spectral norm", "private method", "property", "scan square",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PIECES.keys() - REFUSED))
def test_these_are_taken(name):
    base, x = Model([name], nnx.Rngs(0)), jnp.ones((1, 3, WIDTH))
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", targets=".*")
    assert mora_jax.plan(mora_jax.adapt(base, config), x)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_these_are_refused(name):
    base, x = Model([name], nnx.Rngs(0)), jnp.ones((1, 3, WIDTH))
    with pytest.raises(ValueError, match=r"'pieces/0/.*(MoRAConfig.exclude|in the config)"):
        mora_jax.plan(mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing")), x)
