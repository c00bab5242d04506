"""Budgets of parameters: scores against gradients by hand, what they cost, what they buy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax
from helpers.models import Block, adapted_network
from mora_jax._analysis.allocate import gradient_moments


class Stack(nn.Module):
    """A stack of layers, and a norm."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.LayerNorm(name="norm")(scan(name="layers")(x, None)[0])


def chain(params, x):
    """Layers one after the other; their names are no patterns."""
    for layer in sorted(params):
        x = jnp.tanh(x @ params[layer]["kernel"])
    return x


def adapted_chain(shapes, **config):
    """(plan, params with new adapters, loss of inputs and outputs)."""
    rng = np.random.default_rng(0)
    base = {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)}
        for name, shape in shapes.items()
    }
    model = mora_jax.adapt(chain, mora_jax.MoRAConfig(**{"scheme": "sharing", **config}))
    width = next(iter(shapes.values()))[0]
    plan = mora_jax.plan(model, base, jax.ShapeDtypeStruct((1, width), "float32"))
    params = mora_jax.attach(plan, base, key=jax.random.key(0))
    return plan, params, lambda params, batch: jnp.square(model(params, batch[0]) - batch[1]).sum()


def batches_of(count, inputs, outputs):
    rng = np.random.default_rng(1)
    shape = rng.standard_normal
    return [(shape((4, inputs)) + 1, shape((4, outputs)) + 1) for _ in range(count)]


SHAPES = {"a+b": (16, 24), "a.b": (24, 16), "c": (16, 16)}


@pytest.mark.parametrize("count", [1, 3])
def test_gains_are_those_of_the_formula(count):
    plan, params, loss = adapted_chain(SHAPES, rank=2)
    batches = batches_of(count, 16, 16)
    found = mora_jax.allocate(params, plan, loss, batches, 0.5)
    gradients = [jax.grad(loss)(params, batch) for batch in batches]
    for path, score in found.scores.items():
        g = np.stack([gradient[path]["mora"]["matrix_sharing"] for gradient in gradients])
        pairs = [a * b for (i, a), (j, b) in itertools.product(enumerate(g), repeat=2) if i != j]
        signal = np.mean(pairs, axis=0) if count > 1 else g[0] ** 2
        gain = (signal / np.sqrt(np.mean(g**2, axis=0))).sum()
        np.testing.assert_allclose(score.gains, gain, rtol=1e-4)
        if count == 1:
            np.testing.assert_allclose(gain, np.abs(g[0]).sum(), rtol=1e-5)
            assert score.signal == 1


def test_noise_gains_nothing_however_large():
    def forward(params, x):
        return x @ params["signal"]["kernel"], x @ params["noise"]["kernel"]

    base = {name: {"kernel": jnp.ones((16, 16))} for name in ("signal", "noise")}
    model = mora_jax.adapt(forward, mora_jax.MoRAConfig(rank=2, scheme="sharing"))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16)))
    plan = mora_jax.plan(model, base, x)

    def loss(params, sign):
        signal, noise = model(params, x)
        return signal.sum() + 100 * sign * noise.sum()

    params = mora_jax.attach(plan, base)
    found = mora_jax.allocate(params, plan, loss, [1.0, -1.0], 0.5, ranks=[2])
    assert found.config.ranks == (("signal", 2),)
    assert found.scores["noise"].gain == 0 == found.scores["noise"].signal
    # One batch cannot know.
    found = mora_jax.allocate(params, plan, loss, [1.0], 0.5, ranks=[2])
    assert found.config.ranks == (("noise", 2),)


def test_a_batch_costs_less_than_a_step_and_forms_no_kernels_gradient():
    plan, params, loss = adapted_chain(dict.fromkeys("abc", (64, 64)), rank=2)
    batch = tuple(jax.ShapeDtypeStruct((2048, 64), "float32") for _ in range(2))
    optimizer = optax.adamw(1e-3)
    adapters, base = mora_jax.split(params, plan)

    def step(adapters, state, base, batch):
        value, gradient = jax.value_and_grad(lambda a: loss(mora_jax.join(a, base), batch))(
            adapters
        )
        updates, state = optimizer.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    def flops(function, *arguments):
        return function.lower(*arguments).compile().cost_analysis()["flops"]

    scoring = flops(gradient_moments, loss, adapters, base, batch)
    one_step = flops(jax.jit(step), adapters, optimizer.init(adapters), base, batch)
    full = flops(jax.jit(jax.grad(loss)), params, batch)
    product = 2 * 2048 * 64 * 64
    # Three products forward and two back: the first layer's input needs no gradient.
    assert 5 * product < scoring < 6.5 * product
    assert scoring < one_step
    assert full == pytest.approx(scoring, rel=0.05)  # kernels' own gradients are zero by `frozen`
    by_hand = jax.grad(lambda base, batch: jnp.square(chain(base, batch[0]) - batch[1]).sum())
    assert flops(jax.jit(by_hand), base, batch) > scoring + 1.5 * product


