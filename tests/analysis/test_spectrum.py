"""The singular values of deltas: NumPy's own decomposition of whole kernels is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax
from helpers.arrays import perturb
from helpers.models import adapted_network
from helpers.schemes import FAMILIES
from helpers.stacks import deltas, stacked
from mora_jax import quantized


@pytest.mark.parametrize("scheme", FAMILIES, ids=str)
def test_it_is_that_of_the_whole_delta(scheme):
    plan, params = stacked(scheme)
    kernel = jnp.arange(480, dtype=jnp.bfloat16).reshape(plan["layers"].kernel_shape)
    params["layers"]["kernel"] = kernel
    report = mora_jax.spectrum(params, plan, threshold=3.0)
    assert list(report.layers) == ["layers[0]", "layers[1]"]
    base = np.asarray(kernel, np.float64).transpose(1, 2, 0)
    for layer, (delta, whole) in zip(
        report.layers.values(), zip(deltas(params, plan), base, strict=True), strict=True
    ):
        values = np.linalg.svd(delta, compute_uv=False)
        size = len(layer.singular_values)
        np.testing.assert_allclose(layer.singular_values, values[:size], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(values[size:], 0, atol=1e-5)
        assert layer.count(3.0) == (values > 3).sum()
        np.testing.assert_allclose(layer.norm, np.linalg.norm(delta), rtol=1e-6)
        np.testing.assert_allclose(
            layer.relative_norm, np.linalg.norm(delta) / np.linalg.norm(whole), rtol=1e-6
        )
    counts = [layer.count(3.0) for layer in report.layers.values()]
    assert 0 < sum(counts) == 2 * report.mean_count


def test_effective_rank():
    rank = lambda *values: mora_jax.Spectrum(np.array(values), 1.0).effective_rank
    np.testing.assert_allclose(rank(2.0, 2.0, 2.0), 3)
    np.testing.assert_allclose(rank(5.0, 0.0), 1)
    assert rank(0.0, 0.0) == 0
    share = np.array([0.75, 0.25])
    np.testing.assert_allclose(rank(3.0, 1.0), np.prod(share**-share))


def test_the_table():
    values = np.array([0.3, 0.1, 0.05])
    layers = {"up": mora_jax.Spectrum(values, 2.0), "": mora_jax.Spectrum(np.zeros(3), 2.0)}
    assert str(mora_jax.SpectrumReport(layers, 0.07)).splitlines() == [
        "layer      norm    of base  largest  > 0.07  effective rank",
        "-----------------------------------------------------------",
        "up         0.3202  16.01%   0.3      2       2.3",
        "(root)     0       0.00%    0        0       0.0",
        "mean of 2  0.1601  8.00%    0.15     1.0     1.2",
    ]


def test_a_quantised_base_is_measured_as_its_products_see_it(inputs):
    config = {"scheme": "sharing", "placement": "activation", "targets": "embed"}
    *_, plan, params = adapted_network(inputs, **config)
    params["embed"]["mora"] = perturb(params["embed"]["mora"])
    small = quantized.quantize(params, plan, "int8")
    found = mora_jax.spectrum(small, plan).layers["embed"]
    dense = mora_jax.spectrum(quantized.dequantize(small), plan).layers["embed"]
    assert found.base_norm == dense.base_norm
    assert found.relative_norm == dense.relative_norm > 0


def test_what_is_no_spectrum():
    plan, params = stacked(mora_jax.Sharing())
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(ValueError, match=r"not decomposed: .*layers/mora/matrix_sharing"):
        mora_jax.spectrum(bad, plan)
    with pytest.raises(ValueError, match="threshold must not be negative, got -1"):
        mora_jax.spectrum(params, plan, threshold=-1)
