"""merge_and_reset: what is kept, what is zeroed, what is refused, how often it compiles."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mora_jax
from helpers.arrays import assert_same_bits
from helpers.models import Network, Small, adapted_network
from helpers.schemes import FAMILIES
from mora_jax._arrays.paths import flatten
from mora_jax._merging import remora as _remora

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "schedule": lambda: optax.adamw(mora_jax.jagged_cosine_schedule(1e-2, 100, 5)),
    "chain(clip, ...)": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.cosine_decay_schedule(1e-2, 100)
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
}


def trained(inputs, make_tx, *, whole=True, steps=4, **config):
    """(base, model, plan, params, tx, opt_state) after some steps."""
    config = {"scheme": "sharing", "also_train": "norm/.*", "module": Small(), **config}
    base, _, model, plan, params = adapted_network(inputs, key=jax.random.key(3), **config)
    tx = make_tx(plan, params)

    @jax.jit
    def step(tree, rest, opt_state):
        def loss(tree):
            params = mora_jax.join(tree, rest)
            return jnp.square(model.apply({"params": params}, inputs) - 1.0).mean()

        gradients = jax.grad(loss)(tree)
        updates, opt_state = tx.update(gradients, opt_state, tree)
        return optax.apply_updates(tree, updates), opt_state

    tree, rest = (params, {}) if whole else mora_jax.split(params, plan)
    opt_state = tx.init(tree)
    for _ in range(steps):
        tree, opt_state = step(tree, rest, opt_state)
    return base, model, plan, mora_jax.join(tree, rest), tx, opt_state


def leaves_by_name(opt_state):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    }


@pytest.mark.parametrize("whole", [True, False], ids=["whole tree", "split"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_adapters_restart_and_nothing_else(inputs, optimizer, whole):
    make = OPTIMIZERS[optimizer]
    _, _, plan, params, _, state = trained(
        inputs, lambda plan, _: mora_jax.freeze_base(make(), plan), whole=whole
    )
    result = mora_jax.merge_and_reset(params, state, plan)
    # Names of leaves say the next scheme; all else stays.
    state = mora_jax.rename_leaves(state, plan.renamed(result.plan))
    assert jax.tree.structure(result.opt_state) == jax.tree.structure(state)
    before, after = leaves_by_name(state), leaves_by_name(result.opt_state)

    moments = {name for name in before if "['mora']" in name}
    # A count belongs to moments where a field beside it is a tree of parameters.
    fields = {re.sub(r"\w+(\['\w+'\])+$", "", name) for name in moments}
    counts = {name for name in before if name.removesuffix("count") in fields}
    assert len(counts) == (0 if optimizer == "momentum" else 1)
    assert result.report == (2, len(moments), len(counts), {})
    assert sum(before[name].any() for name in moments) >= 2
    assert all(before[name] for name in counts)
    for name in before:
        if name in moments | counts:
            assert not after[name].any(), name
        else:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    # The schedule's step and the count of `also_train` stand where four steps left them.
    kept = [int(after[name]) for name in after if name.endswith(".count") and name not in counts]
    taken = 2 if optimizer == "MultiSteps" else 4
    assert kept == [taken] * len(kept)
    assert any("also_train" in name for name in before)
    for path, leaf in flatten(result.params).items():
        assert not ("/mora/" in path and leaf.any())


@pytest.mark.parametrize("scheme", FAMILIES, ids=str)
def test_the_models_output_does_not_change(inputs, scheme):
    base, model, plan, params, _, state = trained(
        inputs,
        lambda plan, _: mora_jax.freeze_base(optax.adam(3e-2), plan),
        scheme=scheme,
        module=Network(),
    )
    before = jax.jit(model.apply)({"params": params}, inputs)
    params, _, plan, _ = mora_jax.merge_and_reset(params, state, plan, key=jax.random.key(5))
    model = mora_jax.adapt(base, plan)
    after = jax.jit(model.apply)({"params": params}, inputs)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert np.abs(before - jax.jit(base.apply)({"params": base.init(
        jax.random.key(0), inputs)["params"]}, inputs)).max() > 1e-2  # fmt: skip


#: Schemes whose new adapters draw no numbers, so that a merge leaves nothing else.
DRAWN_ONCE = [
    scheme
    for scheme in FAMILIES
    if not any(leaf.draws for leaf in scheme.leaves(8, 8, scheme.size(8, 8, 1)).values())
]


@pytest.mark.parametrize("scheme", DRAWN_ONCE, ids=str)
def test_of_what_has_no_memory_a_merge_changes_nothing(inputs, scheme):
    """Gradient descent with the same groups: a training that merges ends where another does."""
    make_tx = lambda plan, _: mora_jax.freeze_base(optax.sgd(0.3), plan)
    # Without a cycle: a scheme of one's own may go on to other groups where built-in ones stay.
    _, model, plan, params, tx, state = trained(inputs, make_tx, scheme=scheme, cycle=None, steps=3)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: jnp.square(model.apply({"params": p}, inputs) - 1.0).mean())(
            params
        )
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def end_of(params, state):
        for _ in range(3):
            params, state = step(params, state)
        return flatten(mora_jax.merge(params, plan))

    straight = end_of(params, state)
    params, state, after, report = mora_jax.merge_and_reset(params, state, plan, donate=False)
    assert (after, report.moments) == (plan.advance(), 0)
    merged = end_of(params, state)
    start = flatten(mora_jax.merge(params, plan))
    for path, kernel in straight.items():
        np.testing.assert_allclose(merged[path], kernel, rtol=1e-5, atol=1e-6, err_msg=path)
    assert any(np.abs(straight[path] - kernel).max() > 1e-3 for path, kernel in start.items())


def test_plain_masked_loop_restarts_too(inputs):
    def make(plan, params):
        return optax.masked(optax.adam(1e-2), mora_jax.trainable_mask(params, plan))

    _, _, plan, params, tx, state = trained(inputs, make, also_train=None)
    with pytest.raises(ValueError, match=r"ScaleByAdamState.*Pass the optimizer"):
        mora_jax.merge_and_reset(params, state, plan)
    result = mora_jax.merge_and_reset(params, state, plan, optimizer=tx)
    assert result.report == (2, 4, 1, {})


def test_training_goes_on_through_a_cycle(inputs):
    base, _, plan, params, tx, state = trained(
        inputs, lambda plan, _: mora_jax.freeze_base(optax.adam(1e-2), plan), cycle="groupings"
    )
    schemes, losses = [], []
    for _ in range(5):
        schemes.append(plan["embed"].scheme)
        model = mora_jax.adapt(base, plan)

        @jax.jit
        def step(params, state, model=model):
            loss, gradients = jax.value_and_grad(
                lambda p: jnp.square(model.apply({"params": p}, inputs) - 1.0).mean()
            )(params)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        for _ in range(3):
            params, state, loss = step(params, state)
            losses.append(loss)
        params, state, plan, _ = mora_jax.merge_and_reset(params, state, plan)
    assert schemes == [mora_jax.scheme_from_mora_type(t) for t in (1, 2, 3, 4, 1)]
    assert losses[-1] < losses[0]


def test_compiles_once_per_scheme_of_the_cycle(inputs):
    # A rank that no other test uses, so that nothing is compiled yet.
    base, _, plan, params, _, state = trained(
        inputs,
        lambda plan, _: mora_jax.freeze_base(optax.adam(1e-2), plan),
        cycle="groupings",
        rank=1,
    )
    traces = []

    @functools.partial(jax.jit, static_argnames="model")
    def forward(model, params):
        traces.append(1)  # not the model: nothing here may keep it alive
        return model.apply({"params": params}, inputs)

    merges = _remora._restart_donating._cache_size()
    for _ in range(3):
        for _ in range(4):
            forward(mora_jax.adapt(base, plan), params)
            params, state, plan, _ = mora_jax.merge_and_reset(params, state, plan, donate=True)
    assert len(traces) == 4
    assert _remora._restart_donating._cache_size() - merges == 4


def test_donation_frees_what_changes_and_nothing_else(inputs):
    _, _, plan, params, _, state = trained(
        inputs, lambda plan, _: mora_jax.freeze_base(optax.adam(1e-2), plan)
    )
    kept = mora_jax.merge_and_reset(params, state, plan)  # by default nothing is given up
    assert not params["embed"]["kernel"].is_deleted()
    result = mora_jax.merge_and_reset(params, state, plan, donate=True)
    assert params["embed"]["kernel"].is_deleted()
    assert params["embed"]["mora"]["matrix_sharing"].is_deleted()
    assert result.params["norm"]["scale"] is params["norm"]["scale"]
    assert_same_bits(result.params, kept.params)


def test_nothing_is_given_up_for_a_merge_that_is_refused(inputs):
    _, _, plan, params, _, state = trained(
        inputs, lambda plan, _: mora_jax.freeze_base(optax.adam(1e-2), plan)
    )
    params["embed"]["mora"]["matrix_sharing"] = (
        params["embed"]["mora"]["matrix_sharing"].at[0, 0].set(jnp.nan)
    )
    with pytest.raises(ValueError, match=r"not merged: .* not finite: 'embed/mora/matrix_sharing'"):
        mora_jax.merge_and_reset(params, state, plan)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))


def test_a_shared_count_is_named(inputs):
    _, _, plan, params, _, state = trained(inputs, lambda plan, params: optax.adamw(1e-2))
    with pytest.raises(ValueError, match=r"opt_state\[0\]\.count counts .* freeze_base"):
        mora_jax.merge_and_reset(params, state, plan)


def test_a_state_of_other_parameters_is_named(inputs):
    _, _, _, plan, params = adapted_network(inputs, scheme="sharing")
    state = optax.adam(1e-2).init({"something": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"none at an adapter's path.*something"):
        mora_jax.merge_and_reset(params, state, plan)
    flat = optax.flatten(optax.adam(1e-2)).init(mora_jax.split(params, plan)[0])
    with pytest.raises(ValueError, match="none at an adapter's path"):
        mora_jax.merge_and_reset(params, flat, plan)


def test_an_optimizer_without_state_has_nothing_to_reset(inputs):
    _, _, _, plan, params = adapted_network(inputs, scheme="sharing")
    state = optax.sgd(1e-2).init(params)
    assert mora_jax.merge_and_reset(params, state, plan).report == (7, 0, 0, {})


def test_the_middle_of_an_accumulation_is_no_time_to_merge(inputs):
    _, _, plan, params, _, state = trained(
        inputs, lambda plan, _: mora_jax.freeze_base(OPTIMIZERS["MultiSteps"](), plan), steps=3
    )
    with pytest.raises(ValueError, match="mini_step is 1: merging in the middle"):
        mora_jax.merge_and_reset(params, state, plan)


def test_low_rank_is_relora(inputs):
    _, _, plan, params, _, state = trained(
        inputs, lambda plan, _: mora_jax.freeze_base(optax.adam(1e-2), plan), scheme="low_rank"
    )
    with pytest.raises(ValueError, match="key is missing"):
        mora_jax.merge_and_reset(params, state, plan)
    old = np.asarray(params["embed"]["mora"]["a"])
    result = mora_jax.merge_and_reset(params, state, plan, key=jax.random.key(1))
    assert not result.params["embed"]["mora"]["b"].any()
    assert (np.asarray(result.params["embed"]["mora"]["a"]) != old).all()
    assert result.plan.before_merges() == plan


@pytest.mark.parametrize(
    ("optimizer", "field"),
    [
        (lambda: optax.rprop(1e-2), "step_sizes"),
        (lambda: optax.adagrad(1e-2), "sum_of_squares"),
        (lambda: optax.sm3(1e-2), "nu"),
        (lambda: optax.contrib.prodigy(), "exp_avg"),
        (lambda: optax.contrib.schedule_free_adamw(1e-2), "weight_sum"),
    ],
)
def test_a_state_of_unknown_start_is_named(inputs, optimizer, field):
    _, _, _, plan, params = adapted_network(inputs, scheme="sharing", module=Small())
    state = mora_jax.freeze_base(optimizer(), plan).init(params)
    with pytest.raises(ValueError, match=r"does not know how to restart the field '\w+'"):
        mora_jax.merge_and_reset(params, state, plan)
    assert any(field in name for name in leaves_by_name(state))


def test_one_array_at_two_paths_is_not_donated_twice(inputs):
    _, _, _, plan, params = adapted_network(inputs, scheme="sharing")
    params["attention"]["key"]["kernel"] = params["attention"]["query"]["kernel"]
    with pytest.raises(ValueError, match="hold one and the same array"):
        mora_jax.merge_and_reset(params, (), plan, donate=True)
    assert not params["attention"]["key"]["kernel"].is_deleted()
    mora_jax.merge_and_reset(params, (), plan, donate=False)


def test_mora_dense_keeps_its_scheme_through_merges(inputs):
    layer = mora_jax.MoRADense(6, rank=2, scheme="sharing")
    params = layer.init(jax.random.key(0), inputs)["params"]
    plan = mora_jax.plan(layer, inputs)
    for _ in range(2):
        params["mora"] = {"matrix_sharing": params["mora"]["matrix_sharing"] + 0.1}
        before = layer.apply({"params": params}, inputs)
        params, _, plan, _ = mora_jax.merge_and_reset(params, (), plan)
        after = layer.apply({"params": params}, inputs)
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
