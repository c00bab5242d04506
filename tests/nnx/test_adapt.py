"""MoRA for NNX: whole models, every kind of layer, training, merges."""

import concurrent.futures

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax
from mora_jax import nnx as mora_nnx
from mora_jax._product.axes import KernelAxes

IDS = jnp.array([[1, 2, 3], [4, 5, 6]])


class OwnEinsum(nnx.Module):
    """A layer with a parameter of its own, as third-party models have."""

    def __init__(self, equation, shape, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.equation = equation

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Einsum("btf,fd->btd", (12, 8), (8,), rngs=rngs)
        self.own = OwnEinsum("btd,ndh->btnh", (2, 8, 4), rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(nnx.relu(self.up(x))) + self.own(x).reshape(x.shape)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.experts = nnx.LinearGeneral(8, 6, batch_axis={0: 3}, rngs=rngs)
        self.stack = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(rngs.split(5))

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        x = nnx.scan(lambda x, layer: x + jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0),
                     out_axes=nnx.Carry)(x, self.stack)  # fmt: skip
        mixed = self.experts(jnp.stack([x] * 3)).sum((0, -1), keepdims=True)[0]
        return self.embed.attend(self.conv(x)) + mixed


KERNELS = {r".*/own/w": KernelAxes((1,), (0, 2))}
LINEAR = {
    "experts": (("kernel"), KernelAxes((1,), (2,), (0,))),
    "stack": ("kernel", KernelAxes((1,), (2,), (0,))),
} | {
    f"blocks/{i}/{path}": found
    for i in range(2)
    for path, found in {
        "attention/query": ("kernel", KernelAxes((0,), (1, 2))),
        "attention/key": ("kernel", KernelAxes((0,), (1, 2))),
        "attention/value": ("kernel", KernelAxes((0,), (1, 2))),
        "attention/out": ("kernel", KernelAxes((0, 1), (2,))),
        "up": ("kernel", KernelAxes((0,), (1,))),
        "down": ("kernel", KernelAxes((0,), (1,))),
        "own": ("w", KernelAxes((1,), (0, 2))),
    }.items()
}
OTHERS = {
    "embed": ("embedding", KernelAxes((0,), (1,))),
    "conv": ("kernel", KernelAxes((0, 1), (2,))),
}


def adapted(**config):
    base = Model(nnx.Rngs(0))
    config = {"rank": 1, "scheme": "sharing", "kernels": KERNELS} | config
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(**config), key=jax.random.key(1))
    return base, model, mora_jax.plan(model)


def runner():
    """Runs models, compiled anew: machine code depends on the fixture `optimized`."""
    return nnx.jit(lambda model: model(IDS))


run = runner()


def numbers(model, kind=nnx.Param):
    return nnx.to_pure_dict(nnx.state(model, kind))


def draw(model):
    """Gives every adapter numbers."""
    state = nnx.state(model, mora_nnx.MoRAParam)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    nnx.update(model, structure.unflatten(drawn))
    return model


@pytest.mark.parametrize(("targets", "wanted"), [("all-linear", LINEAR), (".*", LINEAR | OTHERS)])
def test_the_plan_and_the_graph(targets, wanted):
    base, model, plan = adapted(targets=targets)
    assert {path: (spec.kernel_name, spec.kernel_axes) for path, spec in plan.items()} == wanted
    assert plan.base_parameters == sum(a.size for a in jax.tree.leaves(numbers(Model(nnx.Rngs(0)))))
    without = numbers(model, nnx.All(nnx.Param, nnx.Not(mora_nnx.MoRAParam)))
    chex.assert_trees_all_equal(without, numbers(base))
    # The base is untouched: its classes, its variables.
    assert type(base.blocks[0].up) is nnx.Linear
    assert model.blocks[0].up.kernel is not base.blocks[0].up.kernel
    assert isinstance(model.blocks[0].up, nnx.Linear)
    assert isinstance(model.blocks[0].up.mora.matrix_sharing, nnx.LoRAParam)
    assert mora_jax.Plan.from_json(plan.to_json()) == plan
    again = mora_jax.plan(mora_jax.adapt(base, plan))
    assert again == plan


@pytest.mark.parametrize("placement", ["kernel", "activation"])
def test_new_adapters_change_no_bit(placement, optimized):
    base, model, _ = adapted(targets=".*", placement=placement)
    run = runner()
    np.testing.assert_array_equal(run(model), run(base))


