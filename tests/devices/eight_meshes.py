"""A program for eight devices: a sharded model on several meshes, Auto and Explicit axes.

Run by test_meshes.py in a process of its own. Checks numbers against one device, and prints, as
JSON, the collectives of {baseline, adapted} x {forward pass, whole step} for each case: with a
delta alone, with DoRA, and with a scheme of the examples.
"""

import functools
import itertools
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import mora_jax.sharding
from helpers.devices import collectives
from helpers.schemes import CUSTOM
from mora_jax import export
from mora_jax._arrays.mesh import FeatureSharding, feature_sharding_is
from mora_jax._plans.layer import LayerConfig
from mora_jax._schemes.block_grid import BlockGrid
from mora_jax._schemes.groups import Groups

#: data x fsdp x tensor.
MESHES = {"8x1": (1, 8, 1), "1x8": (1, 1, 8), "4x2": (4, 1, 2), "2x2x2": (2, 2, 2)}
NAMES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
SPECS = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
SCHEMES = {"sharing": mora_jax.Sharing(signs=1), "cycled": mora_jax.Rotation(wrap=True)}
# R is 14, which divides nothing.
WIDTH, HIDDEN = 64, 128
#: I, O, R, cycle: wider and higher, blocks that divide a shard and that do not.
GRIDS = [(32, 64, 6, True), (64, 32, 6, False), (128, 16, 4, True), (16, 128, 3, False)]
#: F, R, and what else a side of sharing has.
GROUPS = [
    (64, 14, {"circular": True, "signs": 3}),
    (128, 14, {"signs": 5}),
    (32, 8, {"circular": True}),
]


def forward(explicit, params, x):
    """Column- and row-parallel, kernels gathered over fsdp where they are used."""
    up, down = params["up"]["kernel"], params["down"]["kernel"]
    hidden, result = P(BATCH, None, "tensor"), P(BATCH, None, None)
    if explicit:
        up, down = reshard(up, P(None, "tensor")), reshard(down, P("tensor", None))
        y = jnp.einsum("btd,df->btf", x, up, out_sharding=hidden)
        return jnp.einsum("btf,fd->btd", jnp.tanh(y), down, out_sharding=result)
    y = jax.lax.with_sharding_constraint(jnp.einsum("btd,df->btf", x, up), hidden)
    y = jnp.einsum("btf,fd->btd", jnp.tanh(y), down)
    return jax.lax.with_sharding_constraint(y, result)


def numbers(*shape):
    rng = np.random.default_rng(len(shape) + shape[-1])
    return jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32)


