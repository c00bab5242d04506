"""The statistics of batch norms, saved beside adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax
from mora_jax import checkpoint
from mora_jax import nnx as mora_nnx


class Count(nnx.Variable):
    """A statistic of a user's own."""


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(6, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        self.calls = Count(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.last(self.drop(self.norm(self.first(x))))


def trained():
    """(base, model) of which statistics and adapters have moved."""
    base = Model(nnx.Rngs(0))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    state = nnx.state(model, mora_nnx.MoRAParam)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.1, state))
    model(3 + 2 * jax.random.normal(jax.random.key(0), (16, 6)))
    model.eval()
    return base, model


def test_statistics_are_saved_with_adapters(tmp_path):
    base, model = trained()
    plan, x = mora_jax.plan(model), jnp.ones((2, 6))
    before = jax.tree.map(np.asarray, nnx.state(base, nnx.BatchStat))
    checkpoint.save_adapters(tmp_path / "a", nnx.state(model), plan)
    state, plan = checkpoint.load_adapters(tmp_path / "a", nnx.state(base))
    assert type(state["norm"]["mean"]) is nnx.BatchStat
    again = mora_jax.adapt(base, plan)
    nnx.update(again, state)
    again.eval()
    np.testing.assert_array_equal(again(x), model(x))
    assert again.calls[...] == model.calls[...]
    # The base keeps its own.
    jax.tree.map(np.testing.assert_array_equal, nnx.state(base, nnx.BatchStat), before)


def test_a_state_that_lacks_saved_statistics_is_refused(tmp_path):
    base, model = trained()
    checkpoint.save_adapters(tmp_path / "a", nnx.state(model), mora_jax.plan(model))
    with pytest.raises(ValueError, match=r"'calls', 'norm/mean', 'norm/var'.*nnx.state\(model\)"):
        checkpoint.load_adapters(tmp_path / "a", nnx.state(base, nnx.Param))


def test_parameters_alone_have_no_statistics(tmp_path):
    base, model = trained()
    checkpoint.save_adapters(tmp_path / "a", nnx.state(model, nnx.Param), mora_jax.plan(model))
    state, _ = checkpoint.load_adapters(tmp_path / "a", nnx.state(base))
    np.testing.assert_array_equal(state["norm"]["mean"][...], base.norm.mean[...])
