"""What a linen plan refuses or leaves alone, and what each module of a model gets."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mora_jax
from helpers.arrays import perturb

X = jax.random.normal(jax.random.key(0), (2, 6))
CONFIG = mora_jax.MoRAConfig(rank=1, scheme="sharing")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(6, name="dense")(x)


class Stack(nn.Module):
    """Repeated blocks, of which `nn.jit` traces the first alone."""

    jitted: bool = True

    @nn.compact
    def __call__(self, x):
        block = nn.jit(Block) if self.jitted else Block
        for index in range(3):
            x = block(name=f"block_{index}")(x)
        return x


class Pair(nn.Module):
    """Modules in a field and in `setup`, under `nn.jit` too."""

    inner: nn.Module

    def setup(self):
        self.blocks = [nn.jit(Block)() for _ in range(2)]

    @nn.remat
    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.inner(x)


class Tied(nn.Module):
    """Hugging Face's way: the head runs on the embedding by an `apply` of its own."""

    def setup(self):
        self.embed, self.dense = nn.Embed(11, 6), nn.Dense(6)
        self.head = nn.Dense(11, use_bias=False)

    def __call__(self, ids):
        x = self.dense(self.embed(ids))
        kernel = self.embed.variables["params"]["embedding"].T
        return self.head.apply({"params": {"kernel": kernel}}, x)


class Agent(nn.Module):
    def setup(self):
        self.encoder, self.actor, self.critic = nn.Dense(6), nn.Dense(4), nn.Dense(4)

    def __call__(self, x):
        return self.actor(self.encoder(x))

    def value(self, x):
        return self.critic(self.encoder(x))

    def both(self, x):
        return self(x), self.value(x)


def planned(base, *inputs, config=CONFIG, params=None, **kwargs):
    """(adapted model, plan, parameters with drawn adapters)."""
    model = mora_jax.adapt(base, config)
    plan = mora_jax.plan(model, *inputs, **kwargs)
    if params is None:
        params = base.init(jax.random.key(0), *inputs, **kwargs)["params"]
    return model, plan, perturb(mora_jax.attach(plan, params))


def assert_merges(base, model, plan, params, *inputs):
    ours = model.apply({"params": params}, *inputs)
    merged = base.apply({"params": mora_jax.merge(params, plan)}, *inputs)
    np.testing.assert_allclose(ours, merged, rtol=1e-4, atol=1e-5)


def test_repeated_jitted_blocks_have_adapters_and_schemes_of_their_own():
    schemes = {"block_1/dense": mora_jax.Sharing("contiguous", "contiguous")}
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", schemes=schemes, cycle=None)
    # A plan of the same model without nn.jit, such as one that was saved.
    _, plan, params = planned(Stack(jitted=False), X, config=config)
    model, found, _ = planned(Stack(), X, config=config)
    assert found == plan
    assert len(plan) == 3
    assert_merges(Stack(), model, plan, params, X)
    assert_merges(Stack(), mora_jax.adapt(Stack(), plan), plan, params, X)


def test_jitted_blocks_of_setup_and_modules_in_fields():
    base = Pair(nn.Sequential([nn.Dense(4), nn.Dense(6)]))
    model, plan, params = planned(base, X)
    assert sorted(plan) == ["blocks_0/dense", "blocks_1/dense", "inner/layers_0", "inner/layers_1"]
    assert_merges(base, mora_jax.adapt(base, plan), plan, params, X)
    assert_merges(base, model, plan, params, X)


def test_a_module_under_an_apply_of_its_own_is_left_alone():
    ids = jnp.array([[1, 2, 3]])
    model, plan, params = planned(Tied(), ids)
    assert list(plan) == ["dense"]
    assert ("head", "under an `apply` of its own") in plan.unadapted
    assert_merges(Tied(), model, plan, params, ids)
    with pytest.raises(ValueError, match=r"targets='head' matches no layer .*under an `apply`"):
        planned(Tied(), ids, config=mora_jax.MoRAConfig(targets="head"))
    with pytest.raises(ValueError, match="the layer 'embed' has a kernel that is also read by"):
        planned(Tied(), ids, config=mora_jax.MoRAConfig(targets="embed|dense"))


