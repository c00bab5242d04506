"""DoRA: the paper's equations, every way into a model, what becomes of magnitudes, what is refused.

Merged models are the yardstick: a merge has the paper's kernel, and all else what a merge has.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax
from helpers import reference
from helpers.arrays import assert_same_bits, perturb, random_adapter
from helpers.merged import assert_as_merged
from helpers.models import adapted_network
from helpers.schemes import DESCRIBED
from mora_jax import checkpoint, peft, quantized
from mora_jax import nnx as mora_nnx
from mora_jax._arrays.paths import flatten, unflatten_like
from mora_jax._product.dora import kernel_delta

LOW_RANK = mora_jax.LowRank(alpha=3.0)
SCHEMES = [mora_jax.Sharing("contiguous", "stride"), mora_jax.Rotation(wrap=True), LOW_RANK]
DIMS = (((1,), (0,)), ((), ()))


def drawn(tree):
    """Trained adapters: random numbers in what `attach` made."""
    leaves = {path: leaf for path, leaf in flatten(tree).items() if "mora" in path.split("/")}
    return unflatten_like(flatten(tree) | perturb(leaves), tree)


@pytest.mark.parametrize("placement", ["kernel", "activation"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_papers_equations(float64, scheme, placement):
    rng, (inputs, outputs) = np.random.default_rng(0), (11, 7)
    W, x, dy = (rng.standard_normal(s) for s in ((inputs, outputs), (5, inputs), (5, outputs)))
    adapter = random_adapter(inputs, outputs, 2, scheme, dtype="float64")
    g = 1 + 0.3 * rng.standard_normal(outputs)
    D = reference.adapter_kernel(DESCRIBED[scheme], adapter, inputs, outputs)
    norm = np.sqrt((W**2).sum(0))
    m = g * norm

    def run(adapter, x):
        return mora_jax.mora_dot_general(x, jnp.asarray(W), DIMS, adapter, scheme, frozen=True,
                                         placement=placement)  # fmt: skip

    dora = {**adapter, "magnitude": jnp.asarray(g)[None]}
    y, transpose = jax.vjp(jax.jit(run), dora, jnp.asarray(x))
    dadapter, dx = transpose(jnp.asarray(dy))
    wanted = reference.dora_kernel(W, D, m)
    dm, want_dx, dy_of_delta = reference.dora_grads(W, D, m, x, dy)
    close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    close(y, x @ wanted)
    close(dx, want_dx)
    close(dadapter["magnitude"][0], dm * norm)  # of g = m / ||W||
    of_adapter = reference.adapter_gradients(DESCRIBED[scheme], adapter, x, dy_of_delta)
    for name, gradient in of_adapter.items():
        close(dadapter[name], gradient)
    axes = mora_jax.KernelAxes((0,), (1,))
    close(W + kernel_delta(jnp.asarray(W), dora, axes, scheme), wanted)


class Stack(nn.Module):
    """Layers in a scan and a remat, and a kernel of three axes."""

    @nn.compact
    def __call__(self, x):
        body = lambda layer, x: (x + jnp.tanh(layer(x)), None)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(nn.remat(body), length=3, **axes)(nn.Dense(10, name="layers"), x)
        return nn.DenseGeneral((2, 3), name="head")(x)


def test_a_new_adapter_changes_no_bit(inputs, optimized):
    base, pretrained, model, plan, params = adapted_network(
        inputs, dora=True, scheme="sharing", module=Stack()
    )
    shapes = {path: leaf.shape for path, leaf in flatten(params).items() if "magnitude" in path}
    assert shapes == {"layers/mora/magnitude": (3, 1, 10), "head/mora/magnitude": (1, 6)}
    assert "Sharing(), DoRA" in str(plan)
    run = jax.jit(lambda params, model: model.apply({"params": params}, inputs), static_argnums=1)
    assert_same_bits(run(params, model), run(pretrained, base))
    assert_same_bits(mora_jax.merge(params, plan), pretrained)
    assert mora_jax.Plan.from_json(plan.to_json()) == plan


def test_linen_stacks(inputs):
    base, _, model, plan, params = adapted_network(
        inputs, dora=True, scheme="sharing", module=Stack()
    )
    of = lambda module: lambda params: module.apply({"params": params}, inputs)
    assert_as_merged(of(model), of(base), params, plan)


def function(params, ids, sizes):
    """A lookup and its transposed use, a stack in a scan, experts."""
    x = params["embed"]["w"][ids]
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"]["w"])
    experts = jax.lax.ragged_dot(x, params["experts"]["w"], sizes)
    return {"experts": experts, "logits": x @ params["embed"]["w"].T}


def test_functions():
    shapes = {"embed": (9, 8), "stack": (2, 8, 8), "experts": (3, 8, 5)}
    params = {k: {"w": jax.random.normal(jax.random.key(0), s)} for k, s in shapes.items()}
    inputs = jnp.array([1, 5, 2, 8, 0]), jnp.array([2, 0, 2])
    forward = mora_jax.adapt(function, mora_jax.MoRAConfig(rank=1, scheme="sharing", dora=True))
    plan = mora_jax.plan(forward, params, *inputs)
    assert len(plan) == 3
    of = lambda run: lambda params: run(params, *inputs)
    assert_as_merged(of(forward), of(function), mora_jax.attach(plan, params), plan)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 6, rngs=rngs)
        self.stack = nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs))(rngs.split(3))

    def __call__(self, x):
        scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(self.up(x), self.stack)


def test_nnx_restarts_in_place():
    base, x = Layers(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (4, 6))
    run = nnx.jit(lambda model: model(x))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing", dora=True))
    state = nnx.state(model, mora_nnx.MoRAParam)
    assert nnx.to_pure_dict(state)["stack"]["mora"]["magnitude"].shape == (3, 1, 6)
    nnx.update(model, perturb(state))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=mora_nnx.MoRAParam)
    y = run(model)
    np.testing.assert_allclose(run(mora_nnx.merge(model)), y, rtol=1e-5, atol=1e-6)
    assert mora_nnx.merge_and_reset(model, optimizer, donate=False).layers == 2
    np.testing.assert_allclose(run(model), y, rtol=1e-5, atol=1e-6)
    assert (model.up.mora.magnitude[...] == 1).all()
    assert not model.up.mora.matrix_sharing_signs_1[...].any()


def test_training_restarts_and_saves(tmp_path):
    x = jax.random.normal(jax.random.key(1), (8, 10))
    base, pretrained, model, plan, params = adapted_network(
        x, dora=True, scheme="sharing", module=nn.Dense(6)
    )
    tx = mora_jax.freeze_base(optax.adam(3e-2), plan)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.square(model.apply({"params": params}, x) - 1).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(10):
        params, state, value = step(params, state)
        losses.append(value)
    assert losses[-1] < 0.7 * losses[0]
    assert 0.05 < np.abs(params["mora"]["magnitude"] - 1).max() < 0.5
    assert_same_bits(params["kernel"], pretrained["kernel"])

    checkpoint.save_adapters(tmp_path / "dora", params, plan)
    loaded, loaded_plan = checkpoint.load_adapters(tmp_path / "dora", pretrained)
    assert loaded_plan == plan
    assert_same_bits(loaded, params)

    result = mora_jax.merge_and_reset(params, state, plan, donate=False)
    assert_same_bits(result.params["mora"], mora_jax.attach(result.plan, pretrained)["mora"])
    merged = {name: leaf for name, leaf in result.params.items() if name != "mora"}
    np.testing.assert_allclose(
        base.apply({"params": merged}, x), model.apply({"params": params}, x), rtol=1e-5, atol=1e-5
    )
    moments = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(result.opt_state)
        if "magnitude" in jax.tree_util.keystr(path)
    ]  # fmt: skip
    assert len(moments) == 2
    assert not any(leaf.any() for leaf in moments)


def test_no_gradient_of_a_kernel_and_no_wide_outputs():
    x, kernel = jnp.ones((64, 96), jnp.bfloat16), jnp.ones((96, 80), jnp.bfloat16)
    adapter = {"matrix": jnp.zeros((12, 12)), "magnitude": jnp.ones((1, 80))}

    def run(adapter, x):
        return mora_jax.mora_dot_general(
            x, kernel, DIMS, adapter, mora_jax.Sharing(), placement="kernel", frozen=True
        )

    def flops(adapter):
        backward = jax.grad(lambda *args: jnp.square(run(*args)).sum(), (0, 1))
        return jax.jit(backward).lower(adapter, x).compile().cost_analysis()["flops"]

    # Of the three products that training in full has, two and what passes over arrays.
    assert flops(adapter) < flops({"matrix": adapter["matrix"]}) + 0.2 * 2 * 64 * 96 * 80
    kept = jax.tree.leaves(jax.vjp(run, adapter, x)[1])
    large = [leaf.dtype for leaf in kept if getattr(leaf, "size", 0) == 64 * 80]
    assert large == [jnp.bfloat16]


def test_columns_of_zeros_stay():
    kernel = jnp.ones((4, 4)).at[:, 2].set(0)
    adapter = {"matrix": jnp.ones((2, 2)), "magnitude": jnp.ones((1, 4))}

    @jax.jit
    def run(adapter):
        y = mora_jax.mora_dot_general(jnp.ones((2, 4)), kernel, DIMS, adapter, mora_jax.Sharing())
        return jnp.square(y).sum(), y

    (_, y), gradients = jax.value_and_grad(run, has_aux=True)(adapter)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(y[0], [4, 4, 0, 4], rtol=1e-6)  # a delta along the columns
    delta = kernel_delta(kernel, adapter, mora_jax.KernelAxes((0,), (1,)), mora_jax.Sharing())
    assert not delta[:, 2].any()


@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_a_magnitude_of_zero_still_has_a_gradient(placement):
    adapter = {"matrix": jnp.ones((2, 2)), "magnitude": jnp.ones((1, 4)).at[0, 1].set(0)}

    @jax.jit
    def run(adapter, x):
        y = mora_jax.mora_dot_general(
            x, jnp.ones((4, 4)), DIMS, adapter, mora_jax.Sharing(), placement=placement
        )
        return y.sum(), y

    (_, y), gradients = jax.value_and_grad(run, (0, 1), has_aux=True)(adapter, jnp.ones((2, 4)))
    np.testing.assert_allclose(y[0], [4, 0, 4, 4], rtol=1e-6, atol=1e-20)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(gradients[0]["magnitude"], np.full((1, 4), 8), rtol=1e-6)


@pytest.mark.parametrize("keep_sums", [False, True])
def test_second_derivatives_beside_a_frozen_kernel(float64, keep_sums):
    kernel, x = (jax.random.normal(key, (4, 4)) for key in jax.random.split(jax.random.key(0)))
    adapter = {"matrix": jnp.full((2, 2), 0.1), "magnitude": jnp.array([[1.1, 0.9, 1, 1.2]])}

    def second(placement):
        def loss(adapter):
            y = mora_jax.mora_dot_general(
                x, kernel, DIMS, adapter, mora_jax.Sharing(),
                placement=placement, frozen=True, keep_sums=keep_sums,
            )  # fmt: skip
            return (y**4).sum()

        along = lambda adapter: optax.tree.vdot(jax.grad(loss)(adapter), adapter)
        return jax.grad(along)(adapter)

    found, wanted = second("kernel"), second("activation")
    for name in adapter:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9)


def test_a_quantised_base():
    config = {"scheme": "sharing", "placement": "activation", "dora": True}
    x = jax.random.normal(jax.random.key(1), (2, 8))
    base, _, model, plan, params = adapted_network(x, module=nn.Dense(6), **config)
    params = quantized.quantize(drawn(params), plan, "int8")
    y = jax.jit(quantized.dequantize_within(model.apply))({"params": params}, x)
    floating = quantized.dequantize(params)
    wanted = base.apply({"params": mora_jax.merge(floating, plan)}, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    merged, losses = quantized.merge(params, plan)
    assert losses[""].kept > 0.95
    after = base.apply({"params": quantized.dequantize(merged)}, x)
    assert np.abs(after - wanted).max() < 0.1 * np.abs(y - base.apply(
        {"params": {k: v for k, v in floating.items() if k != "mora"}}, x)).max()  # fmt: skip


def test_what_is_refused(tmp_path):
    scheme, x = mora_jax.Sharing(), jnp.ones((2, 3))
    model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme=scheme, dora=True))
    plan = mora_jax.plan(model, x)
    params = model.init(jax.random.key(0), x)["params"]
    bank = mora_jax.stack_adapters({"one": (params, plan), "two": (drawn(params), plan)})
    base = {name: leaf for name, leaf in params.items() if name != "mora"}
    full = mora_jax.join(bank.select("two"), base)
    assert_same_bits(full, drawn(params))
    plain = mora_jax.rename_leaves(params, plan.plain_paths())["mora"]
    refusals = {
        "not unmerged: DoRA": lambda: mora_jax.unmerge(mora_jax.merge(params, plan), params, plan),
        "not projected: DoRA": lambda: mora_jax.project_to_lora(params, plan, 1),
        "not combined: DoRA": lambda: bank.combine({"one": 0.5, "two": 0.5}),
        "adapter_ids: DoRA": lambda: model.apply(
            {
                "params": mora_jax.join(bank.adapters, base),
                "mora": {"adapter_ids": bank.adapter_ids(["one", "two"])},
            },
            x,
        ),
        "not saved: DoRA": lambda: peft.save_adapters(
            tmp_path / "peft", params, plan, names=[peft.KernelName("kernel", "dense")]
        ),
        "not decomposed: DoRA": lambda: mora_jax.spectrum(params, plan),
        "dora must be a bool": lambda: mora_jax.MoRAConfig(dora=1),  # pyright: ignore
        "magnitude must have shape (1, 6)": lambda: mora_jax.mora_dot_general(
            x, params["kernel"], DIMS, plain | {"magnitude": jnp.ones((1, 5))}, scheme
        ),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
