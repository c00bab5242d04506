"""Adapters by example: a mixed batch is what its examples are alone, in every kind of model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax
from helpers.arrays import assert_same_bits, perturb, random_adapter
from helpers.banks import WORDS, make_bank
from helpers.models import Small, adapted_network
from helpers.schemes import FAMILIES
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
CASES += [(mora_jax.Rotation(wrap=True), "many rows"), (FAMILIES[0], "experts")]


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


@pytest.mark.parametrize("dtype", ["int64", "uint64", "uint32"])
def test_ids_beyond_32_bits_are_no_other_adapters(dtype, float64):
    x, kernel = jnp.ones((4, 6), "float32"), jnp.ones((6, 4), "float32")
    bank, dims = {"matrix": jnp.ones((2, 3, 3), "float32")}, (((1,), (0,)), ((), ()))
    beyond = 2**32 - 1 if dtype == "uint32" else 2**32 + 1
    ids = np.array([1, 2**31 - 1, beyond, np.iinfo(dtype).max], dtype)
    run = lambda ids: mora_jax.mora_dot_general(x, kernel, dims, bank, FAMILIES[0], adapter_ids=ids)
    for y in (run(ids), jax.jit(run)(ids)):
        np.testing.assert_array_equal(jnp.isfinite(y).all(1), [True, False, False, False])
    with jax.enable_x64(False):
        y = run(ids)  # NumPy's, which JAX would wrap around
    np.testing.assert_array_equal(jnp.isfinite(y).all(1), [True, False, False, False])


def check_mixed(bank, base, adapters, inputs, run, single):
    """A mixed batch is the single runs; `run` takes parameters and ids, `single` parameters."""
    names = [None if i < 0 else WORDS[i] for i in IDS]
    ids = bank.adapter_ids(names)
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


def test_a_batch_may_be_empty():
    bank, none = random_adapter(10, 12, 2, FAMILIES[2], batch=(3,)), jnp.zeros(0, jnp.int32)

    def run(bank):
        dims = (((2,), (0,)), ((), ()))
        x, kernel = jnp.ones((0, 4, 10)), jnp.ones((10, 12))
        return mora_jax.mora_dot_general(x, kernel, dims, bank, FAMILIES[2], adapter_ids=none)

    y, transpose = jax.vjp(run, bank)
    assert y.shape == (0, 4, 12)
    assert_same_bits(*transpose(y), jax.tree.map(jnp.zeros_like, bank))
    model = mora_jax.adapt(Model(nnx.Rngs(0)), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    nnx.update(model, make_bank(mora_jax.plan(model), nnx.state(model))[0].adapters)
    mora_nnx.set_adapter_ids(model, none)
    assert model(jnp.ones((0, 4, 10))).shape == (0, 4, 8)


def test_linen_with_stacked_layers_and_attention(examples):
    *_, model, plan, params = adapted_network(examples, scheme="sharing")

    def run(params, ids, x):
        return model.apply({"params": params, "mora": {"adapter_ids": ids}}, x)

    def single(params, x):
        return model.apply({"params": params}, x)

    bank, base, adapters = make_bank(plan, params, capacity=4)
    assert bank.adapters["layers"]["up"]["mora"]["matrix_sharing"].shape == (3, 4 * 9, 9)
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
    config = mora_jax.MoRAConfig(rank=1, scheme=mora_jax.Rotation(wrap=True), exclude="head")
    forward = mora_jax.adapt(function, config)
    plan = mora_jax.plan(forward, base, examples)
    assert plan["stack/down"].kernel_axes.batch == (0, 1)
    bank, base, adapters = make_bank(plan, mora_jax.attach(plan, base))
    run = lambda params, ids, x: forward(params, x, mora_adapter_ids=ids)
    check_mixed(bank, base, adapters, examples, run, forward)


def test_errors_of_a_mixed_batch_say_what_is_wrong():
    x = jnp.ones((5, 10))
    *_, model, plan, params = adapted_network(x, module=Small(), scheme="sharing")
    bank, base, _ = make_bank(plan, params)

    def run(x, ids, model=model, bank=bank, base=base):
        variables = {"params": mora_jax.join(bank.adapters, base), "mora": {"adapter_ids": ids}}
        return model.apply(variables, x)

    with pytest.raises(ValueError, match=r"each of 2 examples.* 'embed' have shape \(5, 10\)"):
        run(x, jnp.zeros(2, jnp.int32))
    with pytest.raises(TypeError, match="must be an array of integers, got float32"):
        run(x, jnp.zeros(5))
    with pytest.raises(ValueError, match=r"one axis, the examples', got \(5, 1\)"):
        run(x, jnp.zeros((5, 1), jnp.int32))
    words = jnp.zeros((5, 2), jnp.int32)
    *_, embed, plan, params = adapted_network(words, module=nn.Embed(11, 8), targets=".*", rank=1)
    bank, base, _ = make_bank(plan, params)
    with pytest.raises(ValueError, match=r"layer '' enters what is no product over its inputs"):
        run(words, jnp.zeros(5, jnp.int32), embed, bank, base)
