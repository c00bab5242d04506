"""Restarts that prune: which moments stay, on which terms, over dicts, stacks and NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax
from helpers.arrays import assert_same_bits
from helpers.models import Small, adapted_network
from mora_jax._arrays.paths import parameter_path
from mora_jax.nnx import MoRAParam, merge_and_reset


def filled(inputs, optimizer=None, **config):
    """(plan, params, state): an optimizer whose state is all random numbers, of both signs."""
    *_, plan, params = adapted_network(inputs, **{"scheme": "sharing", **config})
    state = mora_jax.freeze_base(optimizer or optax.adam(1e-2), plan).init(params)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    return plan, params, jax.tree.map(lambda leaf: draw(leaf) if leaf.ndim else leaf + 7, state)


def moments(state):
    """Path of an adapter's leaf -> its moments; and everything else, by its name."""
    found, others = {}, {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = parameter_path(keys)
        layer, found_in, _ = path.rpartition("/mora/matrix_")  # a scheme follows
        if found_in:
            found.setdefault(layer, []).append(np.asarray(leaf))
        else:
            others[jax.tree_util.keystr(keys)] = np.asarray(leaf)
    return found, others


def test_the_largest_stay_and_everything_else_is_as_after_zeroing(inputs):
    plan, params, state = filled(inputs, also_train="norm/.*")
    pruned = mora_jax.merge_and_reset(params, state, plan, donate=False, reset=mora_jax.Prune(0.9))
    zeroed = mora_jax.merge_and_reset(params, state, plan, donate=False)
    assert pruned.plan == zeroed.plan
    assert pruned.report == zeroed.report == (7, 14, 1, {})
    assert_same_bits(pruned.params, zeroed.params)
    (before, _), (after, others), (_, wanted) = map(
        moments, (state, pruned.opt_state, zeroed.opt_state)
    )
    # Counts among them: that of the adapters is zero in both, that of `also_train` in neither.
    assert_same_bits(others, wanted)
    assert sorted(int(leaf) for leaf in others.values() if leaf.ndim == 0) == [0, 7]
    for path in before:
        for old, new in zip(before[path], after[path], strict=True):
            # A matrix at a time, the layers of a stack apart.
            for a, b in zip(*(x.reshape(-1, *x.shape[-2:]) for x in (old, new)), strict=True):
                count = a.size - round(0.9 * a.size)
                least = np.sort(np.abs(a), axis=None)[-count]
                assert count > 1
                np.testing.assert_array_equal(b, np.where(np.abs(a) >= least, a, 0))


def test_a_random_share_is_the_keys_and_one_for_all_moments(inputs):
    plan, params, state = filled(inputs, module=Small(), rank=5)
    prune = mora_jax.Prune(0.75, by="random")

    def run(key):
        result = mora_jax.merge_and_reset(
            params, state, plan, donate=False, reset=prune, key=jax.random.key(key)
        )
        return moments(result.opt_state)[0]

    before, (first, again, other) = moments(state)[0], map(run, (0, 0, 1))
    assert_same_bits(first, again)
    for path, kept in first.items():
        for old, new in zip(before[path], kept, strict=True):
            np.testing.assert_array_equal(new, np.where(new != 0, old, 0))
        mask = kept[0] != 0
        np.testing.assert_array_equal(mask, kept[1] != 0)
        assert abs(mask.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / mask.size)
        assert (mask != (other[path][0] != 0)).any()
    one, two = (kept[0].ravel()[:100] != 0 for kept in first.values())
    assert (one != two).any()


def test_shares_of_all_and_of_nothing_and_equal_numbers(inputs):
    plan, params, state = filled(
        inputs, optax.adafactor(1e-2, min_dim_size_to_factor=4), module=Small()
    )
    for share, wanted in ((0, lambda x: x), (1, np.zeros_like)):
        result = mora_jax.merge_and_reset(
            params, state, plan, donate=False, reset=mora_jax.Prune(share)
        )
        found, old = moments(result.opt_state)[0], moments(state)[0]
        assert_same_bits(found, jax.tree.map(wanted, old))
    ones = jax.tree.map(jnp.ones_like, state)
    result = mora_jax.merge_and_reset(params, ones, plan, reset=mora_jax.Prune(0.5))
    assert all(leaf.all() for leaf in jax.tree.leaves(moments(result.opt_state)[0]))


def test_training_with_nnx_goes_on_after_pruning():
    base = nnx.Linear(12, 8, rngs=nnx.Rngs(0))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=2, scheme="sharing"))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=MoRAParam)
    x = jax.random.normal(jax.random.key(0), (4, 12))

    @nnx.jit
    def step(model, optimizer):
        diff = nnx.DiffState(0, MoRAParam)
        loss, gradients = nnx.value_and_grad(lambda m: ((m(x) - 1) ** 2).mean(), argnums=diff)(
            model
        )
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(5)]
    report = merge_and_reset(model, optimizer, donate=False, reset=mora_jax.Prune(0.9))
    assert report == (1, 2, 1, {})
    for leaf in (
        optimizer.opt_state[0].mu.mora.matrix_sharing_signs_1,
        optimizer.opt_state[0].nu.mora.matrix_sharing_signs_1,
    ):
        assert (leaf[...] != 0).sum() == 36 - round(0.9 * 36)
    assert optimizer.opt_state[0].count[...] == 0
    losses += [step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[4] < losses[0]


def test_what_prunes_nothing_is_refused(inputs):
    plan, params, state = filled(inputs, module=Small())
    for share in (-0.1, 1.5, True, "half"):
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got"):
            mora_jax.Prune(share)
    with pytest.raises(ValueError, match=r"by must be one of .* got 'age'"):
        mora_jax.Prune(0.9, by="age")
    with pytest.raises(ValueError, match="reset='none'; there are 'zero' and Prune"):
        mora_jax.merge_and_reset(params, state, plan, reset="none")
    with pytest.raises(ValueError, match=r"key is missing: Prune\(share=0.9, by='random'\) draws"):
        mora_jax.merge_and_reset(params, state, plan, reset=mora_jax.Prune(0.9, by="random"))


def test_without_jit_the_same_numbers_stay(inputs):
    plan, params, state = filled(inputs, module=Small())
    reset = mora_jax.Prune(0.75)
    wanted = mora_jax.merge_and_reset(params, state, plan, reset=reset).opt_state
    with jax.disable_jit():
        found = mora_jax.merge_and_reset(params, state, plan, reset=reset).opt_state
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(found))
