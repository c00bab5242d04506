"""The adapted product: both placements, any layout, values and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax
from helpers.arrays import random_adapter
from helpers.schemes import ALL_SCHEMES, FAMILIES
from mora_jax._product import call as _dot_call

MATMUL = (((1,), (0,)), ((), ()))

# (lhs, rhs, dimension numbers, input features, output features, batch axes)
LAYOUTS = {
    "dense": ((3, 7, 50), (50, 33), (((2,), (0,)), ((), ())), 50, 33, ()),
    "two axes in, two out": (
        (3, 7, 5, 6), (5, 6, 11, 2), (((2, 3), (0, 1)), ((), ())), 30, 22, (),
    ),
    "axes apart": ((3, 7, 6, 5), (5, 11, 6, 2), (((3, 2), (0, 2)), ((), ())), 30, 22, ()),
    "axes in another order": ((4, 6, 5), (5, 11, 6), (((1, 2), (2, 0)), ((), ())), 30, 11, ()),
    "experts": ((7, 4, 30), (4, 30, 17), (((2,), (1,)), ((1,), (0,))), 30, 17, (4,)),
}  # fmt: skip


def products(layout, scheme, rank=2):
    """The function of (x, kernel, adapter) for a placement, and arguments for it."""
    lhs, rhs, dims, in_features, out_features, batch = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.standard_normal(lhs)), jnp.asarray(rng.standard_normal(rhs))
    adapter = random_adapter(in_features, out_features, rank, scheme, 1, "float64", batch)

    def product(placement, x, kernel, adapter):
        return mora_jax.mora_dot_general(x, kernel, dims, adapter, scheme, placement=placement)

    return product, x, kernel, adapter


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_placements_agree(layout, scheme, float64):
    product, x, kernel, adapter = products(layout, scheme)
    weights = np.random.default_rng(2).standard_normal(product("kernel", x, kernel, adapter).shape)

    @jax.jit
    def everything(x, kernel, adapter):
        outcomes = []
        for placement in ("activation", "kernel"):

            def loss(x, kernel, adapter, placement=placement):
                y = product(placement, x, kernel, adapter)
                return (y * weights).sum(), y

            # By all three, and by all but the kernel: the second keeps less for the gradient.
            full, y = jax.grad(loss, (0, 1, 2), has_aux=True)(x, kernel, adapter)
            frozen, _ = jax.grad(loss, (0, 2), has_aux=True)(x, kernel, adapter)
            outcomes.append((y, full, (full[0], full[2])))
            outcomes.append((y, full, frozen))
        return outcomes

    first, *others = everything(x, kernel, adapter)
    chex.assert_trees_all_close(first, *others, rtol=1e-11, atol=1e-11)


def test_experts_do_not_share_their_matrices(float64):
    product, x, kernel, adapter = products("experts", mora_jax.Sharing())
    together = product("kernel", x, kernel, adapter)

    @jax.jit
    def by_itself(x, kernel, adapter):
        return mora_jax.mora_dot_general(x, kernel, MATMUL, adapter, mora_jax.Sharing())

    for expert in range(4):
        own = {name: leaf[expert] for name, leaf in adapter.items()}
        alone = by_itself(x[:, expert], kernel[expert], own)
        np.testing.assert_allclose(together[expert], alone, rtol=1e-12)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_the_kernels_gradient_is_never_formed():
    x, kernel, dy = jnp.ones((512, 256)), jnp.ones((256, 256)), jnp.ones((512, 256))
    adapter = random_adapter(256, 256, 2, mora_jax.Sharing())

    def step(x, kernel, adapter):
        y, transpose = jax.vjp(
            lambda x, adapter: mora_jax.mora_dot_general(
                x, kernel, MATMUL, adapter, mora_jax.Sharing(), placement="kernel"
            ),
            x, adapter,
        )  # fmt: skip
        return y, transpose(dy)

    product = 2 * 512 * 256 * 256
    # Forward and input gradient are two products; the adapter's own arithmetic is small.
    assert 2 * product <= flops(step, x, kernel, adapter) < 2.3 * product


def test_what_is_kept_for_the_gradient_is_the_compressed_input():
    x, kernel = jnp.ones((64, 256)), jnp.ones((256, 256))

    def kept(scheme):
        adapter = random_adapter(256, 256, 2, scheme)

        def transpose(x, adapter):
            return jax.vjp(
                lambda x, adapter: mora_jax.mora_dot_general(
                    x, kernel, MATMUL, adapter, scheme, placement="kernel"
                ),
                x, adapter,
            )[1]  # fmt: skip

        return {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(transpose, x, adapter))}

    # 32 features instead of 256 for sharing; rotation has no smaller form than the inputs.
    assert (1, 64, 32) in kept(mora_jax.Sharing())
    assert (64, 256) not in kept(mora_jax.Sharing())
    assert (64, 256) in kept(mora_jax.Rotation())


def test_the_activation_form_has_a_forward_mode(float64):
    product, x, kernel, adapter = products("dense", mora_jax.Rotation())
    run = jax.jit(lambda adapter: product("activation", x, kernel, adapter))
    _, tangent = jax.jvp(run, (adapter,), (adapter,))
    delta = run(adapter) - run(jax.tree.map(jnp.zeros_like, adapter))
    np.testing.assert_allclose(tangent, delta, rtol=1e-11)


def test_vmap_over_adapters():
    scheme = mora_jax.Sharing()
    adapters = random_adapter(6, 4, 1, scheme, batch=(3,))
    x, kernel = jnp.ones((2, 6)), jnp.ones((6, 4))

    def loss(adapter, placement):
        y = mora_jax.mora_dot_general(x, kernel, MATMUL, adapter, scheme, placement=placement)
        return jnp.square(y).sum()

    first, second = (
        jax.jit(jax.vmap(lambda adapter, p=placement: jax.grad(loss)(adapter, p)))(adapters)
        for placement in ("kernel", "activation")
    )
    np.testing.assert_allclose(first["matrix"], second["matrix"], rtol=1e-5)


@pytest.mark.parametrize("scheme", FAMILIES, ids=str)
@pytest.mark.parametrize(
    ("forward", "backward"), [("kernel", "activation"), ("activation", "kernel")]
)
def test_passes_split_at_will(scheme, forward, backward, float64, monkeypatch):
    product, x, kernel, adapter = products("axes in another order", scheme)

    def gradients(placement):
        def loss(x, kernel, adapter):
            return jnp.square(product(placement, x, kernel, adapter)).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, kernel, adapter)

    plain = gradients("activation")
    monkeypatch.setattr(_dot_call, "cheapest_placements", lambda *_: (forward, backward))
    chex.assert_trees_all_close(gradients("auto"), plain, rtol=1e-11, atol=1e-11)


def test_dropout_like_inputs_of_the_adapter_alone(optimized):
    scheme, x, kernel = mora_jax.Sharing(), jnp.ones((2, 6)), jnp.ones((6, 4))
    adapter = random_adapter(6, 4, 1, scheme)
    y = mora_jax.mora_dot_general(
        x, kernel, MATMUL, adapter, scheme, placement="kernel", adapter_lhs=jnp.zeros_like(x)
    )
    np.testing.assert_array_equal(y, x @ kernel)


@pytest.mark.parametrize(
    ("kernel", "adapter", "error", "message"),
    [
        (jnp.ones((6, 4), jnp.int8), {"matrix": jnp.ones((3, 3))}, TypeError, "floating.*int8"),
        (jnp.ones((6, 4)), {"matrix": jnp.ones((3, 2))}, ValueError, r"got .*\(3, 2\)"),
        (jnp.ones((6, 4)), {"matrix": jnp.ones((2, 3, 3))}, ValueError, "batch axes"),
        (jnp.ones((6, 4)), {"a": jnp.ones((6, 1))}, ValueError, "must have shapes"),
    ],
)
def test_what_does_not_fit_is_refused(kernel, adapter, error, message):
    with pytest.raises(error, match=message):
        mora_jax.mora_dot_general(jnp.ones((2, 6)), kernel, MATMUL, adapter, mora_jax.Sharing())


@pytest.fixture(name="call")
def small_call():
    """A product of 6 rows as a function of x, an adapter and a placement."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((16, 24)))

    def call(x, adapter, scheme, placement="kernel"):
        return mora_jax.mora_dot_general(x, kernel, MATMUL, adapter, scheme, placement=placement)

    return call


