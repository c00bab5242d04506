"""A model, a plan or a step that is not the parameters' own is refused when it is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax
import mora_jax.nnx as mora_nnx

X = jax.random.normal(jax.random.key(0), (3, 8))
OTHER = (
    r"another scheme for the layer '(up|down)'.*matrix_sharing_signs_1.*Sharing\(\).*matrix_sharing"
)

NNX_OTHER = r"another scheme for the layer 'up'.*matrix_sharing_signs_1.*Sharing\(\) looks"


class Layers(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="down")(nn.Dense(16, name="up")(x))


def function(params, x):
    return x @ params["up"]["kernel"] @ params["down"]["kernel"]


def config(**options):
    return mora_jax.MoRAConfig(**{"rank": 1, "scheme": "sharing"} | options)


def started(base, options):
    """(run of a model, model, plan, parameters) for a linen module or a function."""
    model, params = mora_jax.adapt(base, config(**options)), Layers().init(jax.random.key(1), X)
    params = jax.tree.map(jnp.asarray, params["params"])
    linen = isinstance(base, nn.Module)
    plan = mora_jax.plan(model, X) if linen else mora_jax.plan(model, params, X)
    run = lambda m, p: m.apply({"params": p}, X) if linen else m(p, X)
    return run, model, plan, mora_jax.attach(plan, params, key=jax.random.key(2))


def restarted(params, plan, optimizer=None):
    optimizer = optimizer or mora_jax.freeze_base(optax.adam(1e-3), plan)
    return mora_jax.merge_and_reset(params, optimizer.init(params), plan, donate=False)


@pytest.mark.parametrize("base", [Layers(), function], ids=["linen", "function"])
def test_the_model_of_before_a_restart_is_refused(base):
    run, model, plan, params = started(base, {})
    step = jax.jit(lambda params: run(model, params).sum())
    before = step(params)
    after = restarted(params, plan)
    for old in (lambda: step(after.params), lambda: run(model, after.params)):
        with pytest.raises(ValueError, match=OTHER):
            old()
    with pytest.raises(ValueError, match=OTHER):
        run(mora_jax.adapt(base, config()), after.params)
    new = mora_jax.adapt(base, after.plan)
    np.testing.assert_allclose(run(new, after.params).sum(), before, rtol=1e-5)
    for tree_function in (mora_jax.merge, mora_jax.split, mora_jax.spectrum):
        with pytest.raises(ValueError, match=OTHER):
            tree_function(after.params, plan)


@pytest.mark.parametrize("base", [Layers(), function], ids=["linen", "function"])
def test_a_model_of_another_scheme_is_refused(base):
    run, _, _, params = started(base, {})
    for scheme in ("truncation", "decoupling", mora_jax.Sharing("contiguous")):
        with pytest.raises(ValueError, match=r"matrix_sharing'?, and .* looks for 'matrix_"):
            run(mora_jax.adapt(base, config(scheme=scheme)), params)


def test_another_alpha_is_refused():
    run, _, _, params = started(Layers(), {"scheme": mora_jax.LowRank(alpha=2.0)})
    with pytest.raises(ValueError, match=r"'a_alpha_2', 'b_alpha_2', and LowRank.* 'a', 'b'"):
        run(mora_jax.adapt(Layers(), config(scheme="low_rank")), params)


@pytest.mark.parametrize("base", [Layers(), function], ids=["linen", "function"])
def test_adapters_that_the_model_would_not_use_are_refused(base):
    run, _, _, params = started(base, {})
    with pytest.raises(ValueError, match=r"'?down"):
        run(mora_jax.adapt(base, config(targets="up")), params)


def test_parameters_without_adapters_are_refused():
    run, model, _, params = started(Layers(), {})
    base = Layers().init(jax.random.key(1), X)["params"]
    with pytest.raises(ValueError, match=r"no adapter for the layer 'up'.*mora_jax.attach"):
        run(model, base)
    half = {"up": params["up"], "down": base["down"]}
    with pytest.raises(ValueError, match="no adapter for the layer 'down'"):
        run(model, half)


def test_a_cycle_that_keeps_its_scheme_keeps_its_compiled_step():
    run, model, plan, params = started(Layers(), {"scheme": "rotation"})
    traces = []

    @jax.jit
    def step(params):
        traces.append(None)
        return run(model, params).sum()

    before = step(params)
    after = restarted(params, plan)
    np.testing.assert_allclose(step(after.params), before, rtol=1e-5)
    assert len(traces) == 1
    planned = mora_jax.adapt(model.mora_base, plan)
    assert mora_jax.adapt(model.mora_base, after.plan) is planned
    assert (plan.merges, after.plan.merges, after.plan.advance().merges) == (0, 1, 2)
    assert mora_jax.plan(mora_jax.adapt(model.mora_base, after.plan), X).merges == 1


def test_an_optimizer_goes_on_under_the_new_names():
    run, model, plan, params = started(Layers(), {})
    optimizer = mora_jax.freeze_base(optax.adam(1e-2), plan)
    state = optimizer.init(params)
    for _ in range(3):
        loss = lambda p, m=model: (run(m, p) ** 2).mean()
        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        assert optax.tree.norm(jax.tree.map(jnp.abs, updates)) > 0
        params, state, plan, _ = mora_jax.merge_and_reset(params, state, plan, donate=False)
        model = mora_jax.adapt(Layers(), plan)
    wanted = jax.tree.structure(mora_jax.freeze_base(optax.adam(1e-2), plan).init(params))
    assert jax.tree.structure(state) == wanted
    assert plan["up"].scheme == mora_jax.Sharing(signs=3)


class Nnx(nnx.Module):
    """Two layers."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x))


