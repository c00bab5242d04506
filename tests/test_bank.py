"""Banks of adapters: by name, combined, and by example in one batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax
from conftest import FAMILIES, Small, adapted_network, assert_same_bits, perturb, random_adapter
from mora_jax import nnx as mora_nnx

IDS = np.array([2, 0, -1, 2, 1], np.int32)
#: (inputs of 5 examples, kernel, dimension numbers, batch axes of the kernel)
LAYOUTS = {
    "few rows": ((5, 2, 50), (50, 33), (((2,), (0,)), ((), ())), ()),
    "many rows": ((5, 20, 50), (50, 33), (((2,), (0,)), ((), ())), ()),
    "experts": ((5, 4, 3, 50), (4, 50, 33), (((3,), (1,)), ((1,), (0,))), (4,)),
}
CASES = [(scheme, "few rows") for scheme in FAMILIES[1:]]
#: With more rows than features in a block, a rotation turns its matrices.
CASES += [(mora_jax.Rotation(cycle=True), "many rows"), (FAMILIES[0], "experts")]
WORDS = ["french", "maths", "cooking"]


def assert_close(found, wanted):
    """Equal to 1e-5 of the largest number of each array."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("scheme", "layout"), CASES, ids=str)
def test_a_mixed_product_is_that_of_single_ones(scheme, layout):
    lhs, rhs, dims, batch = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (lhs, rhs))
    bank = random_adapter(50, 33, 2, scheme, batch=(*batch, 3))
    example = len(batch)  # the examples' axis of the outputs

    def mixed(x, bank):
        return mora_jax.mora_dot_general(x, kernel, dims, bank, scheme, adapter_ids=IDS)

    def single(x, bank):
        leaves = {name: jnp.moveaxis(leaf, example, 0) for name, leaf in bank.items()}
        none = {name: jnp.zeros_like(leaf[:1]) for name, leaf in leaves.items()}
        leaves = jax.tree.map(lambda *parts: jnp.concatenate(parts), leaves, none)
        run = lambda one: mora_jax.mora_dot_general(x, kernel, dims, one, scheme)
        every = jnp.moveaxis(jax.vmap(run)(leaves), example + 1, 1)
        return jnp.moveaxis(every[IDS, np.arange(5)], 0, example)

    def value_and_gradient(run):
        y, transpose = jax.vjp(run, x, bank)
        return y, transpose(jnp.sin(jnp.arange(y.size)).reshape(y.shape))

    ours, theirs = (jax.jit(value_and_gradient, static_argnums=0)(f) for f in (mixed, single))
    assert_close(ours, theirs)


def test_who_has_none_is_the_base_and_who_is_unknown_is_no_number():
    x, kernel = jnp.ones((4, 6)), jnp.ones((6, 4))
    bank, dims = {"matrix": jnp.ones((2, 3, 3))}, (((1,), (0,)), ((), ()))
    ids = jnp.array([-1, 1, 2, -2])
    y = mora_jax.mora_dot_general(x, kernel, dims, bank, FAMILIES[0], adapter_ids=ids)
    assert_same_bits(y[0], (x @ kernel)[0])
    np.testing.assert_array_equal(jnp.isfinite(y).all(1), [True, True, False, False])
    # Unsigned integers have no -1, and small ones not the number of adapters.
    many = {"matrix": jnp.ones((200, 3, 3))}
    for dtype in (np.uint8, np.int8):
        some = np.array([1, 0, 100, 1], dtype)
        y = mora_jax.mora_dot_general(x, kernel, dims, many, FAMILIES[0], adapter_ids=some)
        np.testing.assert_array_equal(y, jnp.full((4, 4), 12.0))


def make_bank(plan, params, capacity=None):
    """(bank of three adapters, base parameters, the adapters)."""
    trainable, base = mora_jax.split(params, plan)
    adapters = {name: perturb(trainable, seed=i) for i, name in enumerate(WORDS)}
    pairs = {name: (adapter, plan) for name, adapter in adapters.items()}
    return mora_jax.stack_adapters(pairs, capacity=capacity), base, adapters


