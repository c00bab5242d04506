"""MoRA as LoRA: the nearest there is, and the error that is reported is the true one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax
from helpers.schemes import FAMILIES
from helpers.stacks import INPUTS, OUTPUTS, STACK, deltas, stacked


@pytest.mark.parametrize("scheme", FAMILIES, ids=str)
def test_it_is_the_nearest_and_the_error_is_the_true_one(scheme):
    plan, params = stacked(scheme)
    rank = plan["layers"].size // 2
    lora, lora_plan, report = mora_jax.project_to_lora(params, plan, rank)
    shapes = jax.tree.map(jnp.shape, lora["layers"]["mora"])
    assert shapes == {"a": (INPUTS, STACK, rank), "b": (rank, STACK, OUTPUTS)}
    assert lora_plan["layers"].shapes == shapes
    assert list(report.layers) == ["layers[0]", "layers[1]"]
    wanted, got = deltas(params, plan), deltas(lora, lora_plan)
    for layer, found in enumerate(report.layers.values()):
        values = np.linalg.svd(wanted[layer], compute_uv=False)
        norm, missing = np.linalg.norm(wanted[layer]), np.linalg.norm(wanted[layer] - got[layer])
        np.testing.assert_allclose(found.norm, norm, rtol=1e-6)
        np.testing.assert_allclose(found.error, missing / norm, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.error * norm, np.linalg.norm(values[rank:]), atol=1e-5)
    np.testing.assert_allclose(
        report.total.error, np.linalg.norm(wanted - got) / np.linalg.norm(wanted), atol=1e-6
    )


@pytest.mark.parametrize(
    "scheme", [mora_jax.Sharing(signs=3), mora_jax.LowRank(alpha=3.0)], ids=str
)
def test_its_own_size_loses_nothing_and_more_is_zeros(scheme):
    plan, params = stacked(scheme)
    size = plan["layers"].size
    for rank in (size, INPUTS + 3):
        lora, lora_plan, report = mora_jax.project_to_lora(params, plan, rank)
        np.testing.assert_allclose(deltas(lora, lora_plan), deltas(params, plan), rtol=0, atol=2e-6)
        assert all(found.error < 1e-7 for found in report.layers.values())
    assert not lora["layers"]["mora"]["a"][..., OUTPUTS:].any()


def test_adapters_that_are_zero_and_those_that_are_not_finite():
    plan, params = stacked(mora_jax.Sharing())
    zero = jax.tree.map(jnp.zeros_like, params)
    lora, _, report = mora_jax.project_to_lora(zero, plan, 2)
    assert not any(leaf.any() for leaf in jax.tree.leaves(lora))
    assert report.total == (0.0, 0.0)
    assert report.total.kept == 1.0
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(ValueError, match=r"not projected: .*layers/mora/matrix_sharing"):
        mora_jax.project_to_lora(bad, plan, 2)
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
        mora_jax.project_to_lora(params, plan, 0)


def test_the_table():
    report = mora_jax.ProjectionReport(
        4, {"up": mora_jax.LayerProjection(0.6, 5.0), "down": mora_jax.LayerProjection(0.0, 12.0)}
    )
    assert str(report).splitlines() == [
        "layer        norm  relative error  energy kept",
        "----------------------------------------------",
        "up           5     6.00e-01        64.00%",
        "down         12    0.00e+00        100.00%",
        "all, rank 4  13    2.31e-01        94.67%",
    ]


def test_other_parameters_stay():
    plan, params = stacked(mora_jax.Sharing())
    params["norm"] = {"scale": jnp.ones(3, jnp.bfloat16)}
    plan = dataclasses.replace(plan, also_train=(("norm/scale", (3,)),))
    lora, lora_plan, _ = mora_jax.project_to_lora(params, plan, 1)
    assert lora["norm"]["scale"] is params["norm"]["scale"]
    assert lora["layers"]["kernel"] is params["layers"]["kernel"]
    assert lora_plan.also_train == plan.also_train
