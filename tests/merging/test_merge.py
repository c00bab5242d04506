"""Merging and unmerging."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mora_jax
from helpers.arrays import assert_same_bits, perturb
from helpers.models import adapted_network
from helpers.schemes import FAMILIES
from mora_jax._merging import remora as _remora


def trained(inputs, **config):
    """A model with adapters that are not zero: (base, model, plan, params)."""
    base, _, model, plan, params = adapted_network(inputs, key=jax.random.key(3), **config)
    trainable, frozen = mora_jax.split(params, plan)
    return base, model, plan, mora_jax.join(perturb(trainable), frozen)


@pytest.mark.parametrize("scheme", FAMILIES, ids=str)
def test_merged_outputs_are_the_adapted_ones(inputs, scheme):
    base, model, plan, params = trained(inputs, scheme=scheme)
    merged = mora_jax.merge(params, plan)
    pretrained = jax.tree.map(jnp.shape, base.init(jax.random.key(0), inputs)["params"])
    assert jax.tree.map(jnp.shape, merged) == pretrained
    np.testing.assert_allclose(
        jax.jit(base.apply)({"params": merged}, inputs),
        jax.jit(model.apply)({"params": params}, inputs),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_unmerge_takes_the_adapters_out_again(inputs):
    _, _, plan, params = trained(inputs, scheme="sharing")
    trainable, _ = mora_jax.split(params, plan)
    restored = mora_jax.unmerge(mora_jax.merge(params, plan), trainable, plan)
    chex.assert_trees_all_close(restored, params, rtol=0, atol=2e-7)
    np.testing.assert_array_equal(
        restored["layers"]["up"]["mora"]["matrix_sharing"],
        params["layers"]["up"]["mora"]["matrix_sharing"],
    )


def test_a_stack_is_merged_in_place_layer_by_layer():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
            return layers(96, name="layers")(x)

    model = mora_jax.adapt(Stack(), mora_jax.MoRAConfig(rank=4, scheme="rotation"))
    x = jax.ShapeDtypeStruct((32, 1, 64), jnp.float32)
    plan = mora_jax.plan(model, x)
    kernel = {"layers/kernel": jax.ShapeDtypeStruct((32, 64, 96), jnp.float32)}
    leaves = kernel | plan.adapter_leaves()
    restart = _remora._restart_donating.lower(leaves, {}, None, plan, ((), ()))
    memory = restart.compile().memory_analysis()
    assert memory.alias_size_in_bytes == memory.argument_size_in_bytes
    # The delta of the whole stack would be as large as its kernels.
    assert memory.temp_size_in_bytes < 32 * 64 * 96 * 4 / 3


def test_sums_are_made_in_float32_and_the_dtype_is_kept(inputs):
    base = nn.Dense(6, param_dtype=jnp.bfloat16)
    _, _, _, plan, params = adapted_network(inputs, module=base, scheme="sharing")
    adapter = perturb(params["mora"], scale=1e-3)
    merged = mora_jax.merge({**params, "mora": adapter}, plan)
    value = plan[""].delta(adapter)
    assert value.dtype == jnp.float32
    wanted = (params["kernel"].astype(jnp.float32) + value).astype(jnp.bfloat16)
    assert_same_bits(merged["kernel"], wanted)


def test_only_adapted_kernels_change(inputs):
    _, _, plan, params = trained(inputs, targets="embed")
    merged = mora_jax.merge(params, plan)
    assert merged["layers"]["up"]["kernel"] is params["layers"]["up"]["kernel"]
    assert (merged["embed"]["kernel"] != params["embed"]["kernel"]).any()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_merged(inputs, value):
    _, _, plan, params = trained(inputs, scheme="sharing")
    matrix = params["layers"]["up"]["mora"]["matrix_sharing"]
    params["layers"]["up"]["mora"]["matrix_sharing"] = matrix.at[1, 2, 3].set(value)
    before = jax.tree.map(np.array, params)
    with pytest.raises(
        ValueError, match=r"not merged: .* not finite: 'layers/up/mora/matrix_sharing'"
    ):
        mora_jax.merge(params, plan)
    assert_same_bits(jax.tree.map(np.array, params), before)


def test_merge_needs_adapters_and_works_under_jit(inputs):
    _, _, plan, params = trained(inputs, scheme="sharing")
    with pytest.raises(ValueError, match="hold no adapters"):
        mora_jax.merge(mora_jax.merge(params, plan), plan)
    jitted = jax.jit(mora_jax.merge, static_argnums=1)(params, plan)
    chex.assert_trees_all_close(jitted, mora_jax.merge(params, plan), rtol=1e-6)
