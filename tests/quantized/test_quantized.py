"""Adapters on a quantised base: the products, their gradients, training, and what a merge loses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import linen as nn
from flax import nnx

import mora_jax
from helpers.arrays import assert_same_bits, perturb
from helpers.models import adapted_network
from mora_jax import checkpoint, quantized
from mora_jax.quantized._kernels import QuantizedView

CONFIG = {"rank": 2, "placement": "activation", "scheme": "sharing"}
TILE = {"int8": None, "int4": 8, "nf4": 8}

#: Appendix E of the QLoRA paper, arXiv 2305.14314, and the integers of the others.
LEVELS = {
    "nf4": np.asarray([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ], np.float32),
    "int8": np.arange(-128, 128, dtype=np.float32),
}  # fmt: skip
BOUNDS = {"nf4": np.float32(1), "int8": np.float32(127.5)}


class Layers(nn.Module):
    """Stacked layers within a scan and a remat, and a kernel of three axes."""

    @nn.compact
    def __call__(self, x):
        def body(layer, x):
            return x + nn.tanh(layer(x)), None

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(nn.remat(body), length=3, **axes)(nn.Dense(16, name="layers"), x)
        return nn.DenseGeneral((2, 12), name="head")(x)


def linen_model(x):
    base, _, model, plan, params = adapted_network(x, module=Layers(), **CONFIG)

    def run(module):
        return lambda params, x: module.apply({"params": params}, x)

    return run(base), run(model), plan, params


def function_model(x):
    """A kernel that is cast, and one that is transposed."""

    def base(params, x):
        x = jnp.tanh(x.astype(jnp.bfloat16) @ params["in"]["weight"].astype(jnp.bfloat16))
        return jnp.einsum("btf,of->bto", x.astype(jnp.float32), params["out"]["weight"])

    keys = jax.random.split(jax.random.key(0))
    shapes = {"in": (16, 24), "out": (8, 24)}
    params = {
        name: {"weight": jax.random.normal(key, shape) / 4}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    forward = mora_jax.adapt(base, mora_jax.MoRAConfig(**CONFIG))
    plan = mora_jax.plan(forward, params, x)
    return base, forward, plan, mora_jax.attach(plan, params)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.out = nnx.Einsum("btf,fo->bto", (16, 24), rngs=rngs)
        self.down = nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.out(self.up(x).reshape(x.shape))))


def nnx_model(x):
    del x

    def run(module):
        graph, _, rest = nnx.split(module, nnx.Param, ...)
        return lambda params, x: nnx.merge(graph, params, rest)(x)

    base = Model(nnx.Rngs(0))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(**CONFIG))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return run(base), run(model), mora_jax.plan(model), params


@pytest.fixture
def inputs():
    return jax.random.normal(jax.random.key(1), (2, 5, 16))


@pytest.mark.parametrize(
    ("make", "qtype"), [(linen_model, "nf4"), (function_model, "int8"), (nnx_model, "nf4")]
)
def test_products_and_gradients_are_those_of_the_dequantised_model(make, qtype, inputs, optimized):
    base, forward, plan, params = make(inputs)
    params = quantized.quantize(params, plan, qtype, tile_size=TILE[qtype])
    floating = quantized.dequantize(params)
    within = quantized.dequantize_within(forward)
    trainable, frozen = mora_jax.split(params, plan)
    # New adapters change no bit of what the quantised base gives.
    alone = jax.jit(quantized.dequantize_within(base))(frozen, inputs)
    assert_same_bits(jax.jit(within)(params, inputs), alone)
    assert_same_bits(jax.jit(base)(mora_jax.merge(floating, plan), inputs), alone)

    def gradient(forward, frozen):
        def loss(trainable):
            return jnp.square(forward(mora_jax.join(trainable, frozen), inputs)).sum()

        return jax.jit(jax.grad(loss))(perturb(trainable))

    got = gradient(within, frozen)
    wanted = gradient(forward, mora_jax.split(floating, plan)[1])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("inside", [lambda f: f, jax.jit, jax.checkpoint, jax.grad, jax.vmap])
def test_adapted_products_are_known_by_their_mark(inside, monkeypatch):
    """Without it the whole kernel would be dequantised, and kept for the gradient."""
    _, run, plan, params = linen_model(x := jnp.ones((1, 5, 16)))
    params = quantized.quantize(params, plan, "int8")
    products, product = [], QuantizedView.product

    def counted(view, *args, **params):
        products.append(view.shape)
        return product(view, *args, **params)

    def forward(params, x):
        if inside is jax.vmap:
            return jax.vmap(lambda x: run(params, x))(x)
        if inside is jax.grad:  # by the inputs, so that the base's products are differentiated
            return jax.grad(lambda x: run(params, x).sum())(x)
        return inside(lambda x: run(params, x))(x)

    monkeypatch.setattr(QuantizedView, "product", counted)
    jax.make_jaxpr(quantized.dequantize_within(forward))(params, x)
    assert {(16, 16), (16, 2, 12)} <= {*products}


# qwix asks Flax for a name that Flax has deprecated.
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_the_base_is_as_qwix_quantises_and_runs_it(qtype, optimized):
    x = jax.random.normal(jax.random.key(1), (5, 24))
    _, pretrained, model, plan, params = adapted_network(x, module=nn.Dense(12), **CONFIG)
    params = quantized.quantize(params, plan, qtype, tile_size=TILE[qtype])
    rule = qwix.QuantizationRule(weight_qtype=qtype, tile_size=TILE[qtype])
    theirs = qwix.quantize_model(nn.Dense(12), qwix.PtqProvider([rule]))
    template = jax.eval_shape(theirs.init, jax.random.key(0), x)["params"]
    base = qwix.quantize_params(pretrained, template)
    assert_same_bits(params["kernel"], base["kernel"].array)
    got = jax.jit(quantized.dequantize_within(model.apply))({"params": params}, x)
    assert_same_bits(got, jax.jit(theirs.apply)({"params": base}, x))


def test_training_leaves_the_base_alone_and_adapters_travel(inputs, tmp_path):
    _, forward, plan, params = function_model(inputs)
    params = quantized.quantize(params, plan, "nf4", tile_size=8)
    forward = quantized.dequantize_within(forward)
    trainable, frozen = mora_jax.split(params, plan)
    before = jax.tree.map(jnp.copy, frozen)
    optimizer = mora_jax.freeze_base(optax.adam(1e-2), plan)
    state = optimizer.init(trainable)

    @jax.jit
    def step(trainable, state, frozen):
        def loss(trainable):
            return jnp.square(forward(mora_jax.join(trainable, frozen), inputs) - 1).mean()

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for _ in range(20):
        trainable, state, value = step(trainable, state, frozen)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert_same_bits(frozen, before)
    params = mora_jax.join(trainable, frozen)
    checkpoint.save_adapters(tmp_path / "adapters", params, plan)
    loaded, its_plan = checkpoint.load_adapters(tmp_path / "adapters", frozen)
    assert its_plan == plan
    assert_same_bits(loaded, params)


def test_no_floating_kernel_is_kept_for_the_gradient():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = nn.gelu(nn.Dense(64)(x))
            return x

    x = jnp.ones((2, 64))
    _, _, model, plan, params = adapted_network(x, module=Deep(), **CONFIG)
    trainable, frozen = mora_jax.split(quantized.quantize(params, plan), plan)

    def kept(forward, frozen):
        def outputs(trainable):
            return forward({"params": mora_jax.join(trainable, frozen)}, x)

        leaves = jax.tree.leaves(jax.vjp(outputs, trainable)[1])
        return sum(leaf.shape == (64, 64) and leaf.dtype == jnp.float32 for leaf in leaves)

    assert kept(quantized.dequantize_within(model.apply), frozen) == 0
    assert kept(model.apply, quantized.dequantize(frozen)) == 2  # no gradient of the first inputs


def test_bytes():
    x = jnp.ones((1, 512))
    _, _, _, plan, params = adapted_network(x, module=nn.Dense(512), rank=1, placement="activation")

    def size(params):
        # By the compiler, for arrays do not know that two of their numbers share a byte.
        kernel = jax.jit(lambda kernel: kernel).lower(params["kernel"]).compile()
        return kernel.memory_analysis().argument_size_in_bytes

    assert size(params) == 512 * 512 * 4
    assert size(quantized.quantize(params, plan, "int8")) == 512 * 512 + 512 * 4
    assert size(quantized.quantize(params, plan, "nf4")) == 512 * 512 / 2 + 512 * 8 * 4


def merge_in_numpy(kernel, delta, tile, qtype):
    """The kernel before and after, and which numbers lie halfway between two levels.

    Each tile of a column has the scale that it had, or a new one if that comes closer.
    """
    levels, scale = LEVELS[qtype], np.asarray(kernel.scale)
    qvalue = np.asarray(kernel.qvalue).astype(int)
    values = levels[qvalue] if qtype == "nf4" else np.float32(qvalue)
    before, after, halfway = np.zeros((3, *delta.shape), np.float32)
    for row in range(0, len(delta), tile):
        for column in range(delta.shape[1]):
            here = slice(row, row + tile), column
            before[here] = values[here] * scale[row // tile, column]
            total = before[here] + delta[here]
            tries = []
            for each in (scale[row // tile, column], np.abs(total).max() / BOUNDS[qtype]):
                distance = np.abs(total[:, None] / each - levels)
                first, second = np.sort(distance)[:, :2].T
                value = levels[distance.argmin(1)] * each
                tries.append((np.square(value - total).sum(), value, second - first < 1e-3))
            _, after[here], halfway[here] = min(tries, key=lambda one: one[0])
    return before, after, halfway.astype(bool)


@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_a_merge_says_what_it_loses(qtype):
    _, _, _, plan, params = adapted_network(jnp.ones((1, 24)), module=nn.Dense(16), **CONFIG)
    params = quantized.quantize(params, plan, qtype, tile_size=TILE[qtype])
    merged, losses = quantized.merge(params, plan)
    assert_same_bits(merged["kernel"], params["kernel"])
    assert losses == {"": (0, 1, 0)}
    kept, norm = {}, np.linalg.norm
    for size in (1e-6, 2e-3, 0.05):
        adapter = perturb(params["mora"], scale=size)
        merged, losses = quantized.merge(params | {"mora": adapter}, plan)
        delta, after = np.asarray(plan[""].delta(adapter)), quantized.dequantize(merged)["kernel"]
        before, want, halfway = merge_in_numpy(params["kernel"], delta, TILE[qtype] or 24, qtype)
        assert halfway.mean() < 0.05
        np.testing.assert_allclose(after[~halfway], want[~halfway], atol=1e-6)
        change = after - before
        kept[size] = np.vdot(change, delta) / np.vdot(delta, delta)
        noise = norm(change - kept[size] * delta) / norm(delta)
        error = norm(change - delta) / norm(before + delta)
        np.testing.assert_allclose(losses[""], (error, kept[size], noise), rtol=1e-3, atol=1e-3)
    assert kept[1e-6] < 0.2
    assert kept[0.05] > 0.9


def test_remora_explains_itself(inputs):
    base = nn.Dense(24)
    _, _, model, plan, params = adapted_network(inputs, module=base, **CONFIG)
    params |= {"mora": perturb(params["mora"], scale=1e-4)}
    params = quantized.quantize(params, plan, "nf4", tile_size=8)
    state = mora_jax.freeze_base(optax.adam(1e-3), plan).init(params)
    lost = r"quantised \(nf4\).* Of the delta of '.*' \d\.\d% would be kept.*dequantize\(params\)"
    with pytest.raises(ValueError, match=lost):
        mora_jax.merge_and_reset(params, state, plan)
    with pytest.raises(ValueError, match="quantised"):
        mora_jax.merge(params, plan)
    with pytest.raises(ValueError, match="quantised"):
        jax.eval_shape(lambda params: mora_jax.merge(params, plan), params)
    # Nothing was given up, and the way out that it names is one.
    want = quantized.dequantize_within(model.apply)({"params": params}, inputs)
    params, _, plan, _ = mora_jax.merge_and_reset(quantized.dequantize(params), state, plan)
    got = base.apply({"params": mora_jax.merge(params, plan)}, inputs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_refusals():
    x = jnp.ones((1, 24))
    layer = nn.Dense(16)
    _, _, model, plan, params = adapted_network(x, module=layer, placement="activation")
    with pytest.raises(ValueError, match=r"tiles of 64 do not fit.*tile_size=8 would"):
        quantized.quantize(params, plan)
    with pytest.raises(ValueError, match="'int3'; there are 'int8', 'int4', 'nf4'"):
        quantized.quantize(params, plan, "int3")
    with pytest.raises(TypeError, match=r"'kernel' is not quantised; mora_jax\.merge"):
        quantized.merge(params, plan)
    done = quantized.quantize(params, plan, "int4", tile_size=8)
    boxed = {**params, "kernel": nn.Partitioned(params["kernel"], (None, None))}
    with pytest.raises(TypeError, match="'kernel' are in boxes; take them out first"):
        quantized.quantize(boxed, plan)
    with pytest.raises(TypeError, match="quantised already: 'kernel'"):
        quantized.quantize(done, plan, "int8")
    for kernel, why in (
        (qwix.quantize(params["kernel"], "int8", calibration_method="minmax"), "zero points"),
        (qwix.quantize(params["kernel"], "float8_e4m3fn"), "'float8_e4m3fn'"),
    ):
        with pytest.raises(ValueError, match=why):
            quantized.merge(params | {"kernel": kernel}, plan)
        # They run all the same.
        forward = quantized.dequantize_within(model.apply)
        assert jax.eval_shape(forward, {"params": params | {"kernel": kernel}}, x).shape == (1, 16)
    _, _, _, plan, params = adapted_network(x, module=layer)
    with pytest.raises(ValueError, match=r'MoRAConfig\(placement="activation"\)'):
        quantized.quantize(params, plan)
    options = {"placement": "activation", "also_train": "kernel"}
    _, _, _, plan, params = adapted_network(x, module=layer, **options)
    with pytest.raises(ValueError, match="also_train has 'kernel'"):
        quantized.quantize(params, plan)


def test_a_merge_that_is_not_finite_is_refused():
    config = mora_jax.MoRAConfig(rank=2, scheme="decoupling", placement="activation")
    model = mora_jax.adapt(nn.Dense(4, use_bias=False, param_dtype="float16"), config)
    plan = mora_jax.plan(model, jnp.ones((1, 4)))
    params = mora_jax.attach(plan, {"kernel": jnp.ones((4, 4), "float16")})
    params = quantized.quantize(params, plan, "int8")
    kernel = params["kernel"]
    params["kernel"] = dataclasses.replace(kernel, scale=jnp.full_like(kernel.scale, jnp.inf))
    with pytest.raises(ValueError, match="the base holds numbers that are not finite: 'kernel'"):
        quantized.merge(params, plan)