@pytest.mark.parametrize("scheme", FAMILIES, ids=str)
def test_second_derivatives(call, scheme, float64):
    adapter = random_adapter(16, 24, 2, scheme, 1, "float64")
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, 16)))

    def hessian_product(placement):
        gradient = jax.grad(lambda adapter: (call(x, adapter, scheme, placement) ** 3).sum())
        return jax.jit(lambda a: jax.jvp(gradient, (a,), (a,))[1])(adapter)

    results = hessian_product("kernel"), hessian_product("activation")
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placement", ["kernel", "activation", "auto"])
@pytest.mark.parametrize("scheme", FAMILIES, ids=str)
def test_any_number_of_rows_is_exported_and_none_is_fine(call, scheme, placement):
    adapter = random_adapter(16, 24, 2, scheme)
    function = jax.jit(lambda x: call(x, adapter, scheme, placement))
    (rows,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(function)(jax.ShapeDtypeStruct((rows, 16), "float32"))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, 16)), "float32")
    np.testing.assert_allclose(exported.call(x), function(x), atol=1e-4)
    gradient = jax.jit(jax.grad(lambda x, a: call(x, a, scheme, placement).sum(), (0, 1)))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient(x[:0], adapter)))


def test_weights_are_held_back_from_sums_of_other_passes(call):
    # What a compiler would do otherwise shows in a large model's memory alone.
    def backward(x, adapter):
        return jax.vjp(lambda x, a: call(x, a, mora_jax.Sharing()), x, adapter)[1](
            call(x, adapter, mora_jax.Sharing())
        )

    adapter = random_adapter(16, 24, 2, mora_jax.Sharing())
    text = str(jax.make_jaxpr(backward)(jnp.ones((6, 16)), adapter))
    assert text.count("optimization_barrier") == 3


@pytest.mark.parametrize("scheme", FAMILIES[:3], ids=str)
def test_a_kept_sum_gives_the_same_gradients(scheme, float64):
    product, x, kernel, adapter = products("dense", scheme)
    del product

    def gradients(keep_sums):
        def run(x, adapter):
            y = mora_jax.mora_dot_general(
                x, kernel, LAYOUTS["dense"][2], adapter, scheme, placement="kernel",
                keep_sums=keep_sums,
            )  # fmt: skip
            return jnp.sin(y).sum()

        return jax.jit(jax.grad(jax.checkpoint(run), (0, 1)))(x, adapter)

    chex.assert_trees_all_close(gradients(True), gradients(False), rtol=1e-12)


def test_low_ranks_hidden_features_may_leave_float16(call):
    adapter = {"a": jnp.ones((16, 1)), "b": jnp.full((1, 24), 1e-6)}
    x, scheme = jnp.full((2, 16), 3e4, "float16"), mora_jax.LowRank()
    kernel = jnp.zeros((16, 24), "float16")
    y = mora_jax.mora_dot_general(x, kernel, MATMUL, adapter, scheme)
    np.testing.assert_allclose(y, 16 * 3e4 * 1e-6, rtol=2e-3)
