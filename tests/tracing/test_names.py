"""Parameters whose names hold slashes."""

import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax


def test_names_with_slashes_are_written_as_they_are():
    """Haiku's: a flat dict of modules, whose names are paths."""
    params = {
        "mlp/~/linear_0": {"w": jnp.ones((8, 8)), "b": jnp.ones(8)},
        "mlp/~/linear_1": {"w": jnp.ones((8, 8)), "b": jnp.ones(8)},
        "head/dense": {"w": jnp.ones((8, 4))},
    }
    x = jnp.ones((2, 8))

    def function(params, x):
        for name in ("mlp/~/linear_0", "mlp/~/linear_1"):
            x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
        return x @ params["head/dense"]["w"]

    config = {
        "rank": 1,
        "scheme": "sharing",
        "targets": "mlp/~/linear_.*",
        "ranks": {"mlp/~/linear_1": 2},
        "also_train": "head/dense/w",
    }
    forward = mora_jax.adapt(function, mora_jax.MoRAConfig(**config))
    plan = mora_jax.plan(forward, params, x)
    assert [spec.config.rank for spec in plan.values()] == [1, 2]
    shown = str(plan)
    assert "mlp/~/linear_*" in shown or "mlp/~/linear_0" in shown
    assert "head/dense/w" in shown
    assert "2F" not in shown
    params = mora_jax.attach(plan, params)
    np.testing.assert_allclose(forward(params, x), function(mora_jax.merge(params, plan), x))
    for targets in (r"mlp%2F~%2Flinear_0", lambda path: path == "mlp/~/linear_0"):
        one = mora_jax.adapt(function, mora_jax.MoRAConfig(rank=1, targets=targets))
        assert len(mora_jax.plan(one, params, x)) == 1
    wrong = mora_jax.adapt(function, mora_jax.MoRAConfig(rank=1, targets="linear_0"))
    with pytest.raises(ValueError, match=r"Near it: 'mlp/~/linear_0', 'mlp/~/linear_1'"):
        mora_jax.plan(wrong, params, x)
