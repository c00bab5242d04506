"""A restart equals a fresh start: for every optimizer of optax, or it is rejected by name."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from optax import contrib

import mora_jax
from mora_jax.nnx import MoRAParam, merge_and_reset

X = jnp.ones((2, 8))


def adapted(**config):
    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", cycle=None, **config)
    model = mora_jax.adapt(nn.Dense(6), config)
    plan = mora_jax.plan(model, X)
    return plan, mora_jax.attach(plan, nn.Dense(6).init(jax.random.key(0), X)["params"])


def optimizers():
    """Name -> optimizer, of all that optax has and that hold a state."""
    found = {}
    for module in (optax, contrib):
        for name in dir(module):
            make = getattr(module, name)
            if name.startswith(("_", "scale_by_")) or not inspect.isfunction(make):
                continue
            for args in ((), (1e-2,)):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        optimizer = make(*args)
                        state = optimizer.init({"w": jnp.ones((4, 4))})
                except Exception:  # functions that make no optimizer, or need more arguments
                    continue
                places = map(jax.tree_util.keystr, dict(jax.tree_util.tree_leaves_with_path(state)))
                if any("['w']" in place for place in places):
                    found[name] = optimizer
                    break
    return found


#: Optimizers by name, with other start values than their own too.
OPTIMIZERS = {
    **optimizers(),
    "rmsprop from 1": optax.rmsprop(1e-2, initial_scale=1.0),
    "rmsprop, centered, from a half": optax.rmsprop(
        1e-2, centered=True, bias_correction=True, initial_scale=0.5
    ),
    "yogi from a tenth": optax.scale_by_yogi(initial_accumulator_value=0.1),
    "adagrad from 3": optax.adagrad(1e-2, initial_accumulator_value=3.0),
    "mechanize": contrib.mechanize(optax.adam(1e-2)),
    "galore": contrib.galore(1e-2, rank=2),
    "schedule": optax.adam(optax.linear_schedule(1e-2, 1e-3, 100)),
    "inject_hyperparams": optax.inject_hyperparams(optax.rmsprop)(1e-2, initial_scale=1.0),
    "masked": optax.masked(optax.yogi(1e-2), lambda tree: jax.tree.map(lambda _: True, tree)),
}
#: What goes on through a restart: schedules, noise, Muon's constants and its count of no parameter.
CLOCKS = {
    "schedule": r"\[1\]\.count$",
    "inject_hyperparams": r"\.inner_state\.count$|^\.count$|hyperparams",
    "noisy_sgd": r"\[0\]\.(count|rng_key)$",
    "muon": r"\['adam'\].*count$|ns_coeffs$",
    "dpsgd": r"rng_key$",
}


def moved(leaf):
    """Other numbers, as training would leave them."""
    if not hasattr(leaf, "dtype") or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return ~leaf if leaf.dtype == bool else leaf + jnp.asarray(1, leaf.dtype)


def by_name(state):
    return {
        jax.tree_util.keystr(keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(state)
        if not jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)
    }


def test_optax_has_these():
    known = {"adam", "adamw", "rmsprop", "yogi", "rprop", "lion", "sm3", "prodigy", "muon", "dog"}
    assert known < OPTIMIZERS.keys()
    assert len(OPTIMIZERS) > 40


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restart_is_a_fresh_start(name):
    plan, params = adapted()
    trainable, _ = mora_jax.split(params, plan)
    bare = OPTIMIZERS[name]
    for tx, tree in ((mora_jax.freeze_base(bare, plan), params), (bare, trainable)):
        start = tx.init(tree)
        state = jax.tree.map(moved, start)
        if name == "apply_every":
            with pytest.raises(ValueError, match="count is 1: merging in the middle"):
                mora_jax.merge_and_reset(params, state, plan, optimizer=tx)
            continue
        check_same(name, mora_jax.merge_and_reset(params, state, plan, optimizer=tx), start)
        if (result := restarted_without(params, state, plan)) is not None:
            check_same(name, result, start)


def restarted_without(params, state, plan):
    """A restart without the optimizer; None where it is rejected, with the remedy."""
    try:
        return mora_jax.merge_and_reset(params, state, plan)
    except ValueError as error:
        message = str(error)
    assert "Pass the optimizer that made opt_state" in message
    return None


def check_same(name, result, start):
    found, wanted = by_name(result.opt_state), by_name(start)
    assert jax.tree.structure(result.opt_state) == jax.tree.structure(start)
    clock = CLOCKS.get(name, "$^")
    for leaf, value in wanted.items():
        assert found[leaf].dtype == value.dtype
        if not re.search(clock, leaf):
            np.testing.assert_array_equal(found[leaf], value, err_msg=f"{name}: {leaf}")


@pytest.mark.parametrize("name", ["rmsprop from 1", "yogi", "yogi from a tenth"])
def test_without_the_optimizer_another_start_is_rejected(name):
    plan, params = adapted()
    tx = mora_jax.freeze_base(OPTIMIZERS[name], plan)
    for init in (tx.init, jax.jit(tx.init)):
        with pytest.raises(ValueError, match=r"does not start at zero.*optimizer=optimizer"):
            mora_jax.merge_and_reset(params, init(params), plan)


def test_adam_inside_freeze_base_needs_no_optimizer():
    plan, params = adapted()
    state = jax.tree.map(moved, mora_jax.freeze_base(optax.adam(1e-2), plan).init(params))
    result = mora_jax.merge_and_reset(params, state, plan)
    assert not any(leaf.any() for leaf in jax.tree.leaves(result.opt_state))


def test_what_is_trained_beside_adapters_goes_on():
    plan, params = adapted(also_train="bias")
    tx = mora_jax.freeze_base(optax.yogi(1e-2), plan)
    state = jax.tree.map(moved, tx.init(params))
    result = mora_jax.merge_and_reset(params, state, plan, optimizer=tx)
    before, after, start = map(by_name, (state, result.opt_state, tx.init(params)))
    for leaf in before:
        wanted = before if "also_train" in leaf else start
        np.testing.assert_array_equal(after[leaf], wanted[leaf], err_msg=leaf)
    assert any("also_train" in leaf for leaf in before)


def test_another_optimizer_is_rejected():
    plan, params = adapted()
    state = mora_jax.freeze_base(optax.adam(1e-2), plan).init(params)
    with pytest.raises(ValueError, match="makes another state than opt_state"):
        mora_jax.merge_and_reset(params, state, plan, optimizer=optax.adam(1e-2))


def test_what_is_pruned_goes_back_to_its_start():
    plan, params = adapted()
    tx = mora_jax.freeze_base(optax.rmsprop(1e-2, initial_scale=1.0), plan)
    draw = lambda leaf: 2 + jax.random.uniform(jax.random.key(0), leaf.shape) if leaf.ndim else leaf
    state = jax.tree.map(draw, tx.init(params))
    reset = mora_jax.Prune(0.75)
    result = mora_jax.merge_and_reset(params, state, plan, optimizer=tx, reset=reset)
    (moment,) = (leaf for leaf in jax.tree.leaves(result.opt_state) if leaf.ndim)
    assert {True, False} == set((np.asarray(moment) == 1).ravel().tolist())
    assert (np.asarray(moment) == 1).mean() == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("steps", [0, 1])
def test_an_accumulation_is_no_secret_of_jit(steps):
    """Under jit it is not known whether gradients wait: rejected, whatever the counter says."""
    plan, params = adapted()
    multi = optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()
    tx = mora_jax.freeze_base(multi, plan)
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    with pytest.raises(ValueError, match="mini_step is not known under a transformation"):
        jax.jit(lambda p, s: mora_jax.merge_and_reset(p, s, plan)[:2])(params, state)
    if steps:
        with pytest.raises(ValueError, match="mini_step is 1: merging in the middle"):
            mora_jax.merge_and_reset(params, state, plan)
    else:
        assert mora_jax.merge_and_reset(params, state, plan).report.layers == 1


def test_an_nnx_optimizer_of_adapters_and_more_says_what_to_do():
    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", also_train="bias")
    model = mora_jax.adapt(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), config)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=MoRAParam)
    with pytest.raises(ValueError, match=r"nnx\.Optimizer\(model, freeze_base\(optimizer, .*wrt"):
        merge_and_reset(model, optimizer)
    for make in (optax.adam, optax.yogi):
        tx = mora_jax.freeze_base(make(1e-3), mora_jax.plan(model))
        assert merge_and_reset(model, nnx.Optimizer(model, tx, wrt=MoRAParam)).moments == 2


def test_a_partition_of_ones_own_is_not_taken_for_freeze_base():
    plan, params = adapted()
    labels = mora_jax.trainable_mask(params, plan)
    labels = jax.tree.map(lambda trained: "adapter" if trained else "frozen", labels)
    groups = {"adapter": optax.yogi(1e-2), "frozen": optax.set_to_zero()}
    tx = optax.partition(groups, labels)
    state = tx.init(params)
    with pytest.raises(ValueError, match="may start elsewhere than at zero"):
        mora_jax.merge_and_reset(params, state, plan)
    mora_jax.merge_and_reset(
        params, mora_jax.freeze_base(optax.adam(1e-2), plan).init(params), plan
    )