def check_mixed(bank, base, adapters, inputs, run, single):
    """A mixed batch is the single runs; `run` takes parameters and ids, `single` parameters."""
    names = [None if i < 0 else WORDS[i] for i in IDS]
    ids = bank.ids(names)
    np.testing.assert_array_equal(ids, IDS)
    mixed = jax.jit(run)(mora_jax.join(bank.adapters, base), ids, inputs)
    none = jax.tree.map(jnp.zeros_like, adapters[WORDS[0]])
    every = jax.jit(single)
    for row, (name, found) in enumerate(zip(names, mixed, strict=True)):
        params = mora_jax.join(none if name is None else adapters[name], base)
        np.testing.assert_allclose(found, every(params, inputs)[row], rtol=1e-5, atol=1e-5)
    return mixed


@pytest.fixture
def examples():
    return jax.random.normal(jax.random.key(1), (5, 4, 10))


X = jnp.ones((5, 10))


@pytest.fixture(scope="module")
def small():
    """(model, plan, bank with room for two more, base parameters, the adapters)."""
    *_, model, plan, params = adapted_network(X, module=Small(), scheme="sharing")
    return model, plan, *make_bank(plan, params, capacity=5)


def test_linen_with_stacked_layers_and_attention(examples):
    *_, model, plan, params = adapted_network(examples, scheme="sharing")

    def run(params, ids, x):
        return model.apply({"params": params, "mora": {"adapter_ids": ids}}, x)

    def single(params, x):
        return model.apply({"params": params}, x)

    bank, base, adapters = make_bank(plan, params, capacity=4)
    assert bank.adapters["layers"]["up"]["mora"]["matrix"].shape == (3, 4 * 9, 9)
    check_mixed(bank, base, adapters, examples, run, single)
    with pytest.raises(ValueError, match=r"layer 'embed' hold a bank of 4 adapters.*select"):
        single(mora_jax.join(bank.adapters, base), examples)


