"""Arrays with random numbers, and what is compared bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.nnx import MoRAParam


def random_adapter(in_features, out_features, rank, scheme, seed=0, dtype="float32", batch=()):
    """An adapter of normal random numbers."""
    rng = np.random.default_rng(seed)
    leaves = scheme.leaves(in_features, out_features, scheme.size(in_features, out_features, rank))
    return {
        name: jnp.asarray(rng.standard_normal((*batch, *leaf.shape)), dtype)
        for name, leaf in leaves.items()
    }


def perturb(tree, seed=0, scale=0.1):
    """The tree with normal random numbers added to its leaves."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), tree
    )


def draw_adapters(model):
    """An adapted NNX model, whose adapters now hold normal random numbers."""
    state = nnx.state(model, MoRAParam)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    draw = lambda leaf: 0.1 * jax.random.normal(next(keys), leaf.shape)
    nnx.update(model, jax.tree.map(draw, state))
    return model


def assert_same_bits(first, second):
    """Equal structures, dtypes and bits: -0.0 is not 0.0, and a NaN equals itself."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
