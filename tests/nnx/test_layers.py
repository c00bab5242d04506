"""Single NNX layers: `MoRALinear`, subclasses, shared weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax
from helpers.arrays import draw_adapters
from mora_jax import nnx as mora_nnx
from mora_jax._product.axes import KernelAxes


def test_the_layer_is_a_linear_layer(optimized):
    layer = mora_nnx.MoRALinear(6, 4, rank=1, scheme="sharing", rngs=nnx.Rngs(0))
    plain, x = nnx.Linear(6, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 6))
    np.testing.assert_array_equal(layer(x), plain(x))
    y = draw_adapters(layer)(x)
    np.testing.assert_allclose(mora_nnx.merge(layer)(x), y, atol=1e-6)
    assert not jnp.allclose(y, plain(x))


def test_masks_of_dropout_differ_from_call_to_call():
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", dropout=0.5)
    for base in (Own(6, 4, rngs=nnx.Rngs(0)), nnx.Linear(6, 4, rngs=nnx.Rngs(0))):
        model, x = (
            draw_adapters(mora_jax.adapt(base, config, key=jax.random.key(0))),
            jnp.ones((20, 6)),
        )
        assert (model(x) != model(x)).any()


@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_base_products_with_derivatives_of_their_own(placement):
    @jax.custom_vjp
    def rounded(x, w):
        return x @ jnp.round(w, 2)

    rounded.defvjp(lambda x, w: (x @ jnp.round(w, 2), w), lambda w, g: (g @ w.T, None))

    def product(lhs, rhs, dimension_numbers, **options):
        return rounded(lhs, rhs)

    base, x = nnx.Linear(6, 4, dot_general=product, rngs=nnx.Rngs(0)), jnp.ones((2, 6))
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", placement=placement)
    model = mora_jax.adapt(base, config)
    of = lambda model: jax.grad(lambda x: model(x).sum())(x)
    np.testing.assert_allclose(of(model), of(base), rtol=1e-6)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(self.first(x))


def test_weights_that_two_layers_share_are_refused():
    config = mora_jax.MoRAConfig(rank=1)
    with pytest.raises(ValueError, match="'first/kernel', 'second/kernel' are one tied weight"):
        mora_jax.adapt(Tied(nnx.Rngs(0)), config)


def test_one_adapter_a_layer():
    class Experts(nnx.Module):
        def __init__(self):
            self.up, self.down = nnx.Param(jnp.ones((4, 6))), nnx.Param(jnp.ones((6, 4)))

    config = mora_jax.MoRAConfig(rank=1, kernels={"up|down": KernelAxes((0,), (1,))})
    with pytest.raises(ValueError, match=r"several kernels, '(up|down)'.*one adapter"):
        mora_jax.adapt(Experts(), config)


class Own(nnx.Linear):
    """Ignores `dot_general`, and has methods that call each other."""

    def __call__(self, x):
        return self.project(x) + 1

    def project(self, x):
        return x @ self.kernel[...]

    def note(self, x):
        return {"kind": "own", "sizes": x.shape, "y": self.project(x)}


def test_a_layer_that_ignores_its_field_is_adapted_all_the_same():
    base, x = Own(6, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 6))
    model = draw_adapters(mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, scheme="sharing")))
    merged = mora_nnx.merge(model)
    assert jnp.abs(model(x) - base(x)).max() > 0.05
    np.testing.assert_allclose(model(x), merged(x), atol=1e-6)
    np.testing.assert_allclose(model.project(x), merged.project(x), atol=1e-6)
    noted = model.note(x)
    assert (noted["kind"], noted["sizes"]) == ("own", (2, 6))
    np.testing.assert_allclose(noted["y"], merged.project(x), atol=1e-6)