class Jitted(nn.Module):
    """A trace cache of its own, and a layer that runs as a function."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((6, 8), "bd,df->bf", name="einsum")(nn.Dense(6, name="dense")(x))


def test_linen_ids_are_no_constants_of_a_models_own_jit():
    x = jnp.ones((3, 10))
    *_, model, plan, params = adapted_network(x, module=Jitted(), scheme="sharing")
    bank, base, _ = make_bank(plan, params)
    params = mora_jax.join(bank.adapters, base)

    def run(ids, entry=None):
        variables = {"params": params, "mora": {"adapter_ids": ids}}
        return model.apply(variables, x, method=entry)

    first, second = jnp.array([0, 1, 2]), jnp.array([2, 1, 0])
    wanted = jax.jit(run)(first)
    again = jax.jit(lambda ids: run(ids))(second)
    eager = run(first, lambda module, x: module(x)), run(second, lambda module, x: module(x))[::-1]
    for found in (again[::-1], *eager):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(wanted[0], wanted[1], atol=1e-2)


class Model(nnx.Module):
    """Hooks, a layer that runs as a function, stacked layers."""

    def __init__(self, rngs):
        self.up = nnx.Linear(10, 12, rngs=rngs)
        self.einsum = nnx.Einsum("btf,fd->btd", (12, 8), (8,), rngs=rngs)
        self.stack = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(rngs.split(4))

    def __call__(self, x, in_axes=0):
        x = nnx.remat(lambda layer, x: layer(x))(self.einsum, self.up(x))
        step = lambda x, layer: x + jnp.tanh(layer(x))
        return nnx.scan(step, in_axes=(nnx.Carry, in_axes), out_axes=nnx.Carry)(x, self.stack)


def test_nnx(examples):
    model = mora_jax.adapt(Model(nnx.Rngs(0)), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    plan = mora_jax.plan(model)
    bank, base, adapters = make_bank(plan, nnx.state(model))
    graph = nnx.graphdef(model)

    def run(params, ids, x):
        mixed = nnx.merge(graph, params)
        mora_nnx.set_adapter_ids(mixed, ids)
        return mixed(x)

    mixed = check_mixed(
        bank, base, adapters, examples, run, lambda params, x: nnx.merge(graph, params)(x)
    )
    # In place, by another spelling of the scan; other ids compile nothing again.
    nnx.update(model, bank.adapters)
    with pytest.raises(ValueError, match=r"hold a bank of 3 adapters"):
        model(examples)
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    step = nnx.jit(lambda model, x: model(x, axes))
    order = np.array([4, 3, 2, 1, 0])
    for rows in (slice(None), order):
        mora_nnx.set_adapter_ids(model, jnp.asarray(IDS[rows]))
        np.testing.assert_allclose(step(model, examples[rows]), mixed[rows], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'up' have shape \(4, 4, 10\), the first axis 4 elem"):
        model(examples[:4])
    mora_nnx.set_adapter_ids(model, None)
    nnx.update(model, bank.select("maths"))
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(
        mora_jax.join(bank.select(0), base)
    )


def function(params, x):
    """Stacked layers with experts second in their inputs, and a kernel of two products."""

    def layer(x, w):
        y = jnp.einsum("btd,edf->betf", x, w["up"])
        return x + jnp.einsum("betf,efd->betd", jnp.tanh(y), w["down"]).sum(1), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["stack"])
    return (x @ params["head"]["kernel"]) @ params["head"]["kernel"].T


def test_functions(examples):
    zeros = {"up": jnp.zeros((3, 2, 10, 6)), "down": jnp.zeros((3, 2, 6, 10))}
    base = perturb({"stack": zeros, "head": {"kernel": jnp.zeros((10, 10))}}, scale=0.3)
    config = mora_jax.MoRAConfig(rank=1, scheme=mora_jax.Rotation(cycle=True), exclude="head")
    forward = mora_jax.adapt(function, config)
    plan = mora_jax.plan(forward, base, examples)
    assert plan["stack/down"].kernel_axes.batch == (0, 1)
    bank, base, adapters = make_bank(plan, mora_jax.attach(plan, base))
    run = lambda params, ids, x: forward(params, x, mora_adapter_ids=ids)
    check_mixed(bank, base, adapters, examples, run, forward)


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
        ids = bank.ids([name, other, None, *WORDS[:2]])
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


@pytest.mark.parametrize("scheme", [FAMILIES[1], FAMILIES[2]], ids=str)
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
    ids, wanted = bank.ids(["french", "french", "maths", "maths", None]), jnp.arange(5) / 2
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
        after, before = (b.select(name)["head"]["mora"]["matrix"] for b in (trained, bank))
        assert (after != before).all()


def test_errors_of_a_bank_say_what_is_wrong(small):
    _, plan, bank, base, adapters = small
    with pytest.raises(KeyError, match=r"no adapter 'dutch'.*'cooking', 'french', 'maths'"):
        bank.ids(["dutch"])
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


def test_errors_of_a_mixed_batch_say_what_is_wrong(small):
    model, _, bank, base, _ = small

    def run(x, ids, model=model, bank=bank, base=base):
        variables = {"params": mora_jax.join(bank.adapters, base), "mora": {"adapter_ids": ids}}
        return model.apply(variables, x)

    with pytest.raises(ValueError, match=r"each of 2 examples.* 'embed' have shape \(5, 10\)"):
        run(X, jnp.zeros(2, jnp.int32))
    with pytest.raises(TypeError, match="must be an array of integers, got float32"):
        run(X, jnp.zeros(5))
    with pytest.raises(ValueError, match=r"one axis, the examples', got \(5, 1\)"):
        run(X, jnp.zeros((5, 1), jnp.int32))
    words = jnp.zeros((5, 2), jnp.int32)
    *_, embed, plan, params = adapted_network(words, module=nn.Embed(11, 8), targets=".*", rank=1)
    bank, base, _ = make_bank(plan, params)
    with pytest.raises(ValueError, match=r"layer '' enters what is no product over its inputs"):
        run(words, jnp.zeros(5, jnp.int32), embed, bank, base)
