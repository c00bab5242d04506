"""Banks of adapters: by name, switched, combined, and trained together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import mora_jax
from helpers.arrays import assert_same_bits
from helpers.banks import WORDS, make_bank
from helpers.models import Small, adapted_network
from helpers.schemes import FAMILIES

X = jnp.ones((5, 10))


@pytest.fixture(scope="module")
def small():
    """(model, plan, bank with room for two more, base parameters, the adapters)."""
    *_, model, plan, params = adapted_network(X, module=Small(), scheme="sharing")
    return model, plan, *make_bank(plan, params, capacity=5)


@pytest.fixture
def compilations():
    """What was compiled while a test ran, one entry each."""
    found = []

    def listen(event, duration, **options):
        del duration, options
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_switching_compiles_nothing(small, compilations):
    model, plan, bank, base, adapters = small
    single = jax.jit(lambda params: model.apply({"params": params}, X))
    mixed = jax.jit(
        lambda params, ids: model.apply({"params": params, "mora": {"adapter_ids": ids}}, X)
    )

    def use(bank, name, other, weights):
        bank = bank.add(name, adapters["maths"], plan)
        chosen = single(mora_jax.join(bank.select(other), base))
        combined = single(mora_jax.join(bank.combine(weights), base))
        ids = bank.adapter_ids([name, other, None, *WORDS[:2]])
        return bank, chosen, combined, mixed(mora_jax.join(bank.adapters, base), ids)

    bank, *first = use(bank, "history", "french", {"french": 0.3, "maths": 0.7})
    assert compilations
    compilations.clear()
    bank, *second = use(bank.remove("cooking"), "music", "maths", {"music": -1.0, "history": 2.5})
    assert not compilations
    assert bank.names == ("french", "maths", "music", "history")
    for array in (*first, *second):
        assert np.isfinite(array).all()
    assert not np.allclose(first[0], second[0], atol=1e-2)


@pytest.mark.parametrize("scheme", [s for s in FAMILIES if s.is_linear], ids=str)
def test_a_combination_is_the_sum_of_the_deltas(scheme):
    *_, plan, params = adapted_network(X, module=nn.Dense(6), scheme=scheme)
    bank, base, adapters = make_bank(plan, params)
    # What nobody asked for may be no number.
    spoilt = jax.tree.map(lambda leaf: leaf * jnp.nan, adapters["cooking"])
    bank = bank.remove("cooking").add("spoilt", spoilt, plan)
    weights = {"french": 0.3, "maths": -1.7}
    merged = mora_jax.merge(mora_jax.join(bank.combine(weights), base), plan)["kernel"]
    wanted = base["kernel"]
    for name, weight in weights.items():
        alone = mora_jax.merge(mora_jax.join(adapters[name], base), plan)["kernel"]
        wanted = wanted + weight * (alone - base["kernel"])
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)
    assert_same_bits(bank.select("maths"), adapters["maths"])
    assert_same_bits(bank.select(jnp.array(0)), adapters["french"])


def test_adapters_train_together_in_one_batch(small):
    model, _, bank, base, _ = small
    ids, wanted = bank.adapter_ids(["french", "french", "maths", "maths", None]), jnp.arange(5) / 2
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            variables = {"params": mora_jax.join(adapters, base), "mora": {"adapter_ids": ids}}
            each = jnp.square(model.apply(variables, X).mean(-1) - wanted)
            return each.sum(), each

        gradients, each = jax.grad(loss, has_aux=True)(adapters)
        updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, each

    adapters, state, losses = bank.adapters, optimizer.init(bank.adapters), []
    for _ in range(20):
        adapters, state, each = step(adapters, state)
        losses.append(each)
    assert losses[-1][:4].sum() < 0.5 * losses[0][:4].sum()
    assert losses[-1][4] == losses[0][4]
    trained = dataclasses.replace(bank, adapters=adapters)
    assert_same_bits(trained.select("cooking"), bank.select("cooking"))
    for name in ("french", "maths"):
        after, before = (b.select(name)["head"]["mora"]["matrix_sharing"] for b in (trained, bank))
        assert (after != before).all()


def test_errors_of_a_bank_say_what_is_wrong(small):
    _, plan, bank, base, adapters = small
    with pytest.raises(KeyError, match=r"no adapter 'dutch'.*'cooking', 'french', 'maths'"):
        bank.adapter_ids(["dutch"])
    with pytest.raises(IndexError, match="no adapter 5 in a bank of 5"):
        bank.select(5)
    with pytest.raises(ValueError, match="'maths' already"):
        bank.add("maths", adapters["maths"], plan)
    full = dataclasses.replace(bank, slots=tuple("abcde"))
    with pytest.raises(ValueError, match="full: its capacity is 5"):
        full.add("dutch", adapters["maths"], plan)
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), adapters["maths"])
    with pytest.raises(TypeError, match=r"of 'dutch' is bfloat16, and the bank holds float32"):
        bank.add("dutch", half, plan)
    config = mora_jax.MoRAConfig(rank=1, scheme="truncation", targets="head")
    other = mora_jax.plan(mora_jax.adapt(Small(), config), X)
    lines = (
        r"'dutch' has another plan than the bank:\n.*'embed' is adapted in the bank alone\n"
        r".*'head' has scheme Truncation\(\), in the bank Sharing\(\)\n"
        r".*'head' has size 5, in the bank 7$"
    )
    with pytest.raises(ValueError, match=lines):
        bank.add("dutch", mora_jax.attach(other, base), other)
    *_, trains, with_bias = adapted_network(X, module=nn.Dense(6), also_train="bias")
    with pytest.raises(ValueError, match=r"trains 'bias' in full \(also_train\)"):
        mora_jax.stack_adapters({"french": (with_bias, trains)})
    key = jax.random.key(0)
    *_, low, thin = adapted_network(X, module=nn.Dense(6), scheme="low_rank", key=key)
    with pytest.raises(ValueError, match="not combined: LowRank's"):
        mora_jax.stack_adapters({"french": (thin, low)}).combine({"french": 1.0})
