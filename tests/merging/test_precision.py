"""Deltas are formed in float32 at least, and a merge that is not finite is refused by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import mora_jax
from helpers.arrays import perturb
from helpers.schemes import FAMILIES

X = jax.random.normal(jax.random.key(0), (5, 24))


def adapted(scheme, dtype, kernel_dtype="float32", **config):
    """(model, plan, params) whose adapter is not zero."""
    config = {"rank": 4, "scheme": scheme, "dtype": dtype, **config}
    base = nn.Dense(16, use_bias=False, param_dtype=kernel_dtype)
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(**config))
    plan = mora_jax.plan(model, X)
    kernel = 0.01 * jax.random.normal(jax.random.key(1), (24, 16))
    params = {"kernel": kernel.astype(kernel_dtype)}
    params = mora_jax.attach(plan, params, key=jax.random.key(2))
    trained, frozen = mora_jax.split(params, plan)
    return model, plan, mora_jax.join(perturb(trained), frozen)


def wide(params):
    return jax.tree.map(lambda leaf: leaf.astype("float32"), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", FAMILIES, ids=str)
def test_a_narrow_adapter_acts_as_the_same_numbers_in_float32(scheme, dtype):
    model, plan, params = adapted(scheme, dtype, placement="kernel")
    wanted = mora_jax.merge(wide(params), plan)["kernel"]
    np.testing.assert_array_equal(mora_jax.merge(params, plan)["kernel"], wanted)
    restarted = mora_jax.merge_and_reset(params, (), plan, key=jax.random.key(3))
    np.testing.assert_array_equal(restarted.params["kernel"], wanted)
    y = model.apply({"params": params}, X)
    np.testing.assert_allclose(y, X @ wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(X @ (wanted - params["kernel"])).max() > 1e-3
    trained, _ = mora_jax.split(params, plan)
    taken_out = mora_jax.unmerge({"kernel": wanted}, trained, plan)["kernel"]
    np.testing.assert_allclose(taken_out, params["kernel"], rtol=0, atol=1e-6)


def test_losses_are_those_of_the_numbers_that_the_adapter_holds():
    _, plan, params = adapted("low_rank", "bfloat16", "bfloat16")
    kernel, trained = params["kernel"], mora_jax.split(params, plan)[0]
    delta = np.asarray(plan[""].delta(trained["mora"]), np.float64)
    before = np.asarray(kernel, np.float64)
    after = np.asarray(mora_jax.merge(params, plan)["kernel"], np.float64)
    kept = ((after - before) * delta).sum() / (delta * delta).sum()
    assert mora_jax.merge_losses(params, plan)[""].kept == pytest.approx(kept, abs=1e-5)


def test_a_product_beyond_float16_is_formed():
    big = {"a": jnp.full((4, 8), 300, "float16"), "b": jnp.full((8, 4), 100, "float16")}
    scheme = mora_jax.LowRank(0.008)  # 0.001 * (300 * 100 * 8)
    np.testing.assert_allclose(mora_jax.delta_kernel(big, 4, 4, scheme), 240, rtol=1e-6)


def test_a_float64_kernel_takes_a_delta_of_its_own_precision(float64):
    _, plan, params = adapted("low_rank", "float32", "float64")
    a, b = (np.asarray(params["mora"][name], np.float64) for name in "ab")
    merged = mora_jax.merge(params, plan)["kernel"]
    np.testing.assert_allclose(merged, params["kernel"] + a @ b, rtol=0, atol=1e-15)


def test_a_new_adapter_has_the_dtype_of_the_old_one():
    _, plan, params = adapted("low_rank", "bfloat16")
    restarted = mora_jax.merge_and_reset(wide(params), (), plan, key=jax.random.key(0)).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(restarted)} == {"float32"}


def overflowing(kernel_dtype="float16", kernel=60000.0):
    _, plan, params = adapted("decoupling", "float32", kernel_dtype)
    trained, _ = mora_jax.split(params, plan)
    largest = float(jnp.finfo(kernel_dtype).max)
    trained = jax.tree.map(lambda leaf: jnp.full_like(leaf, largest / 6), trained)
    filled = jnp.full((24, 16), kernel * largest / 65504, kernel_dtype)
    return plan, mora_jax.join(trained, {"kernel": filled})


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("donate", [False, True])
def test_a_sum_beyond_the_kernels_dtype_is_refused_and_nothing_is_given_up(dtype, donate):
    plan, params = overflowing(dtype)
    said = rf"not merged: .*{dtype} ends at .*'kernel'"
    with pytest.raises(ValueError, match=said):
        mora_jax.merge(params, plan)
    with pytest.raises(ValueError, match=said):
        mora_jax.merge(params, plan, rounding="stochastic", key=jax.random.key(0))
    if dtype == "float16":  # of float32 kernels there are no losses
        with pytest.raises(ValueError, match=said):
            mora_jax.merge_losses(params, plan)
    state = mora_jax.freeze_base(optax.adam(1e-3), plan).init(params)
    with pytest.raises(ValueError, match=said):
        mora_jax.merge_and_reset(params, state, plan, donate=donate)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))
    assert jnp.isinf(jax.jit(mora_jax.merge, static_argnums=1)(params, plan)["kernel"]).any()


def test_a_base_that_is_not_finite_is_named_as_such():
    _, plan, params = adapted("sharing", "float32")
    params["kernel"] = params["kernel"].at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match="the base holds numbers that are not finite: 'kernel'"):
        mora_jax.merge(params, plan)


def test_what_an_unmerge_cannot_hold_is_refused():
    plan, params = overflowing(kernel=-60000.0)
    trained, base = mora_jax.split(params, plan)
    with pytest.raises(ValueError, match=r"not unmerged: .*'kernel'"):
        mora_jax.unmerge(base, trained, plan)


def test_a_bank_holds_no_number_that_was_cast_to_infinity():
    _, plan, params = adapted("sharing", "float32")
    trained = jax.tree.map(lambda leaf: jnp.full_like(leaf, 4e4), mora_jax.split(params, plan)[0])
    large = jax.tree.map(lambda leaf: 100 * leaf, trained)
    with pytest.raises(ValueError, match=r"adapter 'large' not stacked: .* float16 ends at 65504"):
        mora_jax.stack_adapters({"one": (trained, plan), "large": (large, plan)}, dtype="float16")
    bank = mora_jax.stack_adapters(
        {"one": (trained, plan), "two": (trained, plan)}, dtype="float16"
    )
    with pytest.raises(ValueError, match=r"not combined: .* float16"):
        bank.combine({"one": 1.0, "two": 1.0})
    combined = bank.combine({"one": 1.0, "two": -0.5})
    assert all((leaf == 2e4).all() for leaf in jax.tree.leaves(combined))
