"""Adapted models held to merged ones: the same outputs, the same gradients of the adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax

#: One scheme of each kind of arithmetic, each placement.
schemes_and_placements = pytest.mark.parametrize(
    ("scheme", "placement"),
    [
        ("sharing", "kernel"),
        (mora_jax.Rotation(wrap=True), "activation"),
        (mora_jax.LowRank(), "kernel"),
    ],
    ids=str,
)


def assert_as_merged(adapted, base, params, plan):
    """Compares two functions of parameters, where every adapter of the first is drawn."""
    trainable, frozen = mora_jax.split(params, plan)
    leaves, structure = jax.tree.flatten(trainable)
    rng = np.random.default_rng(0)
    drawn = structure.unflatten(
        [jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
    )

    def outcome(run):
        def loss(trainable):
            outputs = run(mora_jax.join(trainable, frozen))
            return sum(jnp.mean(y**2) for y in jax.tree.leaves(outputs)), outputs

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(drawn)

    ours, theirs = outcome(adapted), outcome(lambda params: base(mora_jax.merge(params, plan)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