def test_the_nnx_graph_of_before_a_restart_is_refused():
    model = mora_jax.adapt(Nnx(nnx.Rngs(0)), config())
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=mora_nnx.MoRAParam)
    graph, _ = nnx.split(model)
    gradients = nnx.grad(lambda m: (m(X) ** 2).mean(), argnums=nnx.DiffState(0, mora_nnx.MoRAParam))
    optimizer.update(model, gradients(model))
    before = model(X)
    mora_nnx.merge_and_reset(model, optimizer, donate=False)
    np.testing.assert_allclose(model(X), before, rtol=1e-4, atol=1e-5)
    _, state = nnx.split(model)
    for old in (nnx.merge(graph, state), mora_jax.adapt(Nnx(nnx.Rngs(0)), config())):
        nnx.update(old, state)
        with pytest.raises(ValueError, match=NNX_OTHER):
            old(X)
    step = jax.jit(lambda state: nnx.merge(graph, state)(X))
    with pytest.raises(ValueError, match=NNX_OTHER):
        step(state)
    moments = optimizer.opt_state[0].mu["up"]["mora"]["matrix_sharing_signs_1"]
    assert not moments[...].any()
    assert mora_jax.plan(model).merges == 1
    assert mora_jax.plan(model)["up"].scheme == mora_jax.Sharing(signs=1)
    optimizer.update(model, gradients(model))
    assert model.up.mora.matrix_sharing_signs_1[...].any()


def test_states_of_nnx_restart_as_trees():
    model = mora_jax.adapt(Nnx(nnx.Rngs(0)), config())
    plan, state = mora_jax.plan(model), nnx.state(model, nnx.Param)
    after = restarted(state, plan)
    new = mora_jax.adapt(Nnx(nnx.Rngs(0)), after.plan)
    nnx.update(new, after.params)
    np.testing.assert_allclose(new(X), model(X), rtol=1e-4, atol=1e-5)
    nnx.update(model, after.params)
    with pytest.raises(ValueError, match=NNX_OTHER):
        model(X)


def test_a_plan_that_goes_through_jit_keeps_that_its_base_was_merged_into():
    _, _, plan, params = started(Layers(), {"scheme": "rotation"})
    step = jax.jit(lambda state: state)
    assert step({"params": params, "plan": plan})["plan"].merges == 0
    after = restarted(params, plan)
    assert step({"params": after.params, "plan": after.plan})["plan"].merges == 1
    assert after.plan != plan


def test_plain_dicts_of_another_scheme_are_refused_by_nnx():
    model = mora_jax.adapt(Nnx(nnx.Rngs(0)), config())
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=mora_nnx.MoRAParam)
    mora_nnx.merge_and_reset(model, optimizer)
    plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    other = mora_jax.adapt(Nnx(nnx.Rngs(0)), config())
    nnx.update(other, plain)
    with pytest.raises(ValueError, match=NNX_OTHER):
        other(X)


class Nested(nn.Module):
    """A layer, and one in a block, whose path ends in the other's."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="up")(Block(name="block")(x))


class Block(nn.Module):
    """One layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="up")(x)


def test_a_path_that_ends_in_another_is_not_renamed_with_it():
    base = Nested()
    model = mora_jax.adapt(base, config(schemes={"block/up": "truncation"}))
    plan = mora_jax.plan(model, X)
    params = mora_jax.attach(plan, base.init(jax.random.key(0), X)["params"])
    after = restarted(params, plan)
    mora_jax.adapt(base, after.plan).apply({"params": after.params}, X)
    assert [*after.params["block"]["up"]["mora"]] == ["matrix_truncation"]
    assert [*after.params["up"]["mora"]] == ["matrix_sharing_signs_1"]


class WithDense(nn.Module):
    """A layer with an adapter of its own, and one without."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="b")(mora_jax.MoRADense(8, rank=1, name="a")(x))


def test_layers_with_adapters_of_their_own_stand_in_an_adapted_model():
    base = WithDense()
    model = mora_jax.adapt(base, config(targets="b"))
    params = model.init(jax.random.key(0), X)["params"]
    assert [*mora_jax.plan(model, X)] == ["a", "b"]
    model.apply({"params": params}, X)
    with pytest.raises(ValueError, match="leaves alone: 'c'"):
        model.apply({"params": params | {"c": params["b"]}}, X)


def test_doras_magnitude_is_named():
    run, _, _, params = started(Layers(), {"dora": True})
    with pytest.raises(ValueError, match=r"'up' has a magnitude: .*same dora="):
        run(mora_jax.adapt(Layers(), config()), params)