def alone(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss_of(run, trainable, frozen, x):
    return jnp.square(run(mora_jax.join(trainable, frozen), x)).sum()


def measure(name, kind, scheme, dora=False):
    mesh = jax.make_mesh(MESHES[name], NAMES, axis_types=(kind,) * 3)
    place = functools.partial(NamedSharding, mesh)
    base = {layer: {"kernel": numbers(*shape)} for layer, shape in
            {"down": (HIDDEN, WIDTH), "up": (WIDTH, HIDDEN)}.items()}  # fmt: skip
    x = numbers(8, 4, WIDTH)
    where = {layer: {"kernel": place(spec)} for layer, spec in SPECS.items()}
    sharded, rows = jax.device_put(base, where), jax.device_put(x, place(P(BATCH)))
    run = functools.partial(forward, kind == AxisType.Explicit)
    config = mora_jax.MoRAConfig(rank=1, scheme=scheme, placement="kernel", dora=dora)
    single, many = mora_jax.adapt(alone, config), mora_jax.adapt(run, config)
    with jax.set_mesh(mesh):
        plan = mora_jax.plan(many, sharded, rows)
        assert plan == mora_jax.plan(single, base, x)
        if kind == AxisType.Auto:
            plan = mora_jax.sharding.on_mesh(plan, where, BATCH)
            many = mora_jax.adapt(run, plan)
        params = mora_jax.attach(plan, sharded)
        asked = mora_jax.sharding.param_shardings(plan, where)
        same = lambda leaf, own: leaf.sharding.is_equivalent_to(own, leaf.ndim)
        assert all(jax.tree.leaves(jax.tree.map(same, params, asked)))
        trainable, frozen = mora_jax.split(params, plan)
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(trainable))
        draw = lambda leaf: jax.device_put(leaf + numbers(*leaf.shape), place(P()))
        trainable = jax.tree.map(draw, trainable)
        step = jax.jit(jax.value_and_grad(functools.partial(loss_of, many), (0, 2)))
        step = step.lower(trainable, frozen, rows).compile()
        baseline = jax.jit(jax.value_and_grad(functools.partial(loss_of, run), 2))
        found = {
            "baseline forward": jax.jit(run).lower(sharded, rows).compile(),
            "baseline step": baseline.lower({}, sharded, rows).compile(),
            "forward": jax.jit(many).lower(mora_jax.join(trainable, frozen), rows).compile(),
            "step": step,
        }
        ours = jax.device_get(step(trainable, frozen, rows))

    whole = jax.device_get(trainable)
    theirs = jax.value_and_grad(functools.partial(loss_of, single), (0, 2))(whole, base, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))
    with jax.set_mesh(mesh):
        if name == "2x2x2" and scheme == SCHEMES["sharing"] and not dora:
            check_rounding(plan, mora_jax.join(trainable, frozen), mora_jax.join(whole, base))
            check_pruning(plan, mora_jax.join(trainable, frozen), mesh)
        check_restart(plan, mora_jax.join(trainable, frozen), mora_jax.join(whole, base))
    return {case: collectives(compiled) for case, compiled in found.items()}


def check_parts_of_shards():
    """What each device makes of its own features adds up to what one device makes of all."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = lambda x, name: jax.device_put(x, NamedSharding(mesh, P("data", name)))
    sides = {("tensor", None): (("tensor",), ()), (None, "tensor"): ((), ("tensor",))}
    for in_features, out_features, size, cycle in GRIDS:
        grid = BlockGrid(in_features, out_features, size, cycle)
        x, dy = numbers(8, in_features), numbers(8, out_features)
        for (left, right), axes in sides.items():

            def gradient(x, dy, axes=axes, grid=grid):
                with feature_sharding_is(FeatureSharding(*axes)):
                    return grid.gradient(x, dy)

            with jax.set_mesh(mesh):
                parts = jax.jit(gradient)(place(x, left), place(dy, right))
            assert len(parts) == 4
            np.testing.assert_allclose(parts.sum(0), grid.gradient(x, dy)[0], atol=1e-6)
    for features, size, options in GROUPS:
        x = numbers(8, features)
        groups = Groups(features, size, axes=("tensor",), **options)
        with jax.set_mesh(mesh):
            compiled = jax.jit(groups.partial_sums).lower(place(x, "tensor")).compile()
            parts = compiled(place(x, "tensor"))
        assert len(parts) == 4
        assert not collectives(compiled)["numbers"]
        np.testing.assert_allclose(
            parts.sum(0), Groups(features, size, **options).sum(x), atol=1e-6
        )


def check_double_precision():
    """Parts of shards in float64, whose Python integers are 64 bits wide."""
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    grid = BlockGrid(32, 16, 4, False)
    with (
        jax.enable_x64(True),
        jax.set_mesh(mesh),
        feature_sharding_is(FeatureSharding(("tensor",), ())),
    ):
        x, dy = jnp.ones((2, 32), jnp.float64), jnp.ones((2, 16), jnp.float64)
        parts = jax.jit(grid.gradient)(x, dy)
    assert parts.dtype == np.float64
    assert len(parts) == 8


def check_bank():
    """Adapters that were loaded on one device go into a bank on a mesh."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    spec = mora_jax.AdapterSpec(
        LayerConfig(1, SCHEMES["sharing"]), (8, 8), mora_jax.KernelAxes((0,), (1,))
    )
    plan = mora_jax.Plan((("up", spec),))
    kernel = jax.device_put(numbers(8, 8), NamedSharding(mesh, P("fsdp")))
    params = mora_jax.attach(plan, {"up": {"kernel": kernel}})
    bank = mora_jax.stack_adapters({"one": (params, plan)}, capacity=2)
    matrix = jax.device_put(numbers(4, 4), jax.devices()[1])
    (name,) = params["up"]["mora"]
    bank = bank.add("two", {"up": {"mora": {name: matrix}}}, plan)
    np.testing.assert_array_equal(bank.select("two")["up"]["mora"][name], matrix)


