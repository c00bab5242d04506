"""Old public names still work, and each use warns once with the new name."""

import warnings

import jax.numpy as jnp
import pytest

import mora_jax
from mora_jax import export, peft, sharding

PLAN = mora_jax.Plan((), unadapted=(("head", "excluded"),))
MATMUL = (((1,), (0,)), ((), ()))


def product(**options):
    adapter = {"matrix": jnp.eye(2)}
    return mora_jax.mora_dot_general(
        jnp.ones((2, 6)), jnp.zeros((6, 4)), MATMUL, adapter, mora_jax.Sharing(), **options
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (lambda: mora_jax.Rotation(cycle=True), mora_jax.Rotation(wrap=True), "wrap="),
        (lambda: mora_jax.Decoupling(cycle=True), mora_jax.Decoupling(wrap=True), "wrap="),
        (lambda: mora_jax.Rotation(wrap=True).cycle, True, "wrap"),
        (lambda: mora_jax.Projected, mora_jax.LayerProjection, "mora_jax.LayerProjection"),
        (lambda: peft.Name, peft.KernelName, "mora_jax.peft.KernelName"),
        (lambda: export.Name, export.KernelName, "mora_jax.export.KernelName"),
        (lambda: export.Kept, export.TensorName, "mora_jax.export.TensorName"),
        (lambda: sharding.Spread, sharding.FeatureSharding, "mora_jax.sharding.FeatureSharding"),
        (lambda: PLAN.left, PLAN.unadapted, "unadapted"),
        (lambda: mora_jax.Plan((), left=PLAN.unadapted).unadapted, PLAN.unadapted, "unadapted="),
        (lambda: PLAN.group("up/mora/matrix_sharing"), "adapter", "Plan.role"),
        (lambda: product(spread=sharding.FeatureSharding()).tolist(), product().tolist(),
         "feature_sharding="),
    ],
)  # fmt: skip
def test_an_old_name_warns_once_and_names_the_new_one(old, new, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert old() == new
    assert [type(warning.message) for warning in caught] == [DeprecationWarning]
    assert f"renamed to {message};" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_both_names_at_once_are_refused():
    with pytest.raises(TypeError, match="cycle and wrap"):
        mora_jax.Rotation(cycle=True, wrap=True)


def test_other_names_are_missing_as_ever():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = peft.Nothing
