"""The adapted product: both placements, any layout, values and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax
from conftest import ALL_SCHEMES, FAMILIES, SCHEMES, random_adapter
from mora_jax import _dot
from mora_jax._placement import best_places

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
    for expert in range(4):
        own = {name: leaf[expert] for name, leaf in adapter.items()}
        alone = mora_jax.mora_dot_general(
            x[:, expert], kernel[expert], MATMUL, own, mora_jax.Sharing()
        )
        np.testing.assert_allclose(together[expert], alone, rtol=1e-12)


@pytest.mark.parametrize("placement", ["kernel", "activation"])
@pytest.mark.parametrize("scheme", [mora_jax.Sharing(), mora_jax.Rotation()], ids=str)
def test_bfloat16_stays_near_double_precision(placement, scheme, strict):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((64, 96)), rng.standard_normal((96, 80)) / 10
    adapter = {k: v / 30 for k, v in random_adapter(96, 80, 4, scheme).items()}

    def loss(x, kernel, adapter, placement):
        y = mora_jax.mora_dot_general(x, kernel, MATMUL, adapter, scheme, placement=placement)
        return jnp.square(y.astype(jnp.float32)).sum()

    low = jax.grad(loss, (0, 2))(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16), adapter, placement
    )
    high = jax.grad(loss, (0, 2))(
        jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), adapter, "activation"
    )
    assert low[0].dtype == jnp.bfloat16
    assert low[1]["matrix"].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 2e-2


@pytest.mark.parametrize("scheme", FAMILIES[:-1], ids=str)
def test_bfloat16_gradients_are_as_near_to_float64_as_the_plain_formulas(scheme, float64):
    rng = np.random.default_rng(0)
    x, kernel, dy = (rng.standard_normal(shape) for shape in ((256, 96), (96, 80), (256, 80)))
    adapter = {k: v / 30 for k, v in random_adapter(96, 80, 4, scheme).items()}

    def gradient(dtype, placement):
        def output(adapter):
            low = (jnp.asarray(jnp.asarray(a, jnp.bfloat16), dtype) for a in (x, kernel))
            return mora_jax.mora_dot_general(*low, MATMUL, adapter, scheme, placement=placement)

        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(dtype, "float32")), adapter)
        _, transpose = jax.vjp(output, exact)
        return np.asarray(
            transpose(jnp.asarray(jnp.asarray(dy, jnp.bfloat16), dtype))[0]["matrix"], np.float64
        )

    high = gradient(jnp.float64, "activation")
    rule, plain = (
        np.linalg.norm(gradient(jnp.bfloat16, placement) - high) / np.linalg.norm(high)
        for placement in ("kernel", "activation")
    )
    assert rule <= 1.05 * plain
    assert rule < 5e-3


@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_float16_sums_do_not_leave_its_range(placement):
    x, kernel = jnp.full((2, 64), 3e4, jnp.float16), jnp.full((64, 64), 1e-3, jnp.float16)
    adapter = {"matrix": jnp.zeros((16, 16))}

    def output(adapter):
        return mora_jax.mora_dot_general(
            x, kernel, MATMUL, adapter, mora_jax.Sharing(), placement=placement
        )

    np.testing.assert_array_equal(output(adapter), jnp.dot(x, kernel))
    gradient = jax.grad(lambda adapter: output(adapter).sum().astype(jnp.float32))(adapter)
    np.testing.assert_allclose(gradient["matrix"], 2 * 4 * 3e4 * 4)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_float16_sums_of_repeated_blocks_do_not_leave_its_range(rows, placement):
    # One block of inputs meets four copies of it in the outputs: 4 * 3e4 is no float16.
    x, kernel = jnp.ones((rows, 16), jnp.float16), jnp.zeros((16, 64), jnp.float16)

    def total(adapter):
        y = mora_jax.mora_dot_general(
            x, kernel, MATMUL, adapter, mora_jax.Decoupling(), placement=placement
        )
        return (y * jnp.float16(3e4)).astype(jnp.float32).sum()

    gradient = jax.grad(total)({"matrix": jnp.zeros((16, 16))})
    np.testing.assert_allclose(gradient["matrix"], rows * 4 * 3e4, rtol=1e-3)


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
        _, transpose = jax.vjp(
            lambda x, adapter: mora_jax.mora_dot_general(
                x, kernel, MATMUL, adapter, scheme, placement="kernel"
            ),
            x, adapter,
        )  # fmt: skip
        return {leaf.shape for leaf in jax.tree.leaves(transpose) if hasattr(leaf, "shape")}

    # 32 features instead of 256 for sharing; rotation has no smaller form than the inputs.
    assert (64, 32) in kept(mora_jax.Sharing())
    assert (64, 256) not in kept(mora_jax.Sharing())
    assert (64, 256) in kept(mora_jax.Rotation())


def test_the_activation_form_has_a_forward_mode(float64):
    product, x, kernel, adapter = products("dense", mora_jax.Rotation())
    _, tangent = jax.jvp(lambda a: product("activation", x, kernel, a), (adapter,), (adapter,))
    delta = product("activation", x, kernel, adapter) - product(
        "activation", x, kernel, jax.tree.map(jnp.zeros_like, adapter)
    )
    np.testing.assert_allclose(tangent, delta, rtol=1e-11)


def test_vmap_over_adapters():
    scheme = mora_jax.Sharing()
    adapters = random_adapter(6, 4, 1, scheme, batch=(3,))
    x, kernel = jnp.ones((2, 6)), jnp.ones((6, 4))

    def loss(adapter, placement):
        y = mora_jax.mora_dot_general(x, kernel, MATMUL, adapter, scheme, placement=placement)
        return jnp.square(y).sum()

    first, second = (
        jax.vmap(lambda adapter, p=placement: jax.grad(loss)(adapter, p))(adapters)
        for placement in ("kernel", "activation")
    )
    np.testing.assert_allclose(first["matrix"], second["matrix"], rtol=1e-5)


def places(rows, in_features, out_features, scheme, machine, rank=8):
    size = mora_jax.square_rank(in_features, out_features, rank, scheme)
    return best_places(rows, in_features, out_features, size, scheme, machine)


@pytest.mark.parametrize("machine", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_auto_takes_the_kernel_for_many_rows(machine, scheme):
    assert places(10**6, 4096, 4096, scheme, machine) == ("kernel", "kernel")
    assert places(1, 4096, 4096, scheme, machine) == ("activation", "activation")
    assert places(10**6, 4096, 4096, mora_jax.LowRank(), machine)[0] == "activation"


def test_auto_may_split_the_passes():
    # A wide layer has many outputs to add to, and few inputs.
    assert places(5000, 4096, 14336, mora_jax.Sharing(), "gpu") == ("kernel", "activation")
    assert places(5000, 14336, 4096, mora_jax.Sharing(), "gpu") == ("activation", "kernel")


def test_a_table_makes_the_kernels_sum_dear():
    # Where the compiler's estimates for one v5p cross: near 16,384 rows.
    assert places(8192, 4096, 14336, mora_jax.Sharing(), "gpu")[0] == "kernel"
    assert places(8192, 4096, 14336, mora_jax.Sharing(), "tpu")[0] == "activation"
    assert places(65536, 4096, 14336, mora_jax.Sharing(), "tpu") == ("kernel", "kernel")


@pytest.mark.parametrize(("machine", "place"), [("gpu", "kernel"), ("tpu", "activation")])
def test_auto_goes_by_the_mesh_that_is_compiled_for(machine, place):
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=machine)
    mesh = jax.sharding.AbstractMesh((8,), ("d",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert places(200, 1024, 1024, mora_jax.Sharing(), None) == (place, place)


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
    monkeypatch.setattr(_dot, "best_places", lambda *_: (forward, backward))
    chex.assert_trees_all_close(gradients("auto"), plain, rtol=1e-11, atol=1e-11)


def test_dropout_like_inputs_of_the_adapter_alone():
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
    gradient = jax.grad(lambda x, a: call(x, a, scheme, placement).sum(), (0, 1))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient(x[:0], adapter)))


def test_low_ranks_hidden_features_may_leave_float16(call):
    adapter = {"a": jnp.ones((16, 1)), "b": jnp.full((1, 24), 1e-6)}
    x, scheme = jnp.full((2, 16), 3e4, "float16"), mora_jax.LowRank()
    kernel = jnp.zeros((16, 24), "float16")
    y = mora_jax.mora_dot_general(x, kernel, MATMUL, adapter, scheme)
    np.testing.assert_allclose(y, 16 * 3e4 * 1e-6, rtol=2e-3)


@pytest.mark.parametrize("scheme", [mora_jax.Sharing(), mora_jax.Decoupling()], ids=str)
def test_long_sums_are_not_made_in_bfloat16(scheme):
    rng = np.random.default_rng(0)
    dy = jnp.asarray(rng.standard_normal((8, 8192)), "bfloat16")
    adapter = {"matrix": jnp.asarray(rng.standard_normal((64, 64)), "float32")}
    ones = jnp.ones((8, 1024), "bfloat16")

    def gradient(dtype):
        def total(x):
            return (mora_jax.delta(x, adapter, 8192, scheme) * dy.astype(dtype)).sum()

        by_jax = jax.grad(total)(ones.astype(dtype))
        by_rule = mora_jax._operators.delta_transpose(dy.astype(dtype), adapter, 1024, scheme)
        return [np.asarray(g, "float32") for g in (by_jax, by_rule)]

    # 128 numbers added in bfloat16 would be off by more.
    for rounded, exact in zip(gradient("bfloat16"), gradient("float32"), strict=True):
        assert np.linalg.norm(rounded - exact) < 5e-3 * np.linalg.norm(exact)


def test_weights_are_held_back_from_sums_of_other_passes(call):
    # What a compiler would do otherwise shows in a large model's memory alone.
    def backward(x, adapter):
        return jax.vjp(lambda x, a: call(x, a, mora_jax.Sharing()), x, adapter)[1](
            call(x, adapter, mora_jax.Sharing())
        )

    adapter = random_adapter(16, 24, 2, mora_jax.Sharing())
    text = str(jax.make_jaxpr(backward)(jnp.ones((6, 16)), adapter))
    assert text.count("optimization_barrier") == 3