@pytest.mark.parametrize("scheme", ["sharing", mora_jax.Rotation(wrap=True), mora_jax.LowRank()])
def test_merging_gives_a_base_model_of_the_same_outputs(scheme):
    base, model, _ = adapted(targets=".*", scheme=scheme)
    y = run(draw(model))
    merged = mora_nnx.merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(base)
    assert jnp.abs(y - run(base)).max() > 0.05
    np.testing.assert_allclose(run(merged), y, atol=1e-4)


def test_gradients_are_the_merged_models():
    _, model, plan = adapted(targets=".*")
    graph, adapters, rest = nnx.split(draw(model), mora_nnx.MoRAParam, ...)

    def by_layers(adapters, rest):
        return (nnx.merge(graph, adapters, rest, copy=True)(IDS) ** 2).sum()

    def by_merging(adapters, rest):
        full = nnx.merge(graph, adapters, rest, copy=True)
        return (mora_nnx.merge(full)(IDS) ** 2).sum()

    assert len(plan) == len(LINEAR | OTHERS)
    ours, theirs = (jax.jit(jax.grad(run))(adapters, rest) for run in (by_layers, by_merging))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def train(model, optimizer, steps):
    @nnx.jit
    def step(model, optimizer):
        diff = nnx.DiffState(0, mora_nnx.MoRAParam)
        loss, gradients = nnx.value_and_grad(lambda model: (model(IDS) ** 2).mean(), argnums=diff)(
            model
        )
        optimizer.update(model, gradients)
        return loss

    return [float(step(model, optimizer)) for _ in range(steps)]


def test_training_with_nnx_and_restarts():
    base, model, plan = adapted()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=mora_nnx.MoRAParam)
    losses = train(model, optimizer, 20)
    assert losses[-1] < 0.7 * losses[0]
    without = numbers(model, nnx.All(nnx.Param, nnx.Not(mora_nnx.MoRAParam)))
    chex.assert_trees_all_equal(without, numbers(base))

    y, before = run(model), numbers(base)
    report = mora_nnx.merge_and_reset(model, optimizer, donate=False)
    assert report == (len(plan), 2 * len(plan), 1, {})
    np.testing.assert_allclose(run(model), y, atol=1e-4)
    assert not any(leaf.any() for leaf in jax.tree.leaves(numbers(model, mora_nnx.MoRAParam)))
    assert not any(leaf.any() for leaf in jax.tree.leaves(nnx.state(optimizer.opt_state)))
    assert mora_jax.plan(model) == plan.advance() != plan
    chex.assert_trees_all_equal(numbers(base), before)
    losses = train(model, optimizer, 10)
    np.testing.assert_allclose(losses[0], (y**2).mean(), rtol=1e-4)
    assert losses[-1] < losses[0]


def test_states_are_trees_of_parameters():
    base, model, plan = adapted(also_train="embed/embedding")
    y = run(draw(model))
    graph, state = nnx.split(model)
    merged = mora_jax.merge(state, plan)
    assert isinstance(merged, nnx.State)
    nnx.update(base, merged)
    np.testing.assert_allclose(run(base), y, atol=1e-4)
    trainable, frozen = mora_jax.split(state, plan)
    ours, theirs = nnx.split_state(state, mora_nnx.MoRAParam, ...)
    chex.assert_trees_all_equal(trainable, ours)
    chex.assert_trees_all_equal(frozen, theirs)
    again = mora_jax.unmerge(merged, trainable, plan)
    chex.assert_trees_all_close(again, state, atol=1e-6)
    np.testing.assert_allclose(run(nnx.merge(graph, again)), y, atol=1e-4)

    optimizer = mora_jax.freeze_base(optax.adam(1e-2), plan)
    opt_state = optimizer.init(state)
    state, opt_state, plan, report = mora_jax.merge_and_reset(state, opt_state, plan, donate=False)
    assert report == (len(plan), 2 * len(plan), 1, {})
    model = nnx.merge(nnx.graphdef(mora_jax.adapt(base, plan)), state)
    np.testing.assert_allclose(run(model), y, atol=1e-4)


def test_states_of_base_models_take_adapters(optimized):
    base, model, plan = adapted(targets="blocks/.*")
    graph, wanted = nnx.split(model)
    state = mora_jax.attach(plan, nnx.state(base))
    chex.assert_trees_all_equal(state, wanted)
    run = runner()
    np.testing.assert_array_equal(run(nnx.merge(graph, state)), run(base))