def test_the_config_is_the_allocation(inputs):
    config = {
        "rank": 2,
        "scheme": "sharing",
        "schemes": {"layers/up": "decoupling"},
        "cycle": None,
        "also_train": "norm/.*",
        "dtype": "bfloat16",
        "dora": True,
        "size_multiple": 2,
    }
    base, pretrained, model, plan, params = adapted_network(inputs, module=Stack(), **config)

    def loss(params, x):
        return jnp.square(model.apply({"params": params}, x) - 1).sum()

    found = mora_jax.allocate(params, plan, loss, [inputs, -inputs], 0.5)
    again = mora_jax.plan(mora_jax.adapt(base, found.config), inputs)
    chosen = {path: score.rank for path, score in found.scores.items() if score.rank}
    assert {path: spec.config.rank for path, spec in again.items()} == chosen
    uniform = sum(spec.parameters for spec in plan.values())
    assert sum(spec.parameters for spec in again.values()) == found.spent <= found.budget
    assert found.budget == uniform // 2
    assert again.also_train == plan.also_train
    for path, spec in again.items():
        assert spec.scheme == plan[path].scheme
        assert spec.config.dtype == "bfloat16"
    assert found.scores["layers/up"].gains.shape == (3,)  # by layer; they share one rank
    assert mora_jax.attach(again, pretrained).keys() == pretrained.keys()


def test_the_budget_is_spent_as_well_as_can_be():
    plan, params, loss = adapted_chain(SHAPES, rank=2)
    batches = batches_of(2, 16, 16)
    found = mora_jax.allocate(params, plan, loss, batches, 300, ranks=[1, 2, 4])

    def worth(sizes):
        scores = found.scores.values()
        return sum(score.gain * math.log(size) for score, size in zip(scores, sizes, strict=True))

    # Sizes of the squares, by hand: sqrt((in + out) * rank), rounded; none larger than 16.
    squares = [[36, 81, 169], [36, 81, 169], [36, 64, 121]]
    affordable = [sizes for sizes in itertools.product(*squares) if sum(sizes) <= 300]
    spent = [score.spent for score in found.scores.values()]
    assert spent in [list(sizes) for sizes in affordable]
    # What greed leaves over is less than one more step, and so is what it misses.
    gain = sum(score.gain for score in found.scores.values())
    assert worth(spent) >= max(map(worth, affordable)) - 0.03 * gain
    richer = mora_jax.allocate(params, plan, loss, batches, 10**6, ranks=[1, 2, 4])
    assert richer.spent == 169 + 169 + 121
    assert str(richer).splitlines()[-1] == (
        "3 of 3 kernels adapted; 459 trained parameters of 1,000,000"
    )


def test_a_layer_gets_the_share_of_the_budget_that_it_has_of_the_gains():
    weights = {"large": 4.0, "middle": 2.0, "small": 0.2}

    def forward(params, x):
        return sum(w * (x @ params[name]["kernel"]).sum() for name, w in weights.items())

    base = {name: {"kernel": jnp.ones((64, 64))} for name in weights}
    model = mora_jax.adapt(forward, mora_jax.MoRAConfig(rank=8, scheme="sharing"))
    x = jnp.ones((2, 64))
    plan = mora_jax.plan(model, base, x)
    found = mora_jax.allocate(mora_jax.attach(plan, base), plan, model, [x], 0.5)
    ranks = {path: score.rank for path, score in found.scores.items()}
    # 991, 495 and 50 numbers; no gain is too small for the smallest rank.
    assert ranks == {"large": 7, "middle": 3, "small": 1}
    assert found.spent == 30**2 + 20**2 + 11**2


def test_nnx():
    base = nnx.Linear(16, 12, rngs=nnx.Rngs(0))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=2, scheme="sharing"))
    graph, state = nnx.split(model)
    loss = lambda state, x: jnp.square(nnx.merge(graph, state)(x) - 1).sum()
    found = mora_jax.allocate(state, mora_jax.plan(model), loss, [jnp.ones((2, 16))], 1.0)
    assert mora_jax.plan(mora_jax.adapt(base, found.config)).trained_parameters == found.spent > 0


@pytest.mark.parametrize(
    ("budget", "ranks", "batches", "text"),
    [
        (1.5, None, 1, "a fraction of the plan's 226, above 0 and up to 1, got 1.5"),
        (0, None, 1, "budget must be a positive int or a fraction, got 0"),
        (True, None, 1, "got True"),
        (10, None, 1, "a budget of 10 parameters buys no adapter: the smallest has 36"),
        (100, [64], 1, "none of the ranks fits any layer"),
        (100, None, 0, "batches is empty"),
    ],
)
def test_what_is_no_budget(budget, ranks, batches, text):
    plan, params, loss = adapted_chain(SHAPES, rank=2)
    with pytest.raises(ValueError, match=text):
        mora_jax.allocate(params, plan, loss, batches_of(batches, 16, 16), budget, ranks=ranks)


def test_gradients_that_say_nothing():
    plan, params, _ = adapted_chain(SHAPES, rank=2)
    with pytest.raises(ValueError, match="no adapter has a gradient"):
        mora_jax.allocate(params, plan, lambda params, x: x, [1.0], 0.5)
    bad = lambda params, x: jnp.nan * params["c"]["mora"]["matrix_sharing"].sum()
    with pytest.raises(
        ValueError, match=r"the gradients of 'c/mora/matrix_sharing' are not finite"
    ):
        mora_jax.allocate(params, plan, bad, [1.0], 0.5)
