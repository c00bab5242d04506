"""What newcomers type wrong, and what the error must then contain."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax
import mora_jax.nnx as mora_nnx

X = jnp.ones((2, 8))


class Linen(nn.Module):
    """Two layers and a norm."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="v_proj")(nn.LayerNorm(name="norm")(nn.Dense(8, name="q_proj")(x)))


class Nnx(nnx.Module):
    """Two layers."""

    def __init__(self, rngs):
        self.q_proj, self.v_proj = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.v_proj(self.q_proj(x))


BASE, CONFIG = Linen(), mora_jax.MoRAConfig(rank=1, scheme="sharing")
VARIABLES = BASE.init(jax.random.key(0), X)
MODEL = mora_jax.adapt(BASE, CONFIG)
PLAN = mora_jax.plan(MODEL, X)
PARAMS = mora_jax.attach(PLAN, VARIABLES["params"])
OPTIMIZER = mora_jax.freeze_base(optax.adam(1e-3), PLAN)
NNX_BASE = Nnx(nnx.Rngs(0))
NNX_MODEL = mora_jax.adapt(NNX_BASE, CONFIG)


def config(**arguments):
    return lambda: mora_jax.MoRAConfig(**arguments)


#: mistake -> (what is typed, words of the message).
MISTAKES = {
    "attach: swapped": (
        lambda: mora_jax.attach(VARIABLES["params"], PLAN),
        ["expected a Plan, got a dict", "swapped", "attach(plan, params)"],
    ),
    "attach: a config for a plan": (
        lambda: mora_jax.attach(CONFIG, VARIABLES["params"]),
        ["expected a Plan, got a MoRAConfig", "mora_jax.plan("],
    ),
    "attach: variables for their params": (
        lambda: mora_jax.attach(PLAN, VARIABLES),
        ["no parameter at 'q_proj/kernel'", "Give variables['params']"],
    ),
    "attach: an NNX model for its state": (
        lambda: mora_jax.attach(mora_jax.plan(NNX_MODEL), NNX_BASE),
        ["got a Nnx", "nnx.state(model, nnx.Param)"],
    ),
    "attach: twice": (
        lambda: mora_jax.attach(PLAN, PARAMS),
        ["have adapters already: 'q_proj/mora/matrix_sharing'"],
    ),
    "attach: forgotten": (
        lambda: MODEL.apply(VARIABLES, X),
        ["no adapter for the layer 'q_proj'", "mora_jax.attach(plan, params)"],
    ),
    "split: no adapters": (
        lambda: mora_jax.split(VARIABLES["params"], PLAN),
        ["no adapters", "attach(plan, params)"],
    ),
    "merge: swapped": (
        lambda: mora_jax.merge(PLAN, PARAMS),
        ["expected a Plan, got a dict", "swapped"],
    ),
    "merge: an NNX model": (
        lambda: mora_jax.merge(NNX_MODEL, mora_jax.plan(NNX_MODEL)),
        ["got a Nnx", "mora_jax.nnx"],
    ),
    "freeze_base: a config for a plan": (
        lambda: mora_jax.freeze_base(optax.adam(1e-3), CONFIG),
        ["expected a Plan, got a MoRAConfig"],
    ),
    "freeze_base: swapped": (
        lambda: mora_jax.freeze_base(PLAN, optax.adam(1e-3)),
        ["expected an optax transformation, got a Plan", "freeze_base(optimizer, plan)"],
    ),
    "adapt: swapped": (
        lambda: mora_jax.adapt(CONFIG, BASE),
        ["adapt(model, config_or_plan)", "got Linen"],
    ),
    "adapt: twice": (lambda: mora_jax.adapt(MODEL, CONFIG), ["adapted already", "base model"]),
    "adapt: twice, NNX": (
        lambda: mora_jax.adapt(NNX_MODEL, CONFIG),
        ["adapted already", "base model"],
    ),
    "adapt: parameters for a model": (
        lambda: mora_jax.adapt(VARIABLES["params"], CONFIG),
        ["expected a module of linen or NNX", "got a dict"],
    ),
    "plan: the base model": (
        lambda: mora_jax.plan(BASE, X),
        ["no adapters", "adapt(model, config"],
    ),
    "plan: the base model, NNX": (
        lambda: mora_jax.plan(NNX_BASE),
        ["no adapters", "adapt(model, config)"],
    ),
    "config: targets of another model": (
        lambda: mora_jax.plan(mora_jax.adapt(BASE, mora_jax.MoRAConfig(targets="q_prj")), X),
        ["q_prj", "q_proj"],
    ),
    "config: targets of another model, NNX": (
        lambda: mora_jax.adapt(NNX_BASE, mora_jax.MoRAConfig(targets="q_prj")),
        ["q_prj", "q_proj"],
    ),
    "config: alpha": (config(alpha=16), ["no alpha", "LowRank(alpha=...)"]),
    "config: r": (config(r=8), ["no argument 'r'", "rank="]),
    "config: target_modules": (config(target_modules=["q_proj"]), ["write targets="]),
    "config: an unknown scheme": (config(scheme="mora"), ["Unknown scheme 'mora'", "sharing"]),
    "config: a rank of zero": (config(rank=0), ["rank must be a positive integer, got 0"]),
    "merge_and_reset: the state of another optimizer": (
        lambda: mora_jax.merge_and_reset(PARAMS, optax.adam(1e-3).init(PARAMS), PLAN, donate=False),
        ["counts the steps of adapters and of other", "freeze_base(optimizer, plan)"],
    ),
    "merge_and_reset: a state of the base": (
        lambda: mora_jax.merge_and_reset(
            PARAMS, optax.adam(1e-3).init(VARIABLES["params"]), PLAN, donate=False
        ),
        ["none at an adapter's path"],
    ),
    "NNX: a linen model's functions on the model": (
        lambda: mora_nnx.merge(NNX_BASE),
        ["no adapters", "adapt(model, config)"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_says_what_was_given_and_what_to_do(mistake):
    typed, words = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError)) as found:
        typed()
    message = str(found.value)
    assert [word for word in words if word not in message] == [], message


def test_what_is_plain_is_taken():
    assert mora_jax.MoRAConfig(scheme="lora").choose("a").scheme == mora_jax.LowRank()
    config = mora_jax.MoRAConfig(rank=1, targets=["v_proj", "q_proj"])
    assert [*mora_jax.plan(mora_jax.adapt(BASE, config), X)] == ["q_proj", "v_proj"]
    assert config.selects("layers/0/q_proj")
    assert not config.selects("layers/0/fq_proj")


def test_optional_modules_are_attributes():
    for name in ("checkpoint", "export", "linen", "nnx", "peft", "quantized", "sharding"):
        assert getattr(mora_jax, name).__name__ == f"mora_jax.{name}"
    with pytest.raises(AttributeError, match="no attribute 'sharing'"):
        _ = mora_jax.sharing