def test_unmerging_takes_the_deltas_out_again():
    _, model, _ = adapted(also_train="embed/embedding")
    again = mora_nnx.unmerge(mora_nnx.merge(draw(model)), model)
    assert nnx.graphdef(again) == nnx.graphdef(model)
    chex.assert_trees_all_close(numbers(again), numbers(model), atol=1e-6)


def test_also_train_is_trained_with_the_adapters():
    base, model, plan = adapted(also_train=r"blocks/0/up/kernel|conv/kernel")
    assert dict(plan.also_train) == {"blocks/0/up/kernel": (8, 12), "conv/kernel": (3, 8, 8)}
    assert mora_jax.plan(mora_jax.adapt(base, plan)) == plan
    assert nnx.graphdef(mora_nnx.merge(model)) == nnx.graphdef(base)
    # Two groups, so that the adapters' step count can restart alone.
    optimizer = nnx.Optimizer(
        model, mora_jax.freeze_base(optax.adam(1e-2), plan), wrt=mora_nnx.MoRAParam
    )
    train(model, optimizer, 2)
    after, before = (mora_jax._arrays.paths.flatten(numbers(m)) for m in (model, base))
    changed = {path for path, leaf in before.items() if (leaf != after[path]).any()}
    assert changed == {"blocks/0/up/kernel", "conv/kernel"}
    y = run(model)
    report = mora_nnx.merge_and_reset(model, optimizer, donate=False)
    assert report == (len(plan), 2 * len(plan), 1, {})
    np.testing.assert_allclose(run(model), y, atol=1e-4)


def test_errors_say_what_is_wrong():
    base, model, plan = adapted()
    with pytest.raises(TypeError, match="adapted already"):
        mora_jax.adapt(model, plan)
    with pytest.raises(ValueError, match="key is missing"):
        mora_jax.adapt(base, mora_jax.MoRAConfig(scheme=mora_jax.LowRank(), rank=1))
    with pytest.raises(ValueError, match=r"matches none of the 16 layers"):
        mora_jax.adapt(base, mora_jax.MoRAConfig(targets="nothing", rank=1))
    with pytest.raises(ValueError, match=r"plan has layers at 'blocks/0/.*another model"):
        mora_jax.adapt(base.blocks[0], plan)
    with pytest.raises(ValueError, match="no adapters"):
        mora_jax.plan(base)
    with pytest.raises(ValueError, match=r"key is missing: dropout=0.1 draws"):
        mora_jax.adapt(base, mora_jax.MoRAConfig(rank=1, dropout=0.1))
    with pytest.raises(ValueError, match=r"dropout=0.1 for layer 'embed', a Embed"):
        adapted(targets="embed", kernels=(), dropout=0.1)
    square = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(nnx.Rngs(0).split(4))
    with pytest.raises(ValueError, match=r"stacked along one of .* no other parameter tells which"):
        mora_jax.adapt(square, mora_jax.MoRAConfig(rank=1))


def test_dropout_follows_train_and_eval(optimized):
    run, (_, quiet, _) = runner(), adapted()
    _, model, _ = adapted(dropout=0.5)
    wanted = run(draw(quiet))
    draw(model).eval()
    np.testing.assert_array_equal(run(model), wanted)
    model.train()
    first, second = run(model), run(model)
    assert (first != second).any()
    assert (first != wanted).any()
    np.testing.assert_array_equal(run(nnx.view(model, deterministic=True)), wanted)


def test_two_models_in_threads_do_not_disturb_each_other():
    base = Model(nnx.Rngs(0))
    schemes = ("sharing", mora_jax.Rotation(wrap=True))
    config = {"rank": 1, "kernels": KERNELS, "targets": ".*"}
    models = [
        draw(mora_jax.adapt(base, mora_jax.MoRAConfig(scheme=scheme, **config)))
        for scheme in schemes
    ]

    def traced_anew(model):
        graph, state = nnx.split(model)
        return np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(IDS))(state))

    wanted = [traced_anew(model) for model in (base, *models)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(traced_anew, [base, *models] * 2))
    for ours, theirs in zip(found, wanted * 2, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Each trained by an optimizer of its own; the other keeps every bit.
    optimizer = nnx.Optimizer(models[0], optax.adam(1e-2), wrt=mora_nnx.MoRAParam)
    train(models[0], optimizer, 1)
    assert (traced_anew(models[0]) != wanted[1]).any()
    np.testing.assert_array_equal(traced_anew(models[1]), wanted[2])
