"""Random linen models: a plan is refused, or the adapted and the merged model are the same.

A model is a chain of parts, some plain, some in lifted transformations, some that do with a kernel
what an adapter does not follow. MORA_MODELS sets how many are drawn: the whole run is of 250.
"""

import os
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mora_jax

WIDTH = 6
NUMBER = int(os.environ.get("MORA_MODELS", "12"))
#: In one test, so that a failure names a few models.
GROUP = 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + 0.5 * nn.tanh(nn.Dense(WIDTH, name="dense")(x))


class Element(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Coder(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(4), nn.Dense(WIDTH)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return nn.tanh(self.encoder(x))

    @nn.remat
    def decode(self, x):
        return self.decoder(x)


class Field(nn.Module):
    inner: nn.Module

    def __call__(self, x):
        return nn.remat(lambda module, x: module(x))(self.inner, x)


class Switch(nn.Module):
    def setup(self):
        self.left, self.right = nn.Dense(WIDTH), nn.Dense(WIDTH)

    def __call__(self, x):
        branches = [lambda module, x: module.left(x), lambda module, x: module.right(x)]
        if self.is_mutable_collection("params"):
            for branch in branches:
                branch(self, x)
        return x + nn.switch(1, branches, self, x)


class Loop(nn.Module):
    def setup(self):
        self.layer = nn.Dense(WIDTH)

    def __call__(self, x):
        if self.is_mutable_collection("params"):
            return self.layer(x)
        body = lambda module, carry: (carry[0] + 1, nn.tanh(module.layer(carry[1])))
        return nn.while_loop(lambda module, carry: carry[0] < 2, body, self, (0, x))[1]


def kernel_of(layer):
    return nn.unbox(layer.variables["params"]["kernel"])


def dense(x):
    return nn.Dense(WIDTH, use_bias=False)(x)


def mapped(function, x):
    """A layer whose kernel is a function of the stored one."""
    map_in = lambda tree: jax.tree.map(function, tree)
    wrapped = nn.map_variables(nn.Dense, "params", map_in, init=True)
    return wrapped(WIDTH)(x)


def scanned(axis, x):
    stack = nn.scan(Element, variable_axes={"params": axis}, split_rngs={"params": True}, length=2)
    return stack()(x, None)[0]


def scanned_with_one(x):
    stack = nn.scan(Element, variable_broadcast="params", split_rngs={"params": False}, length=2)
    return stack()(x, None)[0]


def ensemble(x):
    many = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True},
                   in_axes=None, axis_size=2)  # fmt: skip
    return many()(x).mean(0)


def twice(x):
    layer = nn.Dense(WIDTH)
    return layer(nn.tanh(layer(x)))


def jitted(x):
    block = nn.jit(Block)
    for _ in range(3):
        x = block()(x)
    return x


def partitioned(x):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
    return nn.Dense(WIDTH, kernel_init=init)(x)


def tied(x):
    layer = nn.Dense(4)
    return layer(x) @ kernel_of(layer).T


def nested_tied(x):
    layer = nn.Dense(WIDTH)
    head = nn.Dense(WIDTH, use_bias=False)
    x = layer(x)
    return head.apply({"params": {"kernel": kernel_of(layer).T}}, x)


def nested(module, x):
    layer = nn.Dense(WIDTH, parent=None)
    params = module.param("own", lambda key: layer.init(key, x)["params"])
    return layer.apply({"params": params}, x)


def penalised(x):
    layer = nn.Dense(WIDTH)
    return layer(x) + 0.1 * jnp.square(kernel_of(layer)).mean()


def read_in_scan(x):
    layer = nn.Dense(WIDTH)
    x, kernel = layer(x), kernel_of(layer)
    return jax.lax.scan(lambda x, row: (x + row, None), x, kernel)[0]


def read_and_dropped(x):
    layer = nn.Dense(WIDTH)
    x = layer(x)
    jnp.square(kernel_of(layer)).mean()
    return x


