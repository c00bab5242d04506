"""Kernels that the forward pass of an NNX model uses past their layer, or overwrites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax
from helpers.arrays import draw_adapters
from mora_jax import nnx as mora_nnx
from mora_jax._product.axes import KernelAxes

IDS = jnp.arange(6)[None]


class TiedHead(nnx.Module):
    """Mamba2 in jax-ml/bonsai ties its head so."""

    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(12, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        return self.out(self.embed(ids)) @ self.embed.embedding[:].T


class TransposedHead(TiedHead):
    def __call__(self, ids):
        return self.out(self.embed(ids)) @ self.embed.embedding.T


class TiedInATransform(TiedHead):
    def __call__(self, ids):
        run = nnx.remat(lambda model, x: x @ jnp.transpose(model.embed.embedding))
        return run(self, self.out(self.embed(ids)))


class AssignedHead(nnx.Module):
    """EasyDeL ties its head so."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)
        self.out = nnx.Linear(8, 12, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        self.out.kernel.set_value(self.embed.embedding[...].T)
        return self.out(self.embed(ids))


class NewVariable(AssignedHead):
    def __call__(self, ids):
        self.out.kernel = nnx.Param(self.embed.embedding[...].T)
        return self.out(self.embed(ids))


class Scaled(nnx.Module):
    """A weight norm of one's own."""

    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(12, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        self.out.kernel[...] = self.out.kernel[...] / jnp.linalg.norm(self.out.kernel)
        return self.out(self.embed(ids))


class Private(nnx.Linear):
    """A method that nothing adapts, called from outside."""

    def _project(self, x):
        return x @ self.kernel[...]

    @property
    def transposed(self):
        return self.kernel[...].T


class CallsPrivate(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(12, 8, rngs=rngs), Private(8, 8, rngs=rngs)

    def __call__(self, ids):
        return self.out._project(self.embed(ids))


class UsesProperty(CallsPrivate):
    def __call__(self, ids):
        return self.out(self.embed(ids)) @ self.out.transposed


class OverwritesItself(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        self.w[...] = self.w[...] / 2
        return x @ self.w[...]


def adapted(base, targets=".*", **config):
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", targets=targets, **config)
    return mora_jax.adapt(base, config)


RUNS = {
    "eager": lambda model, ids: model(ids),
    "jit": nnx.jit(lambda model, ids: model(ids)),
    "grad": lambda model, ids: nnx.grad(
        lambda model: model(ids).sum(), argnums=nnx.DiffState(0, mora_nnx.MoRAParam)
    )(model),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(
    ("kind", "targets", "wanted"),
    [
        (TiedHead, ".*", "reads 'embed/embedding'"),
        (TransposedHead, ".*", "reads 'embed/embedding'"),
        (TiedInATransform, ".*", "reads 'embed/embedding'"),
        (AssignedHead, "out", "writes into 'out/kernel'"),
        (AssignedHead, "embed", "reads 'embed/embedding'"),
        (NewVariable, "out", "writes into 'out/kernel'"),
        (Scaled, "out", "reads 'out/kernel'"),
        (CallsPrivate, "out", "reads 'out/kernel'"),
        (UsesProperty, "out", "reads 'out/kernel'"),
    ],
)
def test_a_kernel_that_is_used_past_its_layer_is_refused(kind, targets, wanted, run):
    model = adapted(kind(nnx.Rngs(0)), targets)
    with pytest.raises(
        ValueError, match=f"(?:forward pass|traced function) {wanted}.*MoRAConfig.exclude"
    ):
        run(model, IDS)


def test_a_function_of_a_model_is_refused_when_it_is_traced():
    model = adapted(TiedHead(nnx.Rngs(0)))

    @nnx.jit
    def head(model, x):
        return x @ model.embed.embedding[...].T

    with pytest.raises(ValueError, match="reads 'embed/embedding'"):
        head(model, jnp.ones((1, 8)))
    with pytest.raises(ValueError, match="reads 'embed/embedding'"):
        jax.jit(lambda x: jax.jit(jnp.dot)(x, model.embed.embedding))(jnp.ones((1, 12)))


def test_the_same_models_run_where_the_kernel_is_left_out():
    base = TiedHead(nnx.Rngs(0))
    model = draw_adapters(adapted(base, "out"))
    y = model(IDS)
    assert jnp.abs(y - base(IDS)).max() > 1e-3
    np.testing.assert_allclose(mora_nnx.merge(model)(IDS), y, atol=1e-5)


def test_a_layer_that_overwrites_its_own_kernel_is_refused():
    model = adapted(OverwritesItself(nnx.Rngs(0)), kernels={"w": KernelAxes((0,), (1,))})
    with pytest.raises(ValueError, match="writes into 'w'"):
        model(jnp.ones((1, 8)))


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_wrappers_that_normalise_a_kernel_are_refused(wrapper):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.normed = wrapper(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
            self.out = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.out(self.normed(x))

    base, x = Model(nnx.Rngs(0)), jnp.ones((2, 8))
    wanted = f"'normed/layer_instance' stands in the {wrapper.__name__} at 'normed'"
    with pytest.raises(ValueError, match=wanted):
        adapted(base)
    model = draw_adapters(adapted(base, "out"))
    np.testing.assert_allclose(mora_nnx.merge(model)(x), model(x), atol=1e-5)


def test_kernels_are_read_and_written_between_forward_passes():
    base = TiedHead(nnx.Rngs(0))
    model = adapted(base)
    np.testing.assert_array_equal(model.embed.embedding[...], base.embed.embedding[...])
    model.out.kernel[...] = 2 * model.out.kernel[...]
    model.out.kernel = nnx.Param(model.out.kernel[...] + 1)
    np.testing.assert_array_equal(model.out.kernel[...], 2 * base.out.kernel[...] + 1)

    class Reader(nnx.Module):
        def __init__(self, model):
            self.first = model.out.kernel[0, 0]

    assert Reader(model).first == model.out.kernel[0, 0]


def test_what_is_no_number_of_a_kernel_is_there_in_a_forward_pass():
    class Asks(TiedHead):
        def __call__(self, ids):
            kernel = self.out.kernel
            assert isinstance(kernel, nnx.Param)
            assert (kernel.shape, kernel.ndim, kernel.size) == ((8, 8), 2, 64)
            return self.out(self.embed(ids).astype(kernel.dtype))

    model = adapted(Asks(nnx.Rngs(0)), "out")
    assert nnx.jit(lambda model: model(IDS))(model).shape == (1, 6, 8)


def test_blocks_share_what_is_compiled_for_one_of_them():
    class Blocks(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])

    traced = []

    @nnx.jit
    def run(block, x):
        traced.append(block)
        return block(x)

    x = jnp.ones((2, 8))
    for block in adapted(Blocks(nnx.Rngs(0))).blocks:
        x = run(block, x)
    assert len(traced) == 1