def check_split_adapters():
    """Matrices that are kept in parts are gathered a layer at a time, within the layers' scan."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    place = functools.partial(NamedSharding, mesh)

    def run(params, x):
        layer = lambda x, kernel: (jnp.tanh(x @ kernel), None)
        return jax.lax.scan(layer, x, params["layers"]["kernel"])[0]

    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", placement="kernel", size_multiple=8)
    model = mora_jax.adapt(run, config)
    base, x = {"layers": {"kernel": numbers(4, 64, 64)}}, numbers(8, 64)
    plan = mora_jax.plan(model, base, x)
    (spec,) = plan.values()
    where = {"layers": {"kernel": place(P())}}
    split = mora_jax.sharding.param_shardings(plan, where, split="fsdp")
    assert split["layers"]["mora"]["matrix_sharing"].spec == P(None, "fsdp", None)
    params = mora_jax.attach(plan, base)
    params["layers"]["mora"]["matrix_sharing"] += numbers(
        *params["layers"]["mora"]["matrix_sharing"].shape
    )
    trainable, frozen = mora_jax.split(params, plan)
    model = mora_jax.adapt(run, plan)
    wanted = jax.grad(functools.partial(loss_of, model))(trainable, frozen, x)
    told = mora_jax.adapt(run, mora_jax.sharding.on_mesh(plan, where, "fsdp"))
    placed, others = mora_jax.split(jax.device_put(params, split), plan)
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, place(P("fsdp")))
        step = jax.jit(
            jax.grad(functools.partial(loss_of, told)),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed),
        )
        compiled = step.lower(placed, others, rows).compile()
        found = compiled(placed, others, rows)
        # Run at once, by parameters that lie on one device, the model has nothing to gather.
        np.testing.assert_allclose(told(params, x), model(params, x), rtol=1e-5, atol=1e-6)
    # Once on the way there and once back at most, and never the stack of four; no activations.
    sent = collectives(compiled)
    assert 0 < sent["gathered"] <= 2 * spec.size**2
    assert sent["numbers"] == spec.size**2
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


def check_restart(plan, params, whole):
    """Merging and restarting keep every sharding, and give what one device gives."""
    wanted = mora_jax.merge(whole, plan)
    merged = mora_jax.merge(params, plan)
    optimizer = optax.adam(1e-3)
    trainable, frozen = mora_jax.split(params, plan)
    state = optimizer.init(trainable)
    before = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    before = mora_jax.rename_leaves(before, plan.renamed(plan.advance()))
    params, state, *_ = mora_jax.merge_and_reset(
        params, state, plan, donate=True, optimizer=optimizer
    )
    after = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.is_equivalent_to(b, 2), before, after)))
    _, base = mora_jax.split(params, plan.advance())
    for found in (merged, base):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    del frozen


def check_pruning(plan, params, mesh):
    """The moments that stay are those of one device, and lie in parts as they lay."""
    optimizer = optax.adam(1e-3)
    state = optimizer.init(mora_jax.split(params, plan)[0])
    in_parts = NamedSharding(mesh, P("fsdp"))
    draw = lambda leaf: jax.device_put(numbers(*leaf.shape), in_parts) if leaf.ndim else leaf
    state = jax.tree.map(draw, state)
    alone = jax.tree.map(jnp.asarray, jax.device_get((params, state)))
    for prune in (mora_jax.Prune(0.75), mora_jax.Prune(0.75, by="random")):
        options = {"reset": prune, "key": jax.random.key(0), "optimizer": optimizer}
        many = mora_jax.merge_and_reset(params, state, plan, **options).opt_state
        one = mora_jax.merge_and_reset(*alone, plan, **options).opt_state
        for a, b, before in zip(*map(jax.tree.leaves, (many, one, state)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.sharding.is_equivalent_to(before.sharding, a.ndim)
            assert not a.ndim or 0 < (np.asarray(a) != 0).mean() < 0.4


def check_export(kind, folder):
    """A stack that is split over devices, by its layers too, is written as on one device."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    config = LayerConfig(1, SCHEMES["sharing"])
    spec = mora_jax.AdapterSpec(config, (4, 6, 8), mora_jax.KernelAxes((1,), (2,), (0,)), (0,))
    plan = mora_jax.Plan((("layers/mlp/up_proj", spec),))
    name = config.stored_name("matrix")
    layer = {"kernel": numbers(4, 6, 8), "mora": {name: numbers(4, *[spec.size] * 2)}}
    places = {"kernel": P("fsdp", None, "tensor"), "mora": {name: P("fsdp")}}
    placed = jax.tree.map(lambda x, p: jax.device_put(x, NamedSharding(mesh, p)), layer, places)
    files = {}
    for name, leaves in {"one": layer, "many": placed}.items():
        params, out = {"layers": {"mlp": {"up_proj": leaves}}}, f"{folder}/{kind.name}{name}"
        export.save_merged(out, params, plan, config={"tie_word_embeddings": True})
        files[name] = load_file(f"{out}/model.safetensors")
    assert len(files["many"]) == 4
    for name, tensor in files["one"].items():
        np.testing.assert_array_equal(files["many"][name], tensor)


