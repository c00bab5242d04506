"""What merges into narrow kernels lose, and what an unmerge can know."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax
from helpers.arrays import assert_same_bits, perturb
from helpers.models import Small, adapted_network
from mora_jax._arrays.rounding import random_bits
from mora_jax._merging import remora as _remora
from mora_jax._merging.layer_by_layer import layer_key

KEY = jax.random.key(7)
BF16 = "bfloat16"


def bf16_layer(size, shape=(96, 80)):
    """(plan, params): one bfloat16 kernel of std 0.02, an update of `size` times as much."""
    module = nn.Dense(shape[1], use_bias=False, param_dtype=BF16)
    inputs = jnp.ones((1, shape[0]))
    _, _, _, plan, params = adapted_network(inputs, scheme="sharing", module=module)
    kernel = 0.02 * np.random.default_rng(1).standard_normal(shape)
    adapter = perturb(params["mora"], scale=0.02 * size)
    return plan, {"kernel": jnp.asarray(kernel, BF16), "mora": adapter}


def test_a_hundred_small_merges():
    """1e-4 of the weights, a hundred times: the figures in the README."""
    plan, params = bf16_layer(1e-4, (512, 512))
    start = np.asarray(params["kernel"], np.float64)
    update = np.asarray(plan[""].delta(params["mora"]), np.float64)

    def merges(rounding, kernel):
        def merge(index, kernel):
            options = {"rounding": rounding, "key": jax.random.fold_in(KEY, index)}
            return mora_jax.merge({**params, "kernel": kernel}, plan, **options)["kernel"]

        return jax.lax.fori_loop(0, 100, merge, kernel)

    kept = {}
    for rounding, dtype in (("nearest", BF16), ("stochastic", BF16), ("nearest", "float32")):
        end = jax.jit(merges, static_argnums=0)(rounding, params["kernel"].astype(dtype))
        change = np.asarray(end, np.float64) - start
        kept[rounding, dtype] = np.vdot(change, update) / np.vdot(update, update) / 100
        noise = np.linalg.norm(change / 100 - kept[rounding, dtype] * update)
        print(f"\n{dtype:8}  {rounding:10}  kept {kept[rounding, dtype]:6.1%} of 100 updates, "
              f"noise {noise / np.linalg.norm(update):.2f} times as large", end="")  # fmt: skip
    assert kept["nearest", BF16] < 0.1
    assert abs(kept["stochastic", BF16] - 1) < 0.02
    assert abs(kept["nearest", "float32"] - 1) < 1e-3


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_losses_are_what_numpy_says(rounding):
    module = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(
        16, param_dtype=BF16
    )
    _, _, _, plan, params = adapted_network(jnp.ones((3, 1, 24)), module=module, scheme="sharing")
    params["mora"] = perturb(params["mora"], scale=2e-3)
    before = np.asarray(params["kernel"], np.float64)
    delta = np.asarray(plan[""].delta(params["mora"]), np.float64)
    options = {"rounding": rounding, "key": KEY}
    after = np.asarray(mora_jax.merge(params, plan, **options)["kernel"], np.float64)
    change, norm = after - before, np.linalg.norm
    kept = np.vdot(change, delta) / np.vdot(delta, delta)
    noise = norm(change - kept * delta) / norm(delta)
    error = norm(change - delta) / norm(before + delta)
    losses = mora_jax.merge_losses(params, plan, **options)
    np.testing.assert_allclose(losses[""], (error, kept, noise), rtol=1e-4, atol=1e-4)
    nothing = params | {"mora": jax.tree.map(jnp.zeros_like, params["mora"])}
    assert mora_jax.merge_losses(nothing, plan, **options) == {"": (0, 1, 0)}
    assert_same_bits(mora_jax.merge(nothing, plan, **options)["kernel"], params["kernel"])


def test_a_merge_warns_where_most_of_an_update_is_lost():
    plan, params = bf16_layer(1e-4)
    with pytest.warns(mora_jax.MergeWarning, match=r"worst: '\(root\)' \d\.\d%\..*stochastic"):
        mora_jax.merge(params, plan)
    with warnings.catch_warnings():
        # Raised before anything is given up.
        warnings.simplefilter("error")
        with pytest.raises(mora_jax.MergeWarning):
            mora_jax.merge_and_reset(params, (), plan)
        assert not params["kernel"].is_deleted()
        mora_jax.merge(params, plan, rounding="stochastic", key=KEY)
        jax.jit(mora_jax.merge, static_argnums=1)(params, plan)
        mora_jax.merge(params | {"kernel": params["kernel"].astype(jnp.float32)}, plan)
        mora_jax.merge(*reversed(bf16_layer(1e-2)))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_bits_of_a_stack_are_those_of_its_layers(kind):
    keys = [layer_key(jax.random.key(seed, impl=kind), "up/kernel") for seed in (0, 1)]
    first, second = (random_bits(key, (4, 3, 5), 1) for key in keys)
    loop = [random_bits(jax.random.fold_in(keys[0], layer), (4, 5)) for layer in range(3)]
    np.testing.assert_array_equal(first, jnp.stack(loop, 1))
    assert (first != second).any()


def test_keys():
    module = nn.Sequential((nn.Dense(16, param_dtype=BF16), nn.Dense(16, param_dtype=BF16)))
    _, _, _, plan, params = adapted_network(jnp.ones((1, 16)), module=module, scheme="sharing")
    first = params["layers_0"] | {"mora": perturb(params["layers_0"]["mora"], scale=1e-3)}
    params = {"layers_1": first, "layers_0": first}
    options = {"rounding": "stochastic", "key": KEY}
    merged = mora_jax.merge(params, plan, **options)
    # Equal layers have bits of their own, which depend on the path and on nothing else.
    assert (merged["layers_0"]["kernel"] != merged["layers_1"]["kernel"]).any()
    turned = mora_jax.merge(dict(reversed(params.items())), plan, **options)
    assert_same_bits(merged["layers_0"], turned["layers_0"])
    alone = mora_jax.Plan(plan.layers[1:])
    one = {**params, "layers_0": {name: first[name] for name in ("kernel", "bias")}}
    assert_same_bits(merged["layers_1"], mora_jax.merge(one, alone, **options)["layers_1"])
    other = mora_jax.merge(params, plan, rounding="stochastic", key=jax.random.key(8))
    assert (merged["layers_0"]["kernel"] != other["layers_0"]["kernel"]).any()
    for call in (mora_jax.merge, mora_jax.merge_losses):
        with pytest.raises(ValueError, match=r"key is missing: rounding=\"stochastic\" draws"):
            call(params, plan, rounding="stochastic")
        with pytest.raises(ValueError, match="'up'; there are 'nearest' and 'stochastic'"):
            call(params, plan, rounding="up")
    with pytest.raises(ValueError, match="key is missing"):
        mora_jax.merge_and_reset(params, (), plan, rounding="stochastic")
    with pytest.raises(ValueError, match="key is missing"):
        mora_jax.unmerge(merged, params, plan, rounding="stochastic")


def test_layers_are_rounded_one_after_the_other_in_place():
    module = nn.Sequential([nn.Dense(256, use_bias=False, param_dtype=BF16) for _ in range(8)])
    model = mora_jax.adapt(module, mora_jax.MoRAConfig(rank=4, scheme="sharing"))
    plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 256), jnp.float32))
    kernels = {path: jax.ShapeDtypeStruct((256, 256), BF16) for path in plan.kernel_paths()}
    leaves = kernels | plan.adapter_leaves()
    restart = _remora._restart_donating.lower(leaves, {}, KEY, plan, ((), ()), "stochastic")
    memory = restart.compile().memory_analysis()
    assert memory.alias_size_in_bytes > memory.argument_size_in_bytes - 64
    # Of one layer: the float32 sum, the state of its random bits, and a little.
    assert memory.temp_size_in_bytes < 5 * 256 * 256 * 4


def test_remora_on_a_bfloat16_base_changes_the_output_by_rounding_alone(inputs):
    base, _, _, plan, params = adapted_network(inputs, scheme="sharing", module=Small())
    narrow = lambda leaf: leaf.astype(BF16) if leaf.ndim == 2 else leaf
    trainable, frozen = mora_jax.split(params, plan)
    trainable = perturb(trainable, scale=3e-4)
    params = mora_jax.join(trainable, jax.tree.map(narrow, frozen))
    state = mora_jax.freeze_base(optax.adam(1e-3), plan).init(params)
    before = mora_jax.adapt(base, plan).apply({"params": params}, inputs)
    without = base.apply({"params": jax.tree.map(narrow, frozen)}, inputs)
    forward = jax.jit(mora_jax.adapt(base, plan.advance()).apply)
    changes = []
    for seed in range(24):
        key = jax.random.key(seed)
        result = mora_jax.merge_and_reset(
            params, state, plan, key=key, donate=False, rounding="stochastic"
        )
        after = forward({"params": result.params}, inputs)
        np.testing.assert_allclose(after, before, atol=0.02)
        changes.append(after - without)
    losses = result.report.losses
    assert losses.keys() == plan.keys()
    assert losses == mora_jax.merge_losses(params, plan, rounding="stochastic", key=key)
    assert all(loss.noise > 0.5 for loss in losses.values())
    assert f"of the update of {min(losses, key=lambda p: losses[p].kept)!r}" in str(result.report)
    # The adapters' effect is a small one, all of it there in the mean.
    effect, change = np.asarray(before - without).ravel(), np.mean(changes, 0).ravel()
    assert np.abs(effect).max() < 0.02
    assert abs(np.vdot(change, effect) / np.vdot(effect, effect) - 1) < 0.15


def possible_kernels(merged, delta):
    """How many bfloat16 numbers a merge to nearest would have made this of; by trying them all."""
    every = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    sums = (every + np.float32(delta)).astype(jnp.bfloat16)
    return np.count_nonzero(sums == merged)


@pytest.mark.parametrize("size", [1e-3, 0.3])
def test_an_unmerge_says_what_it_cannot_know(size):
    plan, params = bf16_layer(size, (12, 40))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mora_jax.MergeWarning)
        merged = mora_jax.merge(params, plan)
    restored = mora_jax.unmerge(merged, params, plan)["kernel"]
    delta = np.asarray(plan[""].delta(params["mora"]))
    with np.errstate(over="ignore"):
        counts = np.vectorize(possible_kernels)(np.asarray(merged["kernel"]), delta)
    same = np.asarray(restored == params["kernel"])
    assert counts.min() >= 1
    assert same[counts == 1].all()
    share = mora_jax.unmerge_losses(merged, params, plan)[""]
    np.testing.assert_allclose(share, np.mean(counts > 1), atol=1e-6)
    if size == 0.3:
        assert not same.all()
        assert 0.1 < share < 0.5
        # As near as the rounding of the merge was.
        off = np.abs(np.asarray(restored, np.float32) - np.asarray(params["kernel"], np.float32))
        assert (off <= np.abs(np.asarray(merged["kernel"], np.float32)) / 128).all()


def test_a_stochastic_merge_is_undone_with_its_key():
    plan, params = bf16_layer(1e-3)
    options = {"rounding": "stochastic", "key": KEY}
    merged = mora_jax.merge(params, plan, **options)
    restored = mora_jax.unmerge(merged, params, plan, **options)
    share = mora_jax.unmerge_losses(merged, params, plan, **options)[""]
    differ = lambda tree: float(jnp.mean(tree["kernel"] != params["kernel"]))
    assert differ(restored) <= share < 0.02
    assert differ(mora_jax.unmerge(merged, params, plan)) > 0.1


def test_nnx_takes_the_same_options():
    base = nnx.Linear(24, 16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = mora_jax.adapt(base, mora_jax.MoRAConfig(rank=2, scheme="sharing"))
    model.mora.matrix_sharing[...] += 1e-5
    state, plan, options = nnx.state(model, nnx.Param), mora_jax.plan(model), {"key": KEY}
    with pytest.warns(mora_jax.MergeWarning):
        mora_jax.nnx.merge(model)
    options["rounding"] = "stochastic"
    merged = mora_jax.nnx.merge(model, **options)
    wanted = mora_jax.merge(nnx.to_pure_dict(state), plan, **options)
    assert_same_bits(merged.kernel[...], wanted["kernel"])
    back = mora_jax.nnx.unmerge(merged, model, **options)
    assert float(jnp.mean(back.kernel[...] == base.kernel[...])) > 0.9
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=mora_jax.nnx.MoRAParam)
    losses = mora_jax.merge_losses(state, plan, **options)
    assert mora_jax.nnx.merge_and_reset(model, optimizer, **options).losses == losses
    assert_same_bits(model.kernel[...], wanted["kernel"])
