"""The paper's operators, against the authors' numbers and against the formulas themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mora_jax
from helpers import reference
from helpers.arrays import random_adapter
from helpers.files import golden_operators
from helpers.schemes import ALL_SCHEMES, DESCRIBED, SCHEMES


def reference_kernel(scheme, adapter, in_features, out_features):
    return reference.adapter_kernel(DESCRIBED[scheme], adapter, in_features, out_features)


@pytest.mark.parametrize(("case", "arrays"), golden_operators())
def test_the_authors_numbers(case, arrays, float64):
    scheme = mora_jax.scheme_from_mora_type(case["mora_type"])
    in_features, out_features = case["in_features"], case["out_features"]
    # Their cos and sin tables are float32.
    tolerance = {"rtol": 0, "atol": 1e-6 if case["mora_type"] == 6 else 1e-12}
    x, dy = jnp.asarray(arrays["x"]), jnp.asarray(arrays["dy"])
    adapter = {"matrix": jnp.asarray(arrays["M"].T)}

    size = mora_jax.square_rank(in_features, out_features, case["rank"], scheme)
    assert size == case["r_hat"]

    @jax.jit
    def everything(x, weight, dy, adapter):
        kernel = mora_jax.delta_kernel(adapter, in_features, out_features, scheme)
        delta, transpose = jax.vjp(
            lambda x, adapter: mora_jax.delta(x, adapter, out_features, scheme), x, adapter
        )
        outputs = [
            mora_jax.mora_dot_general(
                x, weight, (((1,), (0,)), ((), ())), adapter, scheme, placement=placement
            )
            for placement in ("kernel", "activation")
        ]
        return kernel, delta, outputs, *transpose(dy)

    weight = jnp.asarray(arrays["weight"].T)
    kernel, delta, outputs, dx, gradient = everything(x, weight, dy, adapter)
    np.testing.assert_allclose(delta, arrays["delta"], **tolerance)
    for output in outputs:
        np.testing.assert_allclose(output + arrays["bias"], arrays["y"], **tolerance)
    np.testing.assert_allclose(gradient["matrix"].T, arrays["dM"], **tolerance)
    np.testing.assert_allclose(dx, arrays["dx_delta"], **tolerance)
    # Ours must hold where their merge crashes, too.
    np.testing.assert_allclose(x @ kernel, delta, rtol=0, atol=1e-12)
    if "merge_error" not in case:
        np.testing.assert_allclose(kernel.T, arrays["delta_weight"], **tolerance)


def test_a_case_crashes_the_authors_merge():
    assert any("merge_error" in parameters.values[0] for parameters in golden_operators())


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@settings(max_examples=6, deadline=None)
@given(
    in_features=st.integers(1, 70), out_features=st.integers(1, 70), rank=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_formula_at_any_size(scheme, in_features, out_features, rank, seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        adapter = random_adapter(in_features, out_features, rank, scheme, seed, "float64")
        x, dy = rng.standard_normal((2, in_features)), rng.standard_normal((2, out_features))
        wanted = reference_kernel(scheme, adapter, in_features, out_features)

        @jax.jit
        def everything(x, dy, adapter):
            kernel = mora_jax.delta_kernel(adapter, in_features, out_features, scheme)
            delta, transpose = jax.vjp(
                lambda x, a: mora_jax.delta(x, a, out_features, scheme), x, adapter
            )
            z = scheme.gradient_residual(x, adapter, out_features)
            rule = scheme.gradient(z, dy, adapter, in_features)
            return kernel, delta, *transpose(dy), rule

        kernel, delta, dx, gradient, rule = everything(x, dy, adapter)

        np.testing.assert_allclose(kernel, wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(delta, x @ wanted, rtol=1e-12, atol=1e-11)
        np.testing.assert_allclose(dx, dy @ wanted.T, rtol=1e-12, atol=1e-11)
        expected = reference.adapter_gradients(DESCRIBED[scheme], adapter, x, dy)
        for name, value in expected.items():
            np.testing.assert_allclose(gradient[name], value, rtol=1e-12, atol=1e-11)
            np.testing.assert_allclose(rule[name], value, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_are_kept_and_leading_axes_are_free(scheme, dtype, strict):
    adapter = random_adapter(30, 22, 2, scheme)
    x = jax.random.normal(jax.random.key(0), (2, 3, 30), dtype)

    @jax.jit
    def everything(x, adapter):
        one = lambda row: mora_jax.delta(row, adapter, 22, scheme)
        return one(x), jax.vmap(one)(x[0]), mora_jax.delta_kernel(adapter, 30, 22, scheme)

    delta, rows, kernel = everything(x, adapter)
    assert delta.shape == (2, 3, 22)
    assert delta.dtype == jnp.dtype(dtype)
    wanted = np.asarray(x, np.float64) @ reference_kernel(scheme, adapter, 30, 22)
    error = np.linalg.norm(np.asarray(delta, np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < (1e-6 if dtype == "float32" else 2e-2)
    np.testing.assert_allclose(
        np.asarray(rows, np.float32), np.asarray(delta[0], np.float32), rtol=0.05, atol=0.2
    )
    assert kernel.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(2752, 1024), (1024, 2752)])
def test_cycled_rotation_reaches_every_feature(shape, record_property):
    in_features, out_features = shape
    ranks = {}
    for scheme in (mora_jax.Rotation(), mora_jax.Rotation(wrap=True)):
        adapter = random_adapter(in_features, out_features, 8, scheme)
        make = jax.jit(mora_jax.delta_kernel, static_argnums=(1, 2, 3))
        kernel = np.asarray(make(adapter, in_features, out_features, scheme))
        rows = np.float64(kernel.T if in_features > out_features else kernel)
        ranks[scheme] = np.linalg.matrix_rank(rows @ rows.T, hermitian=True)  # the kernel's own
        dead_inputs = (~kernel.any(axis=1)).sum()
        copied_outputs = out_features - len(np.unique(kernel.T, axis=0))
        if scheme.wrap:
            assert (dead_inputs, copied_outputs) == (0, 0)
        else:
            # The authors' form; what it leaves out is the reason for the other.
            assert (dead_inputs, copied_outputs) == (
                (1708, 0) if in_features == 2752 else (0, 1708)
            )
    print(f"\n{in_features} -> {out_features}, rank of the delta: {ranks}")
    assert ranks[mora_jax.Rotation(wrap=True)] >= ranks[mora_jax.Rotation()]


def test_cycled_schemes_need_the_output_size():
    with pytest.raises(ValueError, match="needs out_features"):
        mora_jax.compress(jnp.ones(8), 4, mora_jax.Rotation(wrap=True))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_matrix_of_the_wrong_shape_is_named(scheme):
    with pytest.raises(ValueError, match=r"10 -> 6 features must have shapes .* got .*\(4, 3\)"):
        mora_jax.delta(jnp.ones(10), {"matrix": jnp.ones((4, 3))}, 6, scheme)


def test_low_rank_has_no_fixed_maps():
    with pytest.raises(TypeError, match="no fixed compression"):
        mora_jax.compress(jnp.ones(8), 4, mora_jax.LowRank())
    with pytest.raises(TypeError, match="no fixed decompression"):
        mora_jax.decompress(jnp.ones(8), 4, mora_jax.LowRank())