def check_rounding(plan, params, whole):
    """Random bits are those of one device, and nothing is sent to make them."""
    trainable, _ = mora_jax.split(params, plan)
    narrow = lambda leaf: leaf.astype(jnp.bfloat16)
    options = {"rounding": "stochastic", "key": jax.random.key(5)}
    results = []
    for tree in (params, whole):
        tree = mora_jax.join(trainable, jax.tree.map(narrow, mora_jax.split(tree, plan)[1]))
        merge = functools.partial(mora_jax.merge, plan=plan, **options)
        assert not any(collectives(jax.jit(merge).lower(tree).compile()).values())
        losses = mora_jax.merge_losses(tree, plan, **options)
        results.append((merge(tree), {path: loss.kept for path, loss in losses.items()}))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=0 if getattr(a, "ndim", 0) else 1e-5)


def main():
    with tempfile.TemporaryDirectory() as folder:
        for kind in (AxisType.Auto, AxisType.Explicit):
            check_export(kind, folder)
    found, dora, custom = {}, {}, {}
    for mesh, kind in itertools.product(MESHES, (AxisType.Auto, AxisType.Explicit)):
        for name, scheme in SCHEMES.items():
            if name == "sharing" or mesh == "2x2x2":
                found[f"{mesh} {kind.name} {name}"] = measure(mesh, kind, scheme)
        if mesh == "2x2x2":
            dora[kind.name] = measure(mesh, kind, SCHEMES["sharing"], dora=True)
            custom[kind.name] = measure(mesh, kind, CUSTOM)
    check_parts_of_shards()
    check_double_precision()
    check_bank()
    check_split_adapters()
    print(json.dumps({"delta": found, "dora": dora, "custom": custom}))


if __name__ == "__main__":
    main()
