"""Kernels that a model moves, copies or scales before their product, on the function path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import mora_jax
from helpers.merged import assert_as_merged
from mora_jax._product.axes import KernelAxes


def draw(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)


X = draw(3, 16)
LAST = (((1,), (0,)), ((), ()))

#: Name -> (what is done with the kernel, its shape, its axes).
FOLLOWED = {
    "outputs split": (
        lambda w: lax.dot_general(X, w.reshape(16, 2, 4), LAST), (16, 8), KernelAxes((0,), (1,)),
    ),
    "inputs split": (
        lambda w: jnp.einsum("bhk,hko->bo", X.reshape(3, 4, 4), w.reshape(4, 4, 8)),
        (16, 8), KernelAxes((0,), (1,)),
    ),
    "inputs joined": (
        lambda w: X @ w.reshape(16, 8), (4, 4, 8), KernelAxes((0, 1), (2,)),
    ),
    "stacked, split": (
        lambda w: jnp.einsum("efbi,efio->efbo", jnp.stack([X] * 6).reshape(2, 3, 3, 16),
                             w.reshape(2, 3, 16, 8)),
        (6, 16, 8), KernelAxes((1,), (2,), (0,)),
    ),
    "stacked, joined": (
        lambda w: jnp.einsum("ebi,eio->ebo", jnp.stack([X] * 6), w.reshape(6, 16, 8)),
        (2, 3, 16, 8), KernelAxes((2,), (3,), (0, 1)),
    ),
    "joined within a scan": (
        lambda w: lax.scan(lambda x, w: (jnp.tanh(x @ w.reshape(16, 16)), None), X, w)[0],
        (3, 4, 4, 16), KernelAxes((1, 2), (3,), (0,)),
    ),
    "an axis added": (
        lambda w: jnp.einsum("bi,iuo->buo", X, w[:, None]), (16, 8), KernelAxes((0,), (1,)),
    ),
    "repeated": (
        lambda w: jnp.einsum("ebi,eio->ebo", jnp.stack([X, X]), jnp.broadcast_to(w, (2, 16, 8))),
        (16, 8), KernelAxes((0,), (1,)),
    ),
    "axes dropped": (
        lambda w: X @ w.squeeze((0, 1)), (1, 1, 16, 8), KernelAxes((0, 1, 2), (3,)),
    ),
    "taken and reshaped": (
        lambda w: X @ w[1:2].reshape(16, 8), (3, 16, 8), KernelAxes((1,), (2,), (0,)),
    ),
    # The order of the adapter's features is the kernel's, not that in which it is seen.
    "outputs in another order": (
        lambda w: lax.dot_general(X, w.transpose(0, 2, 1).reshape(16, 2, 2, 2), LAST),
        (16, 2, 4), KernelAxes((0,), (1, 2)),
    ),
    "copied, named, held": (
        lambda w: X @ lax.optimization_barrier((checkpoint_name(jnp.array(w), "w"), X))[0],
        (16, 8), KernelAxes((0,), (1,)),
    ),
    "scaled": (
        lambda w: X @ (0.5 * (w / 3).reshape(4, 4, 8)).reshape(16, 8),
        (16, 8), KernelAxes((0,), (1,)),
    ),
    "in branches": (
        lambda w: lax.cond(X.sum() > 0, lambda w: X @ w, lambda w: -(X @ w), w),
        (16, 8), KernelAxes((0,), (1,)),
    ),
    "rounded and widened": (
        lambda w: X @ w.astype(jnp.bfloat16).astype(jnp.float32), (16, 8), KernelAxes((0,), (1,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("placement", ["kernel", "activation"])
@pytest.mark.parametrize("case", FOLLOWED)
def test_adapted_kernels_equal_merged_ones(case, placement):
    function, shape, axes = FOLLOWED[case]
    base = lambda params: function(params["w"])
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", placement=placement)
    forward = mora_jax.adapt(base, config)
    params = {"w": draw(*shape)}
    plan = mora_jax.plan(forward, params)
    assert plan[""].kernel_axes == axes
    params = mora_jax.attach(plan, params)
    np.testing.assert_allclose(forward(params), base(params), atol=1e-6)
    assert_as_merged(forward, base, params, plan)


@pytest.mark.parametrize("case", ["scaled", "rounded and widened", "axes dropped", "repeated"])
@pytest.mark.parametrize("scheme", [mora_jax.LowRank(alpha=3.0), "dora"], ids=str)
def test_schemes_that_are_not_linear(case, scheme):
    function, shape, _ = FOLLOWED[case]
    base = lambda params: function(params["w"])
    dora = {"dora": True, "scheme": "sharing"} if scheme == "dora" else {"scheme": scheme}
    forward = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, **dora))
    params = {"w": draw(*shape)}
    plan = mora_jax.plan(forward, params)
    params = mora_jax.attach(plan, params, key=jax.random.key(0))
    assert_as_merged(forward, base, params, plan)


def test_a_loop_of_unknown_length():
    base = lambda params, n: lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ params["w"]), X)
    forward = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    params = {"w": draw(16, 16)}
    n = jnp.int32(3)
    plan = mora_jax.plan(forward, params, n)
    params = jax.tree.map(lambda leaf: leaf + 0.1, mora_jax.attach(plan, params))
    merged = mora_jax.merge(params, plan)
    np.testing.assert_allclose(forward(params, n), base(merged, n), atol=1e-5)


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (lambda w: jnp.concatenate([X @ part for part in jnp.split(w, 2, 1)], 1), (16, 8), "split"),
        (lambda w: X @ jnp.concatenate([w, w], 1), (16, 8), "concatenate"),
        (lambda w: X @ jnp.tanh(w), (16, 8), "tanh"),
        (lambda w: jnp.take(w, jnp.arange(2), axis=0), (16, 8), "gather"),
        (lambda w: X @ (w * w.mean()), (16, 8), "reduce_sum, mul"),
        (lambda w: X @ w.reshape(16, 8), (8, 16), "reshape that mixes its axes"),
        # One matrix for each head would be two axes of the kernel in one.
        (lambda w: jnp.einsum("bhi,ihk->bhk", jnp.stack([X] * 2, 1), w.reshape(16, 2, 4)), (16, 8),
         "reshape that mixes its axes"),
        (lambda w: X @ w.reshape(8, 2, 8).transpose(1, 0, 2).reshape(16, 8), (16, 8),
         "reshape that mixes its axes"),
        (lambda w: jnp.einsum("ij,ij->", w, w[::-1]), (16, 8), "rev"),
        (lambda w: X + w.sum().astype(int), (16, 8), "reduce_sum"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_named(function, shape, reason):
    base = lambda params: (function(params["w"]), X @ params["other"]["w"])
    forward = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    params = {"w": draw(*shape), "other": {"w": draw(16, 4)}}
    plan = mora_jax.plan(forward, params)
    assert list(plan) == ["other"]
    ((path, why),) = plan.unadapted
    assert path == "w"
    assert why.startswith("enters no product that can be adapted, only ")
    assert reason in why
    got, want = forward(mora_jax.attach(plan, params)), base(params)
    jax.tree.map(np.testing.assert_array_equal, got, want)


class Projection(nn.Module):
    """Keeps its kernel as a matrix and multiplies with a kernel of more axes, as T5X does."""

    features: tuple[int, ...]
    axes: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        x = x.astype(self.dtype)
        inputs = x.shape[-self.axes :]
        matrix = (int(np.prod(inputs)), int(np.prod(self.features)))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), matrix).astype(self.dtype)
        kernel = kernel.reshape(*inputs, *self.features)
        contracted = tuple(range(x.ndim - self.axes, x.ndim)), tuple(range(self.axes))
        return lax.dot_general(x, kernel, (contracted, ((), ())))


class Block(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        query, key, value = (
            Projection((2, 4), dtype=self.dtype, name=name)(x) for name in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        x = x + Projection((12,), axes=2, dtype=self.dtype, name="out")(mixed)
        hidden = jax.nn.relu(Projection((20,), dtype=self.dtype, name="wi")(x))
        return x + Projection((12,), dtype=self.dtype, name="wo")(hidden)


def block(dtype="float32"):
    model, x = Block(dtype), draw(2, 5, 12)
    params = model.init(jax.random.key(0), x)["params"]
    return lambda params, x: model.apply({"params": params}, x), params, x


@pytest.mark.parametrize("scheme", ["sharing", mora_jax.Rotation(wrap=True)], ids=str)
def test_attention_whose_kernels_are_kept_as_matrices(scheme):
    base, params, x = block()
    outcomes = []
    for placement in ("kernel", "activation"):
        config = mora_jax.MoRAConfig(rank=1, scheme=scheme, placement=placement)
        forward = mora_jax.adapt(base, config)
        plan = mora_jax.plan(forward, params, x)
        assert set(plan) == {"query", "key", "value", "out", "wi", "wo"}
        assert plan.unadapted == ()
        adapted = jax.tree.map(lambda leaf: leaf + 0.05, mora_jax.attach(plan, params))
        trainable, frozen = mora_jax.split(adapted, plan)

        def loss(trainable, forward=forward, frozen=frozen):
            y = forward(mora_jax.join(trainable, frozen), x)
            return jnp.square(y).sum(), y

        outcomes.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable))
        merged = base(mora_jax.merge(adapted, plan), x)
        assert float(jnp.abs(outcomes[-1][0][1] - merged).max()) < 1e-5
    for a, b in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_new_adapters_of_low_precision_attention_change_no_bit(optimized):
    base, params, x = block("bfloat16")
    forward = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    plan = mora_jax.plan(forward, params, x)
    assert len(plan) == 6
    y = jax.jit(forward)(mora_jax.attach(plan, params), x)
    np.testing.assert_array_equal(y, jax.jit(base)(params, x))


@pytest.mark.parametrize("low", ["bfloat16", "float8_e4m3fn"])
def test_a_kernel_that_the_model_rounds_stays_rounded(low, optimized):
    base = lambda params: X @ params["w"].astype(low).astype(jnp.float32)
    forward = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    params = {"w": draw(16, 8)}
    assert jnp.abs(base(params) - X @ params["w"]).max() > 1e-3
    adapted = mora_jax.attach(mora_jax.plan(forward, params), params)
    np.testing.assert_array_equal(jax.jit(forward)(adapted), jax.jit(base)(params))


class Turned(nnx.Module):
    """Gives its two output axes in another order than its kernel has them."""

    def __init__(self):
        self.kernel = nnx.Param(draw(16, 2, 4))

    def __call__(self, x):
        return jnp.einsum("bi,iuv->bvu", x, self.kernel[...])


class Holder(nnx.Module):
    def __init__(self):
        self.turned = Turned()

    def __call__(self, x):
        return self.turned(x)


def test_outputs_stated_in_another_order_than_stored():
    axes = KernelAxes((0,), (2, 1))
    config = {"rank": 1, "scheme": "sharing", "targets": ".*", "kernels": {".*": axes}}
    model = mora_jax.adapt(Holder(), mora_jax.MoRAConfig(**config))
    adapters = nnx.state(model, mora_jax.nnx.MoRAParam)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), adapters)
    nnx.update(model, drawn)
    np.testing.assert_allclose(model(X), mora_jax.nnx.merge(model)(X), rtol=1e-4, atol=1e-5)
