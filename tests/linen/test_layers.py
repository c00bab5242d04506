"""linen layers without a `dot_general_cls`: einsums, experts, convolutions, tied embeddings."""

import functools
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mora_jax
from helpers.arrays import perturb
from helpers.merged import assert_as_merged, schemes_and_placements
from mora_jax._product.axes import KernelAxes

IDS = jnp.array([[1, 2, 3], [4, 5, 6]])


class Block(nn.Module):
    def setup(self):
        self.experts = nn.Einsum((3, 8, 8), "etd,edf->etf", use_bias=False)
        self.query = nn.Einsum((2, 8, 4), "...td,ndh->...tnh")

    def __call__(self, x):
        x = x + self.query(x).reshape(x.shape)
        return x + self.experts(jnp.stack([x.reshape(-1, 8)] * 3)).sum(0).reshape(x.shape), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8, name="embed")
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 1}, split_rngs={"params": True},
                        length=4)(name="stack")  # fmt: skip
        x, _ = stack(embed(ids))
        x = nn.ConvTranspose(8, (3,), name="up")(nn.Conv(8, (3,), name="conv")(x))
        return embed.attend(nn.Dense(8, name="dense")(x))


LINEAR = {
    "dense": ("kernel", KernelAxes((0,), (1,))),
    "stack/experts": ("kernel", KernelAxes((2,), (3,), (1, 0))),
    "stack/query": ("kernel", KernelAxes((2,), (0, 3), (1,))),
}
OTHERS = {
    "embed": ("embedding", KernelAxes((0,), (1,))),
    "conv": ("kernel", KernelAxes((0, 1), (2,))),
}


@functools.cache
def pretrained():
    return jax.jit(Model().init)(jax.random.key(0), IDS)["params"]


def adapted(**config):
    model = mora_jax.adapt(
        Model(), mora_jax.MoRAConfig(**{"rank": 1, "scheme": "sharing"} | config)
    )
    plan = mora_jax.plan(model, IDS)
    return model, plan, mora_jax.attach(plan, pretrained(), key=jax.random.key(1))


def run(model, params):
    return jax.jit(model.apply)({"params": params}, IDS)


@pytest.mark.parametrize(("targets", "wanted"), [("all-linear", LINEAR), (".*", LINEAR | OTHERS)])
def test_the_plan_finds_them(targets, wanted, optimized):
    model, plan, params = adapted(targets=targets)
    assert {path: (spec.kernel_name, spec.kernel_axes) for path, spec in plan.items()} == wanted
    # One matrix for each expert of each layer, and its axes where the layer has them.
    chex.assert_shape(params["stack"]["experts"]["mora"]["matrix_sharing"], (3, 4, 4, 4))
    made = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(run(model, params), run(Model(), pretrained()))


@schemes_and_placements
def test_outputs_and_gradients_are_the_merged_models(scheme, placement):
    model, plan, params = adapted(targets=".*", scheme=scheme, placement=placement)
    of = lambda model: lambda params: run(model, params)
    assert_as_merged(of(model), of(Model()), params, plan)


def test_a_trained_kernel_has_its_gradient():
    def gradient(**config):
        model, _, params = adapted(targets=".*", **config)
        return jax.jit(jax.grad(lambda params: run(model, params).sum()))(params)["embed"]

    assert not gradient()["embedding"].any()
    assert gradient(also_train="embed/embedding")["embedding"].any()


def test_what_cannot_be_adapted_says_so():
    class Diagonal(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.Einsum((2, 8), "td,nd->tnd", use_bias=False)(x))

    model = mora_jax.adapt(Diagonal(), mora_jax.MoRAConfig(rank=1))
    with pytest.raises(ValueError, match=r"einsum 'td,nd->tnd' at 'Einsum_0' contracts no axis"):
        mora_jax.plan(model, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match=r"dropout=0.1 for 'embed', a Embed"):
        adapted(dropout=0.1, targets="embed|stack/query")


def test_models_traced_at_once_do_not_disturb_each_other(optimized):
    cases = {rank: adapted(targets=".*", rank=rank) for rank in (1, 2)}
    run = lambda model, params: model.apply({"params": params}, IDS)  # traced at every call
    wanted = np.asarray(run(Model(), pretrained()))
    outcomes = {}

    def work(rank):
        model, _, params = cases[rank]
        for turn in range(3):
            outcomes[rank, turn] = np.asarray(run(model, params))
            outcomes["base", rank, turn] = np.asarray(run(Model(), pretrained()))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 12
    for outcome in outcomes.values():
        np.testing.assert_array_equal(outcome, wanted)


def test_dropout_needs_its_own_stream():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(nn.remat(Block), variable_axes={"params": 1},
                            split_rngs={"params": True, "mora": True}, length=2)  # fmt: skip
            return stack(name="stack")(x)[0]

    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    config = mora_jax.MoRAConfig(rank=1, scheme="sharing", dropout=0.5)
    model = mora_jax.adapt(Model(), config)
    params = perturb(model.init(jax.random.key(0), x)["params"])
    run = jax.jit(lambda rngs: model.apply({"params": params}, x, rngs=rngs))
    still = Model().apply({"params": mora_jax.merge(params, mora_jax.plan(model, x))}, x)
    np.testing.assert_allclose(run(None), still, rtol=1e-4, atol=1e-4)
    dropped = [run({"mora": jax.random.key(seed)}) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert (dropped[0] != dropped[2]).any()
