"""Adapted linen models: what they compute, where they work, how jit sees them."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mora_jax
from helpers.arrays import assert_same_bits, perturb
from helpers.models import Network, adapted_network
from mora_jax.linen import AdaptedModule

SCHEMES = ["sharing", "rotation", "low_rank"]


def apply(model, params, *args, **kwargs):
    """`model.apply`, jitted: one compilation is faster than hundreds of operations."""
    return jax.jit(functools.partial(model.apply, **kwargs))({"params": params}, *args)


def init(model, inputs):
    return jax.jit(model.init)(jax.random.key(0), inputs)["params"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("placement", ["kernel", "activation"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_new_adapter_changes_no_bit(inputs, scheme, placement, dtype, optimized):
    inputs = inputs.astype(dtype)
    base, pretrained, model, _, params = adapted_network(
        inputs, scheme=scheme, placement=placement, key=jax.random.key(3)
    )
    if dtype == "bfloat16":
        pretrained, params = (
            jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (pretrained, params)
        )
    assert_same_bits(apply(base, pretrained, inputs), apply(model, params, inputs))


def test_a_new_adapter_changes_no_bit_outside_of_jit(inputs, optimized):
    base, pretrained, model, _, params = adapted_network(inputs, module=nn.Dense(6))
    wanted = base.apply({"params": pretrained}, inputs)
    assert_same_bits(wanted, model.apply({"params": params}, inputs))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_placements_agree_in_a_model(inputs, scheme):
    outcomes = []
    for placement in ("kernel", "activation"):
        *_, model, plan, params = adapted_network(
            inputs, scheme=scheme, placement=placement, key=jax.random.key(3)
        )
        trainable, frozen = mora_jax.split(params, plan)

        def loss(trainable, model=model, frozen=frozen):
            return jnp.square(apply(model, mora_jax.join(trainable, frozen), inputs)).sum()

        outcomes.append(jax.jit(jax.value_and_grad(loss))(perturb(trainable)))
    for a, b in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_base_parameters_keep_their_paths(inputs):
    _, pretrained, model, _, params = adapted_network(inputs, scheme="sharing")
    shapes = jax.tree.map(jnp.shape, params)
    initialized = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, initialized) == shapes
    paths = jax.tree.map(jnp.shape, pretrained)
    for layer in ("up", "down"):
        paths["layers"][layer]["mora"] = {"matrix_sharing": (3, 9, 9)}
    paths["embed"]["mora"] = {"matrix_sharing": (7, 7)}
    for layer in ("query", "key", "value", "out"):
        paths["attention"][layer]["mora"] = {"matrix_sharing": (8, 8)}
    assert shapes == paths


def test_stacked_layers_equal_a_loop(inputs):
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = nn.Dense(10, name=f"dense_{i}")(x)
            return x

    class Scan(nn.Module):
        axis: int = 0

        @nn.compact
        def __call__(self, x):
            class Dense(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return nn.Dense(10, name="dense")(x), None

            stack = nn.scan(
                Dense, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
            )
            return stack(name="stack")(x, None)[0]

    config = mora_jax.MoRAConfig(rank=2, scheme="sharing")
    loop = mora_jax.adapt(Loop(), config)
    params = perturb(init(loop, inputs))

    def loss_and_gradient(model, params):
        return jax.jit(
            jax.value_and_grad(lambda p: jnp.square(model.apply({"params": p}, inputs)).sum())
        )(params)

    wanted, wanted_gradient = loss_and_gradient(loop, params)
    for axis in (0, 1, -1):
        scan = mora_jax.adapt(Scan(axis), config)

        def stack(tree, axis=axis):
            trees = [tree[f"dense_{i}"] for i in range(3)]
            return {
                "stack": {"dense": jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)}
            }

        value, gradient = loss_and_gradient(scan, stack(params))
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        for a, b in zip(
            jax.tree.leaves(gradient), jax.tree.leaves(stack(wanted_gradient)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        plan = mora_jax.plan(scan, inputs)
        spec = plan["stack/dense"]
        assert spec.kernel_axes.batch == (axis % 3,)
        merged = mora_jax.merge(stack(params), plan)
        np.testing.assert_allclose(
            apply(Scan(axis), merged, inputs), apply(loop, params, inputs), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_works_under_vmap_and_jit(inputs, scheme):
    *_, model, _, params = adapted_network(inputs, scheme=scheme, key=jax.random.key(3))
    params = perturb(params)
    whole = apply(model, params, inputs)
    rows = jax.jit(jax.vmap(lambda x: apply(model, params, x)))(inputs)
    np.testing.assert_allclose(whole, rows, rtol=1e-4, atol=1e-5)


def test_every_way_into_a_model_is_adapted(inputs):
    base, _, model, _, params = adapted_network(inputs)
    params = perturb(params)
    wanted = apply(model, params, inputs)
    assert not np.allclose(wanted, apply(base, mora_jax.split(params, mora_jax.plan(
        model, inputs))[1], inputs))  # fmt: skip
    for entry in (
        lambda: apply(model, params, inputs, method="__call__"),
        lambda: apply(model, params, inputs, method=Network.__call__),
        lambda: apply(model, params, inputs, method=lambda module, x: module(x)),
        lambda: model.bind({"params": params})(inputs),
        lambda: apply(model.clone(), params, inputs),
    ):
        np.testing.assert_allclose(entry(), wanted, rtol=1e-4, atol=1e-5)

    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

    outer = Outer(model)
    nested = apply(outer, {"inner": params}, inputs)
    np.testing.assert_allclose(nested, wanted, rtol=1e-4, atol=1e-5)
    assert len(mora_jax.plan(outer, inputs)) == 7


def test_methods_and_setup(inputs):
    class Coder(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.Dense(4), nn.Dense(10)

        def __call__(self, x):
            return self.decode(self.encode(x))

        def encode(self, x):
            return self.encoder(x)

        def decode(self, z):
            return self.decoder(z)

    model = mora_jax.adapt(Coder(), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    params = perturb(init(model, inputs))
    code = apply(model, params, inputs, method="encode")
    np.testing.assert_allclose(
        apply(model, params, code, method=Coder.decode), apply(model, params, inputs), rtol=1e-5
    )
    merged = mora_jax.merge(params, mora_jax.plan(model, inputs))
    np.testing.assert_allclose(code, apply(Coder(), merged, inputs, method="encode"), rtol=1e-5)
    assert list(mora_jax.plan(model, inputs, method="encode")) == ["encoder"]


def test_compute_in_bfloat16_with_a_float32_adapter(inputs):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, dtype=jnp.bfloat16)(x)

    model = mora_jax.adapt(Half(), mora_jax.MoRAConfig(rank=2, scheme="sharing"))
    params = perturb(init(model, inputs))
    adapter = params["Dense_0"]["mora"]["matrix_sharing"]
    assert adapter.dtype == jnp.float32
    assert apply(model, params, inputs).dtype == jnp.bfloat16
    loss = lambda p: apply(model, p, inputs).astype(jnp.float32).sum()
    gradient = jax.jit(jax.grad(loss))(params)
    assert gradient["Dense_0"]["mora"]["matrix_sharing"].dtype == jnp.float32
    assert gradient["Dense_0"]["mora"]["matrix_sharing"].any()


def test_the_adapted_kernel_is_frozen_unless_asked(inputs):
    def kernel_gradient(**config):
        *_, model, _, params = adapted_network(inputs, scheme="sharing", **config)
        loss = lambda p: jnp.square(apply(model, p, inputs)).sum()
        return jax.jit(jax.grad(loss))(perturb(params))["embed"]["kernel"]

    assert not kernel_gradient().any()
    assert kernel_gradient(also_train="embed/kernel").any()


def test_dropout_needs_its_own_stream(inputs):
    *_, model, _, params = adapted_network(
        inputs, scheme="sharing", dropout=0.5, targets="embed|attention/.*"
    )
    params = perturb(params)
    quiet = apply(model, params, inputs)
    np.testing.assert_array_equal(quiet, apply(model, params, inputs))
    dropped = [apply(model, params, inputs, rngs={"mora": jax.random.key(i)}) for i in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0], dropped[2])
    assert not np.array_equal(dropped[0], quiet)


def test_the_same_pair_gives_the_same_object(inputs):
    base, config = Network(), mora_jax.MoRAConfig(rank=2)
    model = mora_jax.adapt(base, config)
    assert mora_jax.adapt(base, mora_jax.MoRAConfig(rank=2)) is model
    assert mora_jax.adapt(base, mora_jax.MoRAConfig(rank=3)) is not model
    assert isinstance(model, Network)
    assert isinstance(model, AdaptedModule)
    assert model == model.clone()
    assert hash(model) == hash(model.clone())
    assert model != model.clone(stacked=False)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_what_cannot_be_adapted_is_refused(inputs):
    base, config = Network(), mora_jax.MoRAConfig()
    with pytest.raises(TypeError, match="adapted already"):
        mora_jax.adapt(mora_jax.adapt(base, config), config)
    with pytest.raises(ValueError, match="bound to variables"):
        mora_jax.adapt(base.bind(base.init(jax.random.key(0), inputs)), config)
    with pytest.raises(TypeError, match="expected a module of linen or NNX, a FlaxPre"):
        mora_jax.adapt({}, config)
    with pytest.raises(TypeError, match="expected a MoRAConfig or a Plan, got int"):
        mora_jax.adapt(base, 8)
    with pytest.raises(ValueError, match="no adapters\\. Adapt it first"):
        mora_jax.plan(base, inputs)


class _Jitted(nn.Module):
    """A model with a trace cache of its own."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="dense")(x)


