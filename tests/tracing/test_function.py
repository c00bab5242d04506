"""Any function of parameters, without a hook: einsum layers, stacks, experts, tied weights."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mora_jax
from helpers.merged import assert_as_merged, schemes_and_placements
from mora_jax._product.axes import KernelAxes

IDS = jnp.array([[1, 2, 3]])


def parameters():
    shapes = {
        "embedder": {"table": (11, 8)},
        "norm": {"scale": (8,)},
        "query": {"w": (4, 8, 6)},
        "mlp": {"gating": (2, 10, 8), "linear": (10, 8)},
        "layers": {"dense": {"kernel": (3, 8, 8), "bias": (3, 8)}},
        "experts": {"w": (5, 8, 7)},
    }
    paths, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(paths))
    draw = [0.3 * jax.random.normal(k, s) for k, s in zip(keys, paths, strict=True)]
    return structure.unflatten(draw)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def model(params, ids):
    """Has in it what layers of their own have: nothing here takes a `dot_general`."""
    table = params["embedder"]["table"]
    x = jnp.take(table, ids, axis=0) * params["norm"]["scale"]
    query = jnp.einsum("btd,ndh->btnh", x, params["query"]["w"])

    @jax.checkpoint
    def mlp(x):
        gate, up = params["mlp"]["gating"]
        hidden = jnp.einsum("btd,fd->btf", x, gate) * jax.nn.relu(x @ up.T)
        return doubled(hidden) @ params["mlp"]["linear"]

    @jax.jit
    def layer(x, weights):
        return x + jnp.tanh(x @ weights["kernel"] + weights["bias"]), None

    x, _ = jax.lax.scan(layer, x + mlp(x), params["layers"]["dense"])
    experts = jnp.einsum("ebtd,edf->ebtf", jnp.stack([x] * 5), params["experts"]["w"])
    return {"logits": x @ table.T, "query": query, "experts": experts}


AXES = {
    "query": ("w", KernelAxes((1,), (0, 2))),
    "mlp/gating": ("", KernelAxes((2,), (1,), (0,))),
    "mlp/linear": ("", KernelAxes((0,), (1,))),
    "layers/dense": ("kernel", KernelAxes((1,), (2,), (0,))),
    "experts": ("w", KernelAxes((1,), (2,), (0,))),
    "embedder": ("table", KernelAxes((1,), (0,))),
}


def adapted(**config):
    params = parameters()
    forward = mora_jax.adapt(model, mora_jax.MoRAConfig(rank=1, **config))
    plan = mora_jax.plan(forward, params, IDS)
    return forward, plan, mora_jax.attach(plan, params, key=jax.random.key(1))


def test_the_plan_reads_axes_off_the_products():
    _, plan, params = adapted(scheme="sharing")
    assert {path: (spec.kernel_name, spec.kernel_axes) for path, spec in plan.items()} == AXES
    chex.assert_shape(params["mlp"]["mora"]["gating"]["matrix_sharing"], (2, 4, 4))
    chex.assert_shape(params["layers"]["dense"]["mora"]["matrix_sharing"], (3, 4, 4))
    assert mora_jax.Plan.from_json(plan.to_json()) == plan


def test_new_adapters_change_no_bit(optimized):
    forward, _, params = adapted(scheme="sharing")
    chex.assert_trees_all_equal(jax.jit(forward)(params, IDS), jax.jit(model)(parameters(), IDS))


@schemes_and_placements
def test_outputs_and_gradients_are_the_merged_models(scheme, placement):
    forward, plan, params = adapted(scheme=scheme, placement=placement)
    of = lambda run: lambda params: run(params, IDS)
    assert_as_merged(of(forward), of(model), params, plan)


def test_no_gradient_of_a_kernel_is_formed():
    def flops(params_of):
        params = {"dense": {"w": jnp.ones((64, 64))}}
        x = jnp.ones((128, 64))
        function = lambda params, x: jnp.einsum("td,dh->th", x, params["dense"]["w"])
        forward = mora_jax.adapt(function, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
        plan = mora_jax.plan(forward, params, x)
        trainable, frozen = mora_jax.split(mora_jax.attach(plan, params), plan)
        run = {"hooked": forward, "merged": lambda p, x: function(mora_jax.merge(p, plan), x)}

        def loss(trainable, x):
            return jnp.sum(run[params_of](mora_jax.join(trainable, frozen), x) ** 2)

        gradient = jax.jit(jax.grad(loss, (0, 1)))
        return gradient.lower(trainable, x).compile().cost_analysis()["flops"]

    # Of three large products one is the kernel's gradient.
    assert flops("hooked") < 0.75 * flops("merged")


def test_low_precision_copies_of_a_kernel_are_followed(optimized):
    def function(params, x):
        return x @ params["w"].astype(jnp.bfloat16)

    params, x = {"w": jnp.ones((8, 4))}, jnp.ones((3, 8), jnp.bfloat16)
    forward = mora_jax.adapt(function, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    plan = mora_jax.plan(forward, params, x)
    assert list(plan) == [""]
    y = forward(mora_jax.attach(plan, params), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, function(params, x))


def test_training_and_merging():
    forward, plan, params = adapted(scheme="sharing", also_train="norm/scale")
    optimizer = mora_jax.freeze_base(optax.adam(1e-2), plan)
    state, base = optimizer.init(params), parameters()

    @jax.jit
    def step(params, state):
        loss = lambda params: sum(jnp.mean(y**2) for y in forward(params, IDS).values())
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    chex.assert_trees_all_equal(params["experts"]["w"], base["experts"]["w"])
    assert jnp.any(params["norm"]["scale"] != base["norm"]["scale"])

    before = forward(params, IDS)
    chex.assert_trees_all_close(model(mora_jax.merge(params, plan), IDS), before, atol=1e-4)
    params, state, plan, _ = mora_jax.merge_and_reset(params, state, plan, donate=False)
    forward = mora_jax.adapt(model, plan)
    chex.assert_trees_all_close(forward(params, IDS), before, atol=1e-4)


def test_derivatives_of_ones_own_stay(optimized):
    # By the name that the library's own product has, which must say nothing.
    @jax.custom_jvp
    def frozen_product(x, w):
        return x @ w

    @frozen_product.defjvp
    def _(primals, tangents):
        return primals[0] @ primals[1], -(tangents[0] @ primals[1])

    params, x = {"w": jnp.ones((4, 3)), "v": {"w": jnp.ones((3, 2))}}, jnp.ones((2, 4))
    function = lambda params, x: frozen_product(x, params["w"]) @ params["v"]["w"]
    forward = mora_jax.adapt(function, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    plan = mora_jax.plan(forward, params, x)
    assert [*plan] == ["v"]
    of = lambda run, params: jax.grad(lambda x: run(params, x).sum())(x)
    np.testing.assert_array_equal(of(forward, mora_jax.attach(plan, params)), of(function, params))


def test_numbers_may_be_keys_and_kernels_may_stand_on_the_left():
    params, x = {"layers": {0: {"w": jnp.ones((5, 4))}}}, jnp.ones((4, 3))
    function = lambda params, x: jnp.einsum("oi,ib->ob", params["layers"][0]["w"], x)
    forward = mora_jax.adapt(function, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    plan = mora_jax.plan(forward, params, x)
    params = mora_jax.attach(plan, params)
    params["layers"][0]["mora"]["matrix_sharing"] += 1
    merged = mora_jax.merge(params, plan)
    assert list(merged["layers"]) == [0]
    np.testing.assert_allclose(forward(params, x), function(merged, x), rtol=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Perceptron:
    """A model that is a pytree of its own."""

    weights: list

    def __call__(self, x):
        for weight in self.weights:
            x = jnp.tanh(weight @ x)
        return x


def test_models_that_are_pytrees(optimized):
    tree = Perceptron([jnp.ones((5, 4)), jnp.ones((3, 5))])
    params, restore = mora_jax.as_params(tree)
    forward = mora_jax.adapt(
        lambda params, x: restore(params)(x), mora_jax.MoRAConfig(rank=1, scheme="sharing")
    )
    plan = mora_jax.plan(forward, params, jnp.ones(4))
    assert {path: spec.features for path, spec in plan.items()} == {
        "weights/0": (4, 5),
        "weights/1": (5, 3),
    }
    params = mora_jax.attach(plan, params)
    np.testing.assert_array_equal(forward(params, jnp.ones(4)), tree(jnp.ones(4)))
    chex.assert_trees_all_equal(restore(mora_jax.merge(params, plan)), tree)


def test_errors_say_what_is_wrong():
    forward, _, params = adapted(scheme="sharing")
    with pytest.raises(TypeError, match="adapted already"):
        mora_jax.adapt(forward, mora_jax.MoRAConfig())
    with pytest.raises(ValueError, match="no adapters; call attach"):
        forward(parameters(), IDS)
    del params["experts"]["mora"]
    with pytest.raises(ValueError, match="no parameter at 'experts/mora/matrix_sharing'"):
        forward(params, IDS)
    nothing = mora_jax.adapt(model, mora_jax.MoRAConfig(targets="nothing"))
    with pytest.raises(ValueError, match=r"targets='nothing' matches none of the 6 layers"):
        mora_jax.plan(nothing, parameters(), IDS)
    with pytest.raises(TypeError, match=r"something else at 'weights'.*as_params"):
        mora_jax.plan(nothing, {"weights": [jnp.ones((2, 2))]}, IDS)


def test_a_function_without_kernels_says_what_was_seen():
    params = {
        "conv": {"w": jnp.ones((3, 8, 8)), "b": jnp.ones(8)},
        "table": {"w": jnp.ones((5, 8), jnp.int8)},
        "idle": {"w": jnp.ones((2, 2))},
    }

    def function(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["conv"]["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        return y + params["conv"]["b"] + params["table"]["w"][0]

    forward = mora_jax.adapt(function, mora_jax.MoRAConfig())
    seen = (
        r"no kernel to adapt\. Of its 4 parameters: 'conv/w' \(3, 8, 8\) enters no product that "
        r"can be adapted, only conv_general_dilated; 'table/w' \(5, 8\) has the dtype int8, not a "
        r"floating one; 'idle/w' \(2, 2\) is not used\. .*targets="
    )
    with pytest.raises(ValueError, match=seen):
        mora_jax.plan(forward, params, jnp.ones((2, 6, 8)))


def test_a_users_own_product_is_no_layer(optimized):
    @jax.custom_jvp
    def frozen_product(a, b):
        return a @ b

    frozen_product.defjvp(lambda p, t: (p[0] @ p[1], 3.0 * (t[0] @ p[1])))
    function = lambda params, x: frozen_product(x, params["w"])
    params, x = {"w": jnp.ones((6, 5))}, jnp.ones((3, 6))
    forward = mora_jax.adapt(function, mora_jax.MoRAConfig(rank=2, scheme="sharing"))
    with pytest.raises(ValueError, match=r"'w' \(6, 5\) enters no product.*custom_jvp_call"):
        mora_jax.plan(forward, params, x)
    # A plan that was made without it keeps the rule too: the kernel is summed before.
    plain = mora_jax.adapt(lambda params, x: x @ params["w"], forward.mora_chooser)
    plan = mora_jax.plan(plain, params, x)
    forward = mora_jax.adapt(function, plan)
    adapted = mora_jax.attach(plan, params)
    gradient = jax.grad(lambda x: forward(adapted, x).sum())(x)
    np.testing.assert_array_equal(gradient, 15 * jnp.ones((3, 6)))


def test_dropout_needs_a_key():
    params = {
        "one": {"w": jnp.zeros((4, 4))},
        "stack": {"w": jnp.zeros((3, 4, 4))},
    }

    def function(params, x):
        stacked, _ = jax.lax.scan(lambda y, w: (y, x @ w.T), x, params["stack"]["w"])[1], None
        return {"one": x @ params["one"]["w"], "stack": stacked}

    x = jnp.ones((20_000, 4))
    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", dropout=0.25)
    forward = mora_jax.adapt(function, config)
    plan = mora_jax.plan(forward, params, x)
    params = mora_jax.attach(plan, params)
    params["one"]["mora"]["matrix_sharing"] = jnp.eye(4)
    params["stack"]["mora"]["matrix_sharing"] = jnp.stack([jnp.eye(4)] * 3)
    chex.assert_trees_all_equal(forward(params, x)["stack"], jnp.ones((3, 20_000, 4)))
    y = forward(params, x, mora_key=jax.random.key(0))
    for product in (y["one"], *y["stack"]):
        np.testing.assert_allclose(product.mean(), 1.0, atol=0.02)
        np.testing.assert_allclose((product == 0).mean(), 0.25, atol=0.02)
    assert (y["stack"][0] != y["stack"][1]).any()


@pytest.mark.parametrize(
    "scheme", ["sharing", mora_jax.Rotation(wrap=True), mora_jax.LowRank(alpha=3.0)], ids=str
)
def test_experts_in_ragged_groups(scheme):
    def function(params, x, sizes):
        def layer(x, w):
            return x + jnp.tanh(jax.lax.ragged_dot(x, w.astype(x.dtype).mT, sizes)), None

        x, _ = jax.lax.scan(layer, x, params["stack"]["w"])
        return jax.lax.ragged_dot(x, params["experts"]["w"], sizes)

    draw = lambda *shape: 0.3 * jax.random.normal(jax.random.key(len(shape)), shape)
    params = {"stack": {"w": draw(2, 3, 8, 8)}, "experts": {"w": draw(3, 8, 5)}}
    inputs = draw(10, 8), jnp.array([4, 0, 5])
    forward = mora_jax.adapt(function, mora_jax.MoRAConfig(rank=1, scheme=scheme))
    plan = mora_jax.plan(forward, params, *inputs)
    assert plan["experts"].kernel_axes == KernelAxes((1,), (2,), (0,))
    assert plan["stack"].kernel_axes == KernelAxes((3,), (2,), (0, 1))
    params = mora_jax.attach(plan, params, key=jax.random.key(0))
    of = lambda run: lambda params: run(params, *inputs)
    assert_as_merged(of(forward), of(function), params, plan)