def test_a_kernel_that_the_model_returns_or_writes_is_refused():
    class Returns(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(6, name="layer")
            return layer(x), layer.variables["params"]["kernel"]

    class Writes(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(6, name="layer")
            layer(x)
            kernel = layer.variables["params"]["kernel"]
            layer.put_variable("params", "kernel", jnp.sin(kernel))
            return layer(x)

    with pytest.raises(ValueError, match="'layer' has a kernel that is also returned"):
        planned(Returns(), X)
    with pytest.raises(ValueError, match="'layer' multiplies by a kernel that is computed"):
        planned(Writes(), X)


def test_what_a_module_refuses_is_right_as_a_function():
    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4)
            return nn.tanh(layer(x)) @ layer.variables["params"]["kernel"].T

    base = Autoencoder()
    with pytest.raises(ValueError, match="or adapt the model as a function of its parameters"):
        planned(base, X)
    function = lambda params, x: base.apply({"params": params}, x)
    params = base.init(jax.random.key(0), X)["params"]
    model = mora_jax.adapt(function, CONFIG)
    plan = mora_jax.plan(model, params, X)
    params = perturb(mora_jax.attach(plan, params))
    merged = function(mora_jax.merge(params, plan), X)
    np.testing.assert_allclose(model(params, X), merged, rtol=1e-4, atol=1e-5)


def test_a_decoding_cache_does_not_stop_a_plan():
    base = nn.MultiHeadDotProductAttention(2, decode=True)
    plan = mora_jax.plan(mora_jax.adapt(base, CONFIG), jnp.ones((2, 5, 6)), jnp.ones((2, 5, 6)))
    assert len(plan) == 4


def test_a_model_may_have_an_init_of_its_own():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6)(x)

        def init(self, key):
            return super().init(key, X)

    model = mora_jax.adapt(Own(), CONFIG)
    plan = mora_jax.plan(model, X)
    params = perturb(mora_jax.attach(plan, Own().init(jax.random.key(0))["params"]))
    assert_merges(Own(), model, plan, params, X)
    assert model.init(jax.random.key(0))["params"].keys() == params.keys()


def test_a_method_that_the_plan_has_not_seen_says_so():
    params = Agent().init(jax.random.key(0), X, method="both")["params"]
    model, _, adapted = planned(Agent(), X, params=params)
    with pytest.raises(ValueError, match=r"no adapter for the layer 'critic'.*method="):
        model.apply({"params": adapted}, X, method="value")
    with pytest.raises(ValueError, match=r"no adapter for the layer 'encoder'.*mora_jax.attach"):
        model.apply({"params": params}, X)
    model, plan, adapted = planned(Agent(), X, params=params, method=Agent.both)
    assert sorted(plan) == ["actor", "critic", "encoder"]
    value = model.apply({"params": adapted}, X, method="value")
    merged = mora_jax.merge(adapted, plan)
    wanted = Agent().apply({"params": merged}, X, method="value")
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_without_linear_layers_says_what_it_has():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("w", nn.initializers.lecun_normal(), (6, 4))
            return nn.Conv(3, (2,), name="conv")(x @ kernel)

    with pytest.raises(ValueError, match=r"no linear layer.*\(root\) \(Own\).*conv \(Conv\).*targ"):
        planned(Own(), X)


def test_copies_are_rebuilt_from_the_base():
    model, plan, params = planned(Stack(), X)
    wanted = model.apply({"params": params}, X)
    twin = copy.deepcopy(model)
    assert twin == model
    assert twin is not model
    for again in (twin, copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert mora_jax.plan(again, X) == plan
        np.testing.assert_array_equal(again.apply({"params": params}, X), wanted)
    assert not pickle.loads(pickle.dumps(model.clone(jitted=False))).jitted


def test_intermediates_are_the_base_models():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.Conv(8, (3,))(x))

    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", targets=".*")
    model, _, params = planned(Model(), X[None], config=config)
    base = Model().init(jax.random.key(0), X[None])["params"]
    kept = [
        each.apply({"params": tree}, X[None], capture_intermediates=True)[1]["intermediates"]
        for each, tree in ((model, params), (Model(), base))
    ]
    assert jax.tree.map(jnp.shape, kept[0]) == jax.tree.map(jnp.shape, kept[1])


def test_what_is_trained_in_full_is_not_left_alone():
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", targets="dense", also_train="head/.*")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.Dense(6, name="dense")(x))

    text = str(planned(Model(), X, config=config)[1])
    assert "left alone" not in text
    assert "1 adapter in 1 kernel;" in text