def test_a_models_own_jit_does_not_mix_up_groupings(inputs):
    base = _Jitted()
    pretrained = init(base, inputs)
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=2, scheme="sharing"))
    plan = mora_jax.plan(model, inputs)
    assert jax.tree.map(jnp.shape, init(base, inputs)) == (jax.tree.map(jnp.shape, pretrained))
    params = perturb(mora_jax.attach(plan, pretrained))
    assert mora_jax.plan(model, inputs) == plan
    for _ in range(3):
        np.testing.assert_allclose(
            mora_jax.adapt(base, plan).apply({"params": params}, inputs),
            base.apply({"params": mora_jax.merge(params, plan)}, inputs),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        params, plan = mora_jax.rename_leaves(params, plan.renamed(plan.advance())), plan.advance()


def test_mixins_and_private_methods_are_adapted_too(inputs):
    class Mixin:
        def __call__(self, x):
            return self._encode(x)

    class Mixed(nn.Module, Mixin):
        def setup(self):
            self.dense = nn.Dense(6)

        def _encode(self, x):
            return self.dense(x)

    model = mora_jax.adapt(Mixed(), mora_jax.MoRAConfig(rank=2, scheme="sharing"))
    params = init(model, inputs)
    plan = mora_jax.plan(model, inputs)
    params = perturb(params)
    wanted = Mixed().apply({"params": mora_jax.merge(params, plan)}, inputs)
    bound = model.bind({"params": params})
    np.testing.assert_allclose(bound(inputs), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bound._encode(inputs), wanted, rtol=1e-4, atol=1e-5)


def test_dropout_that_reaches_no_layer_warns(inputs):
    model = mora_jax.adapt(Network(), mora_jax.MoRAConfig(rank=2, scheme="sharing", dropout=0.5))
    with pytest.warns(UserWarning, match="dropout has no effect in 'layers/down', 'layers/up'"):
        mora_jax.plan(model, inputs)


def test_layers_that_no_adapter_reaches_are_named(inputs):
    class Own(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (x.shape[-1], self.features))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="plain")(Own(6, name="own")(x))

    model = mora_jax.adapt(Model(), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    with pytest.raises(ValueError, match=r"no use of `dot_general_cls`.*'own'"):
        mora_jax.plan(model, inputs)
    other = mora_jax.plan(
        mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing")), inputs
    )
    with pytest.raises(ValueError, match=r"layers at '', where the model has none.*'own'"):
        mora_jax.plan(mora_jax.adapt(Model(), other), inputs)


def test_the_root_kernel_may_be_trained_too(inputs):
    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", also_train="kernel")
    model = mora_jax.adapt(nn.Dense(6), config)
    params = perturb(init(model, inputs))
    gradient = jax.grad(lambda p: model.apply({"params": p}, inputs).sum())(params)
    assert gradient["kernel"].any()
