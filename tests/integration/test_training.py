"""Training adapters alone: what moves, what is computed, what is kept."""

import operator

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.core import freeze

import mora_jax
from helpers.arrays import assert_same_bits
from helpers.models import adapted_network

CONFIG = {"scheme": "sharing", "placement": "kernel"}


def loss_of(model, params, inputs):
    return jnp.square(model.apply({"params": params}, inputs) - 1.0).mean()


def whole_tree_step(model, tx, inputs):
    """A training step over the whole tree, in one jitted call."""

    def step(params, opt_state):
        loss, gradients = jax.value_and_grad(lambda p: loss_of(model, p, inputs))(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step)


def awkward(params):
    """Parameters whose bits a careless update would change: -0.0 and denormal numbers."""
    kernel = params["embed"]["kernel"]
    kernel = kernel.at[0, 0].set(-0.0).at[0, 1].set(1e-42).at[0, 2].set(-1e-45)
    return {**params, "embed": {**params["embed"], "kernel": kernel}}


def plain_masked(optimizer, plan, params):
    mask = mora_jax.trainable_mask(params, plan)
    return optax.chain(
        optax.masked(optimizer, mask),
        optax.masked(optax.set_to_zero(), jax.tree.map(operator.not_, mask)),
    )


@pytest.mark.parametrize(
    "freeze",
    [lambda tx, plan, params: mora_jax.freeze_base(tx, plan), plain_masked],
    ids=["freeze_base", "plain optax.masked"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_keeps_every_bit(inputs, freeze, dtype):
    inputs = inputs.astype(dtype)
    _, _, model, plan, params = adapted_network(inputs, **CONFIG)
    params = awkward(params)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if "mora" in jax.tree_util.keystr(path) else leaf.astype(dtype),
        params,
    )
    tx = freeze(optax.adamw(1e-2), plan, params)
    step = whole_tree_step(model, tx, inputs)
    before, opt_state = params, tx.init(params)
    for _ in range(5):
        params, opt_state, loss = step(params, opt_state)
    assert loss < jax.jit(lambda params: loss_of(model, params, inputs))(before)
    trainable, frozen = mora_jax.split(params, plan)
    assert_same_bits(frozen, mora_jax.split(before, plan)[1])
    assert all(leaf.any() for leaf in jax.tree.leaves(trainable))


def test_half_a_mask_leaves_adapted_kernels_alone(inputs):
    """`optax.masked` alone passes raw gradients on; those of adapted kernels are zero."""
    _, _, model, plan, params = adapted_network(inputs, **CONFIG)
    tx = optax.masked(optax.adam(1e-2), mora_jax.trainable_mask(params, plan))
    after, _, _ = whole_tree_step(model, tx, inputs)(params, tx.init(params))
    for path in plan.kernel_paths():
        assert_same_bits(*(mora_jax._arrays.paths.flatten(tree)[path] for tree in (after, params)))
    # What has no adapter is not protected: the other half of the mask is needed for that.
    assert (after["norm"]["bias"] != params["norm"]["bias"]).any()


def test_no_base_gradient_is_computed_and_no_base_state_kept(inputs):
    base, _, model, plan, params = adapted_network(inputs, **CONFIG)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    tx = mora_jax.freeze_base(optimizer, plan)
    trainable, frozen = mora_jax.split(params, plan)

    def split_step(trainable, frozen, opt_state):
        loss, gradients = jax.value_and_grad(
            lambda t: loss_of(model, mora_jax.join(t, frozen), inputs)
        )(trainable)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    def unfrozen_step(merged, opt_state):
        loss, gradients = jax.value_and_grad(lambda p: loss_of(base, p, inputs))(merged)
        updates, opt_state = optimizer.update(gradients, opt_state, merged)
        return optax.apply_updates(merged, updates), opt_state, loss

    def flops(step, *args):
        return jax.jit(step).lower(*args).compile().cost_analysis()["flops"]

    whole = flops(whole_tree_step(model, tx, inputs), params, tx.init(params))
    split = flops(split_step, trainable, frozen, tx.init(trainable))
    merged = mora_jax.merge(params, plan)
    unfrozen = flops(unfrozen_step, merged, optimizer.init(merged))
    print(f"\nFLOPs of a step: whole tree {whole:,}, split {split:,}, unfrozen {unfrozen:,}")
    assert whole == split < 0.9 * unfrozen

    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))
    for tree in (params, trainable):
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(tree)))
        assert 2 * trained <= state <= 2 * trained + 16


def test_also_train_is_trained_with_a_state_of_its_own(inputs):
    _, _, model, plan, params = adapted_network(inputs, also_train="norm/.*|embed/kernel", **CONFIG)
    tx = mora_jax.freeze_base(optax.adamw(1e-2), plan)
    after, state, _ = whole_tree_step(model, tx, inputs)(params, tx.init(params))
    changed = {
        path
        for path, leaf in mora_jax._arrays.paths.flatten(after).items()
        if (leaf != mora_jax._arrays.paths.flatten(params)[path]).any()
    }
    assert changed == {"norm/bias", "norm/scale", "embed/kernel", *plan.adapter_leaves()}
    groups = {name: jax.tree.leaves(inner) for name, inner in state.inner_states.items()}
    assert len(groups["adapter"]) == 2 * 7 + 1
    assert len(groups["also_train"]) == 2 * 3 + 1
    assert groups["frozen"] == []


def test_freeze_base_wants_the_parameters_themselves(inputs):
    *_, plan, params = adapted_network(inputs, also_train="norm/.*", **CONFIG)
    tx = mora_jax.freeze_base(optax.adam(1e-2), plan)
    with pytest.raises(ValueError, match=r"the tree lacks what the plan trains.*'norm/bias'"):
        tx.init({"params": params})
    with pytest.raises(ValueError, match="the tree lacks what the plan trains"):
        tx.init(mora_jax.merge(params, plan))
    assert jax.tree.leaves(tx.init(freeze(params)))
