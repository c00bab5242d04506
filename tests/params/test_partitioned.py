"""linen parameters in boxes that name mesh axes: adapters have such boxes too."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import mora_jax
from helpers.arrays import perturb

BOXES = {"partitioned": nn.with_partitioning, "logical": nn.with_logical_partitioning}


class Block(nn.Module):
    box: str

    @nn.compact
    def __call__(self, x, _):
        init = functools.partial(BOXES[self.box], nn.initializers.lecun_normal())
        x = x + nn.Dense(8, kernel_init=init(("data", "model")), name="dense")(x)
        experts = nn.Einsum(
            (2, 8, 8), "etd,edf->etf", use_bias=False,
            kernel_init=init(("expert", None, "model")), name="experts",
        )  # fmt: skip
        return x + experts(jnp.stack([x, x])).sum(0), None


class Model(nn.Module):
    box: str

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )  # fmt: skip
        return nn.Dense(4, name="plain")(stack(self.box, name="stack")(x, None)[0])


X = jax.random.normal(jax.random.key(0), (5, 8))


@pytest.mark.parametrize("box", BOXES)
def test_metadata_goes_with_the_adapters(box, optimized):
    base = Model(box)
    pretrained = jax.jit(base.init)(jax.random.key(0), X)["params"]
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    plan = mora_jax.plan(model, X)
    params = mora_jax.attach(plan, pretrained)
    made = jax.jit(model.init)(jax.random.key(0), X)["params"]
    chex.assert_trees_all_equal_shapes(made, params)
    assert nn.get_partition_spec(made) == nn.get_partition_spec(params)
    # Stacks and experts are split as their kernels are, the matrix itself is not.
    stack = params["stack"]
    assert stack["dense"]["kernel"].names == ("data", "layers", "model")
    assert stack["dense"]["mora"]["matrix_sharing"].names == (None, "layers", None)
    assert stack["experts"]["mora"]["matrix_sharing"].names == ("expert", "layers", None, None)
    assert not isinstance(params["plain"]["mora"]["matrix_sharing"], nn.Partitioned)
    np.testing.assert_array_equal(
        jax.jit(model.apply)({"params": params}, X), jax.jit(base.apply)({"params": pretrained}, X)
    )


def test_boxed_parameters_train_merge_and_restart():
    base = Model("partitioned")
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    params = perturb(jax.jit(model.init)(jax.random.key(0), X)["params"])
    plan = mora_jax.plan(model, X)
    optimizer = mora_jax.freeze_base(optax.adam(1e-2), plan)
    state = optimizer.init(params)
    loss = lambda params: jnp.square(model.apply({"params": params}, X)).mean()
    updates, state = optimizer.update(jax.jit(jax.grad(loss))(params), state, params)
    params = optax.apply_updates(params, updates)
    mask = mora_jax.trainable_mask(params, plan)
    masked = optax.masked(optax.adam(1e-2), mask).init(params)
    assert len(jax.tree.leaves(masked)) == 2 * len(plan) + 1

    y = jax.jit(model.apply)({"params": params}, X)
    merged = mora_jax.merge(params, plan)
    chex.assert_trees_all_equal_structs(merged, jax.jit(base.init)(jax.random.key(0), X)["params"])
    np.testing.assert_allclose(jax.jit(base.apply)({"params": merged}, X), y, atol=1e-4)
    trainable, _ = mora_jax.split(params, plan)
    chex.assert_trees_all_close(mora_jax.unmerge(merged, trainable, plan), params, atol=1e-5)
    before = plan
    again, state, plan, report = mora_jax.merge_and_reset(params, state, plan, donate=False)
    assert report == (len(plan), 2 * len(plan), 1, {})
    params = mora_jax.rename_leaves(params, before.renamed(plan))
    chex.assert_trees_all_equal_structs(again, params)
    y_again = jax.jit(mora_jax.adapt(base, plan).apply)({"params": again}, X)
    np.testing.assert_allclose(y_again, y, atol=1e-4)


def test_a_function_takes_boxed_parameters(optimized):
    base = Model("partitioned")
    pretrained = jax.jit(base.init)(jax.random.key(0), X)["params"]
    forward = mora_jax.adapt(
        lambda params, x: base.apply({"params": params}, x),
        mora_jax.MoRAConfig(rank=1, scheme="sharing"),
    )
    plan = mora_jax.plan(forward, pretrained, X)
    params = mora_jax.attach(plan, pretrained)
    assert params["stack"]["experts"]["mora"]["matrix_sharing"].names == (
        "layers",
        "expert",
        None,
        None,
    )
    np.testing.assert_array_equal(
        jax.jit(forward)(params, X), jax.jit(base.apply)({"params": pretrained}, X)
    )
    params = perturb(params)
    merged = mora_jax.merge(params, plan)
    np.testing.assert_allclose(
        jax.jit(forward)(params, X), jax.jit(base.apply)({"params": merged}, X), atol=1e-4
    )
