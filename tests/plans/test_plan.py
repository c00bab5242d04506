"""Configs and plans: which layers are chosen, what the plan says, what is refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import mora_jax
from helpers.arrays import perturb
from helpers.models import Network, Small, adapted_network
from mora_jax._plans.layer import LayerConfig

ATTENTION = ["attention/query", "attention/key", "attention/value", "attention/out"]
LAYERS = ["embed", "layers/up", "layers/down", *ATTENTION]


def planned(inputs, **config):
    model = mora_jax.adapt(Network(), mora_jax.MoRAConfig(**{"rank": 2, **config}))
    return mora_jax.plan(model, inputs)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, LAYERS),
        ({"targets": "attention/(query|value)"}, ["attention/query", "attention/value"]),
        ({"targets": lambda path: path.startswith("layers")}, ["layers/up", "layers/down"]),
        ({"exclude": "attention/.*"}, LAYERS[:3]),
    ],
)
def test_patterns_choose_layers(inputs, config, layers):
    assert list(planned(inputs, **config)) == layers


def test_layers_may_differ(inputs):
    plan = planned(
        inputs, scheme="sharing", ranks={"layers/.*": 4}, schemes={".*/query": mora_jax.LowRank()}
    )
    assert {path: plan[path].config.rank for path in LAYERS[:2]} == {"embed": 2, "layers/up": 4}
    assert plan["attention/query"].shapes == {"a": (16, 2), "b": (2, 16)}
    assert plan["attention/out"].shapes == {"matrix": (8, 8)}


def test_the_layout_of_every_kernel(inputs):
    plan = planned(inputs, scheme="sharing")
    axes = {
        path: (s.kernel_shape, s.kernel_axes.inputs, s.kernel_axes.outputs, s.kernel_axes.batch)
        for path, s in plan.items()
    }
    assert axes["embed"] == ((10, 16), (0,), (1,), ())
    assert axes["layers/up"] == ((3, 16, 24), (1,), (2,), (0,))
    assert axes["attention/query"] == ((16, 2, 8), (0,), (1, 2), ())
    assert axes["attention/out"] == ((2, 8, 16), (0, 1), (2,), ())


def test_the_plan_is_static_and_travels_as_json(inputs):
    cycle = (mora_jax.Rotation(wrap=True), mora_jax.Rotation())
    plan = planned(inputs, also_train=".*/bias", scheme=cycle[0], cycle=cycle)
    again = mora_jax.Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert jax.tree.leaves(plan) == []
    assert dict(plan.also_train)["layers/up/bias"] == (3, 24)
    adapted = mora_jax.adapt(Network(), plan)
    assert mora_jax.plan(adapted, inputs) == plan


def test_rounded_sizes_stand_in_the_plan_and_in_every_kind_of_model(inputs):
    config = mora_jax.MoRAConfig(rank=3, scheme="sharing", size_multiple=4)
    model = mora_jax.adapt(Small(), config)
    plan = mora_jax.plan(model, inputs)
    assert {path: spec.size for path, spec in plan.items()} == {"embed": 8, "head": 8}
    assert "128 trained parameters" in str(plan)
    again = mora_jax.Plan.from_json(plan.to_json())
    assert again == plan != mora_jax.plan(mora_jax.adapt(Small(), mora_jax.MoRAConfig(3)), inputs)
    params = mora_jax.attach(again, Small().init(jax.random.key(0), inputs)["params"])
    assert params["head"]["mora"]["matrix_sharing"].shape == (8, 8)
    params = perturb(params)
    merged = mora_jax.merge(params, again)
    np.testing.assert_allclose(
        mora_jax.adapt(Small(), again).apply({"params": params}, inputs),
        Small().apply({"params": merged}, inputs),
        rtol=1e-4,
        atol=1e-5,
    )
    linear = mora_jax.adapt(nnx.Linear(10, 16, rngs=nnx.Rngs(0)), config)
    assert linear.mora.matrix_sharing.shape == (8, 8)
    assert linear(inputs).shape == (2, 5, 16)


def test_the_printed_table(inputs):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = nn.Dense(10, name=f"dense_{i}")(x)
            return nn.Dense(8, name="head")(x)

    config = mora_jax.MoRAConfig(rank=2, scheme="sharing", also_train="head/bias")
    plan = mora_jax.plan(mora_jax.adapt(Two(), config), inputs)
    assert str(plan).splitlines() == [
        "layer         kernel   scheme             size  trained",
        "-------------------------------------------------------",
        "dense_* (2x)  10 x 10  Sharing()          6     36",
        "head          10 x 8   Sharing()          6     36",
        "head/bias     8        (trained in full)        8",
        "3 adapters in 3 kernels; 116 trained parameters, 37.66% of the base model's 308",
    ]


def test_abstract_and_static_inputs():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *, scale, deterministic):
            return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(4)(x * scale))

    model = mora_jax.adapt(Model(), mora_jax.MoRAConfig(rank=1))
    x = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    plan = mora_jax.plan(model, x, scale=jnp.ones(()), deterministic=True)
    assert list(plan) == ["Dense_0"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": "layer/up"}, r"targets='layer/up' matches none of the 7 layers.*'layers/up'"),
        ({"exclude": "layers/upp"}, r"exclude='layers/upp' matches none.*'layers/up'"),
        ({"ranks": {"embedding": 4}}, r"ranks\['embedding'\].* matches none.*'embed'"),
        ({"schemes": {"x": "sharing"}}, r"schemes\['x'\].* matches none"),
        (
            {"targets": "attention/(query|valeu)"},
            r"alternative 'valeu' matches none of the 7 layers.* Near it: .*'attention/value'",
        ),
        ({"targets": "embed|attention/(query|valeu)"}, "alternative 'valeu' matches none"),
        ({"targets": "embed|layers/upp"}, "alternative 'layers/upp' matches none.*'layers/up'"),
        ({"exclude": "embed|heads"}, "exclude=.*alternative 'heads' matches none"),
        ({"also_train": ".*/bias|nrm/scale"}, "alternative 'nrm/scale' .*parameters.*'norm/scale'"),
        ({"ranks": {"layers/(up|dwn)": 4}}, "ranks.*alternative 'dwn' matches none"),
        ({"targets": "embed", "ranks": {"layers/up": 4}}, r"\['layers/up'\] matches no layer that"),
        ({"exclude": "embed", "schemes": {"embed": "sharing"}}, "no layer that is adapted.*excl"),
        ({"ranks": {"layers/.*": 4, "layers/up": 8}}, "decides nothing: .*Put it before them"),
        ({"also_train": "norm/scales"}, r"also_train='norm/scales' matches none.*'norm/scale'"),
        ({"exclude": ".*"}, "leaves out every layer"),
        ({"targets": "("}, "no regular expression"),
        ({"scheme": "spiral"}, "Unknown scheme 'spiral'"),
        ({"placement": "middle"}, "placement must be one of"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"ranks": {"embed": 0}}, "rank must be a positive integer, got 0"),
        ({"cycle": "spirals"}, "Unknown cycle"),
    ],
)
def test_configs_that_make_no_sense_are_refused(inputs, config, message):
    with pytest.raises(ValueError, match=message):
        planned(inputs, **config)


def test_configs_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match="must be floating, got 'int32'"):
        mora_jax.MoRAConfig(dtype="int32")
    with pytest.raises(TypeError, match="a regular expression or a callable, got 3"):
        mora_jax.MoRAConfig(targets=3)


def test_a_model_without_linear_layers_is_named(inputs):
    model = mora_jax.adapt(nn.LayerNorm(), mora_jax.MoRAConfig())
    with pytest.raises(ValueError, match="the model has no linear layer to adapt"):
        mora_jax.plan(model, inputs)


def test_a_matrix_larger_than_its_layer_warns_of_dead_entries():
    model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=50, scheme="sharing"))
    with pytest.warns(UserWarning, match="larger than its layer in 1 layers.* 6,715 entries"):
        plan = mora_jax.plan(model, jnp.ones((1, 140)))
    # As many entries of the matrix have no gradient.
    (spec,) = plan.values()
    (gradient,) = jax.tree.leaves(
        jax.grad(lambda m: mora_jax.delta(jnp.arange(140.0), m, 6, spec.scheme).sum())(
            {"matrix": jnp.ones((spec.size, spec.size))}
        )
    )
    assert (gradient == 0).sum() >= spec.dead_entries == spec.size * (spec.size - 6)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": 99}', '{"format": 1, "layers": {"a": {}}}', "[]"]
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="not a plan"):
        mora_jax.Plan.from_json(text)


#: Path of a key in the saved plan -> (what stands there, what is said).
BAD = [
    ((), [1], "it is \\[1\\]: wanted an object"),
    (("format",), 2, "format is 2, this version reads 1"),
    (("format",), None, "format is None: wanted a number"),
    (("more",), 1, "more is not known"),
    (("base_parameters",), ["a"], "base_parameters is \\['a'\\]: wanted a number"),
    (("base_parameters",), -1, "base_parameters is -1"),
    (("base_parameters",), 2.0, "base_parameters is 2.0"),
    (("also_train",), [], "also_train is \\[\\]: wanted an object"),
    (("also_train",), {"b": "complex64"}, "also_train.b is 'complex64': wanted a list"),
    (("layers",), None, "layers is None"),
    (("layers", "a"), 3, r"layers\['a'\] is 3"),
    (("layers", "a", "kernel_name"), [0], r"layers\['a'\].kernel_name is \[0\]: wanted a text"),
    (("layers", "a", "kernel_shape"), [3, True], r"layers\['a'\].kernel_shape is \[3, True\]"),
    (("layers", "a", "kernel_shape"), [3, 2**70], "kernel_shape"),
    (("layers", "a", "kernel_shape"), [0, 6], r"layers\['a'\] has no adapter: features must"),
    (("layers", "a", "kernel_shape"), [3], "kernel_axes is .*below 1"),
    (("layers", "a", "kernel_axes", "outputs"), [7], "kernel_axes is .*different axes below 2"),
    (("layers", "a", "kernel_axes", "outputs"), [0], "wanted each of 2 axes once"),
    (("layers", "a", "kernel_axes", "batch"), None, "batch is None"),
    (("layers", "a", "adapter_batch_axes"), [0], "adapter_batch_axes is .*wanted 0 axes"),
    (("layers", "a", "more"), 1, r"layers\['a'\].more is not known"),
    (("layers", "a", "config", "rank"), "8", r"\['a'\].config.rank is '8'"),
    (("layers", "a", "config", "rank"), 0, "rank must be a positive integer"),
    (("layers", "a", "config", "dtype"), "int32", "must be floating"),
    (("layers", "a", "config", "dtype"), 4, "config.dtype is 4: wanted a text"),
    (("layers", "a", "config", "dropout"), "0", "config.dropout is '0'"),
    (("layers", "a", "config", "dora"), 1, "config.dora is 1: wanted true or false"),
    (("layers", "a", "config", "keep_sums"), "no", "config.keep_sums"),
    (("layers", "a", "config", "cycle"), [[1]], "config.cycle is .*a scheme is an object"),
    (("layers", "a", "config", "cycle"), {}, "config.cycle"),
    (("layers", "a", "config", "scheme"), "sharing", "config.scheme is 'sharing'"),
    (("layers", "a", "config", "scheme", "kind"), ["x"], "Unknown scheme"),
    (("layers", "a", "config", "scheme", "shift"), "1", "shift is '1', wanted a int"),
    (("layers", "a", "config", "scheme", "signs"), True, "signs is True"),
]


def a_plan():
    axes = mora_jax.KernelAxes((0,), (1,))
    spec = mora_jax.AdapterSpec(LayerConfig(1, mora_jax.Sharing()), (3, 6), axes)
    return mora_jax.Plan((("a", spec),))


@pytest.mark.parametrize(("keys", "value", "said"), BAD)
def test_a_key_of_a_saved_plan_that_cannot_be_is_named(keys, value, said):
    fields = {"": json.loads(a_plan().to_json())}
    del fields[""]["digest"]
    place = fields
    *parents, last = ("", *keys)
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(ValueError, match="not a plan: .*" + said):
        mora_jax.Plan.from_json(json.dumps(fields[""]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nests too deeply"),
        (a_plan().to_json().replace("[3, 6]", "[3, Infinity]"), "Infinity is not a number"),
        (a_plan().to_json().replace('"rank": 1', '"rank": 1, "rank": 2'), "'rank' occurs twice"),
        (None, "it is a NoneType"),
    ],
    ids=range(4),
)
def test_text_that_is_not_json_is_no_plan(text, said):
    with pytest.raises(ValueError, match="not a plan: .*" + said):
        mora_jax.Plan.from_json(text)


def test_a_plan_that_was_changed_is_refused():
    text = a_plan().to_json()
    with pytest.raises(ValueError, match=r"damaged. If you changed the text on purpose, leave"):
        mora_jax.Plan.from_json(text.replace('"rank": 1', '"rank": 2'))
    fields = json.loads(text)
    del fields["digest"]
    assert mora_jax.Plan.from_json(json.dumps(fields)) == a_plan()


def test_many_patterns_are_compiled_once(monkeypatch):
    names = [f"layer_{index}" for index in range(700)]
    config = mora_jax.MoRAConfig(ranks=dict.fromkeys(names, 4))
    [config.choose(name) for name in names[::100]]
    monkeypatch.setattr(re, "_compile", None, raising=False)  # `re`'s own, behind its cache of 512
    assert {config.choose(name).rank for name in names[::100]} == {4}


def test_a_cycle_that_cannot_go_on_is_an_error_at_once(inputs):
    cycle = (mora_jax.Sharing(), mora_jax.Rotation())
    assert mora_jax.square_rank(10, 16, 3, cycle[0]) == 9
    with pytest.raises(ValueError, match="a cycle must keep the adapter's shape"):
        planned(inputs, rank=3, scheme=cycle[0], cycle=cycle, targets="embed")
    with pytest.raises(ValueError, match=r"needs Sharing, got Rotation"):
        planned(inputs, scheme="rotation", cycle="groupings")


def test_an_adapter_is_the_same_however_the_model_is_entered(inputs):
    *_, model, plan, _ = adapted_network(inputs)
    assert mora_jax.plan(model, jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)) == plan


def test_the_table_says_what_was_left_alone_and_why():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 8, name="embed")(ids)
            for index in range(2):
                x = nn.Dense(8, name=f"dense_{index}")(x)
            x = nn.Dense(8, name="skipped")(nn.Conv(8, (3,), name="conv")(x))
            return nn.Dense(4, name="head")(x)

    config = {"rank": 1, "scheme": "sharing", "targets": "(dense|skipped).*", "exclude": "skipped"}
    ids = jnp.ones((1, 5), int)

    def lines(model, *inputs):
        plan = mora_jax.plan(mora_jax.adapt(model, mora_jax.MoRAConfig(**config)), *inputs)
        return [line for line in str(plan).splitlines() if line.startswith("left alone")]

    assert sorted(lines(Model(), ids)) == [
        "left alone, excluded: skipped",
        "left alone, not in targets: conv, embed, head",
    ]
    params = Model().init(jax.random.key(0), ids)["params"]
    assert sorted(
        lines(lambda params, ids: Model().apply({"params": params}, ids), params, ids)
    ) == [
        "left alone, enters no product that can be adapted, only conv_general_dilated: conv/kernel",
        "left alone, enters no product that can be adapted, only gather: embed/embedding",
        "left alone, excluded: skipped",
        "left alone, not in targets: head",
    ]