#: What an adapter and a merge have in common.
GOOD = {
    "dense": lambda module, x: dense(x),
    "block": lambda module, x: Block()(x),
    "remat": lambda module, x: nn.remat(Block)()(x),
    "scan": lambda module, x: scanned(0, x),
    "scan over the last axis": lambda module, x: scanned(-1, x),
    "scan with one": lambda module, x: scanned_with_one(x),
    "vmap": lambda module, x: ensemble(x),
    "used twice": lambda module, x: twice(x),
    "nn.jit": lambda module, x: jitted(x),
    "switch": lambda module, x: Switch()(x),
    "while": lambda module, x: Loop()(x),
    "partitioned": lambda module, x: partitioned(x),
    "methods": lambda module, x: Coder()(x),
    "fields": lambda module, x: nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(WIDTH)])(x),
    "a function of a field": lambda module, x: Field(nn.Dense(WIDTH))(x),
    "einsum": lambda module, x: nn.Einsum((2, WIDTH, 3), "...d,hdf->...hf")(x).reshape(x.shape),
    "general": lambda module, x: nn.DenseGeneral((2, 3))(x).reshape(x.shape),
    "attention": lambda module, x: nn.MultiHeadDotProductAttention(2)(x, x),
    "nested": nested,
    "map_variables that stops gradients": lambda module, x: mapped(jax.lax.stop_gradient, x),
    "read and dropped": lambda module, x: read_and_dropped(x),
}
#: What is refused.
BAD = {
    "weight norm": lambda module, x: nn.WeightNorm(nn.Dense(WIDTH))(x),
    "spectral norm": lambda module, x: nn.SpectralNorm(nn.Dense(WIDTH))(x, update_stats=True),
    "map_variables of another function": lambda module, x: mapped(jnp.tanh, x),
    "map_variables that rounds": lambda module, x: mapped(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), x
    ),
    "tied": lambda module, x: tied(x),
    "tied by a nested apply": lambda module, x: nested_tied(x),
    "penalised": lambda module, x: penalised(x),
    "read in a scan": lambda module, x: read_in_scan(x),
}
PARTS = GOOD | BAD


class Chain(nn.Module):
    parts: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for part in self.parts:
            x = nn.LayerNorm()(PARTS[part](self, x))
        return x


def draw(rng):
    """A model and a config. One in three has a part that is refused."""
    parts = list(rng.choice(list(GOOD), rng.integers(1, 4)))
    if set(parts) == {"nested"}:
        parts.append("dense")
    if rng.random() < 1 / 3:
        parts.insert(rng.integers(len(parts) + 1), rng.choice(list(BAD)))
    config = {
        "rank": int(rng.integers(1, 3)),
        "scheme": str(rng.choice(["sharing", "rotation", "low_rank"])),
        "placement": str(rng.choice(["kernel", "activation"])),
    }
    if rng.random() < 0.3:
        config["schemes"] = (
            (lambda path: sum(path.encode()) % 2 == 0, mora_jax.Sharing("contiguous")),
        )
    return Chain(tuple(map(str, parts))), mora_jax.MoRAConfig(**config)


def kernels_of(params):
    return [path for path in flax.traverse_util.flatten_dict(params, sep="/") if "kernel" in path]


def planned(model, x):
    """(plan, None), or (None, why there is none)."""
    try:
        return mora_jax.plan(model, x), None
    except ValueError as error:
        return None, str(error)


def assert_merged_or_refused(rng):
    """Returns whether the model was refused."""
    base, config = draw(rng)
    x = jnp.asarray(rng.standard_normal((2, WIDTH)), "float32")
    variables = base.init(jax.random.key(0), x)
    rest, mutable = {k: v for k, v in variables.items() if k != "params"}, list(variables)[1:]
    run = lambda model, params: model.apply({"params": params, **rest}, x, mutable=mutable)[0]
    model = mora_jax.adapt(base, config)
    plan, refusal = planned(model, x)
    if refusal:
        if "MoRAConfig.schemes" in refusal:  # the pattern has hit no layer
            return False
        assert set(base.parts) & BAD.keys(), f"{base}: {refusal}"
        named = re.search(r"the layer '([^']*)' (multiplies by|has a kernel)", refusal)
        assert named, refusal
        assert any(path.startswith(named[1]) for path in kernels_of(variables["params"]))
        return True
    assert not set(base.parts) & BAD.keys(), f"{base} was not refused"
    params = mora_jax.attach(plan, variables["params"], key=jax.random.key(1))
    trainable, frozen = mora_jax.split(params, plan)
    trainable = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype),
        trainable,
    )
    params = mora_jax.join(trainable, frozen)
    ours = run(model, params)
    scale = float(jnp.abs(ours).max())
    merged = run(base, mora_jax.merge(params, plan))
    np.testing.assert_allclose(ours, merged, atol=1e-5 * scale, rtol=0, err_msg=str(base))
    reset = mora_jax.merge_and_reset(params, (), plan, key=jax.random.key(2), donate=False)
    again = run(mora_jax.adapt(base, reset.plan), reset.params)
    np.testing.assert_allclose(ours, again, atol=1e-5 * scale, rtol=0, err_msg=str(base))
    assert not np.allclose(ours, run(base, variables["params"]), atol=1e-3)
    return False


@pytest.mark.parametrize("first", range(0, NUMBER, GROUP))
def test_a_random_model_is_refused_or_merged(first):
    refused = [
        assert_merged_or_refused(np.random.default_rng((12, seed)))
        for seed in range(first, min(first + GROUP, NUMBER))
    ]
    print(f"{len(refused)} models, {sum(refused)} refused")


@pytest.mark.parametrize("part", BAD)
def test_each_of_these_is_refused_by_name(part):
    base, x = Chain(("dense", part)), jnp.ones((2, WIDTH))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    with pytest.raises(ValueError, match=r"the layer '[^']+' (multiplies by|has a kernel)"):
        mora_jax.plan(model, x)
