"""Adapters in the format of PEFT and of the authors' fork: bit for bit, and what is refused."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mora_jax
from helpers.arrays import assert_same_bits
from helpers.files import GOLDEN
from helpers.peft_adapters import config_of, planned, stacked_base
from llama.loading import load_hf
from mora_jax import AdapterSpec, KernelAxes, LowRank, Plan, Sharing, export, peft
from mora_jax._arrays.paths import flatten, unflatten
from mora_jax._plans.layer import LayerConfig
from mora_jax.nnx import MoRAParam

TYPES = [1, 2, 3, 4, 6]


def unstacked(params):
    """The same layers side by side, under the names of Hugging Face's Flax Llama."""
    leaves = {}
    for path, leaf in flatten(params).items():
        if path.startswith("layers/"):
            for index, element in enumerate(leaf):
                leaves[path.replace("layers/", f"model/layers/{index}/")] = element
    return unflatten(leaves)


def base_of(params):
    return unflatten({p: leaf for p, leaf in flatten(params).items() if "/mora/" not in p})


def schemes_and_ranks(plan):
    return {path: (spec.scheme, spec.config.rank, spec.shapes) for path, spec in plan.items()}


@pytest.mark.parametrize("name", ["llama_type1", "llama_type6"])
def test_the_authors_adapters_are_written_as_they_write_them(tmp_path, name):
    theirs, ours = GOLDEN / name / "adapter", tmp_path / "deep" / "adapter"
    _, pretrained = load_hf(GOLDEN / name / "base")
    params, plan = peft.load_adapters(theirs, pretrained)
    peft.save_adapters(ours, params, plan)
    assert_same_bits(
        load_file(ours / "adapter_model.safetensors"),
        load_file(theirs / "adapter_model.safetensors"),
    )
    with safe_open(ours / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata().keys() == {"format", "mora_jax_digest"}
        assert file.metadata()["format"] == "pt"
    written, wanted = config_of(ours), config_of(theirs)
    for field in ("use_mora", "mora_type", "r", "rank_pattern", "peft_type", "bias"):
        assert written[field] == wanted[field]
    assert set(written["target_modules"]) == set(wanted["target_modules"])
    assert written.keys() <= wanted.keys()  # the fork refuses fields that it does not know


@pytest.mark.parametrize("scheme", [*map(mora_jax.scheme_from_mora_type, TYPES), LowRank(3.0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trips_keep_every_bit(tmp_path, scheme, dtype):
    plan, params = planned(stacked_base(), scheme, dtype=dtype, dropout=0.25)
    peft.save_adapters(tmp_path / "stacked", params, plan)
    loaded, loaded_plan = peft.load_adapters(tmp_path / "stacked", base_of(params), dtype=None)
    assert_same_bits(loaded, params)
    assert schemes_and_ranks(loaded_plan) == schemes_and_ranks(plan)
    assert {spec.config.dropout for spec in loaded_plan.values()} == {0.25}
    # Layers in a stack and layers side by side are one file.
    side_by_side, plan = peft.load_adapters(
        tmp_path / "stacked", base_of(unstacked(params)), dtype=None
    )
    assert_same_bits(side_by_side, unstacked(params))
    peft.save_adapters(tmp_path / "side_by_side", side_by_side, plan)
    for name in os.listdir(tmp_path / "stacked"):
        first, second = (tmp_path / folder / name for folder in ("stacked", "side_by_side"))
        assert first.read_bytes() == second.read_bytes()


def test_lora_is_peft_s(tmp_path):
    """lora_B @ lora_A, times alpha over the rank, is the transpose of our delta."""
    base = stacked_base(layers=1)
    plan, params = planned(base, LowRank(3.0), ranks={"layers/mlp/up_proj": 4})
    peft.save_adapters(tmp_path / "lora", params, plan)
    assert config_of(tmp_path / "lora")["rank_pattern"] == {"model.layers.0.mlp.up_proj": 4}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    a, b = tensors[prefix + "A.weight"], tensors[prefix + "B.weight"]
    assert (a.shape, b.shape) == ((4, 10), (17, 4))
    merged = mora_jax.merge(params, plan)["layers"]["mlp"]["up_proj"]["kernel"][0]
    np.testing.assert_allclose(merged, (3 / 4 * b @ a).T, rtol=1e-5, atol=1e-6)


def plain_names(params, plan):
    """The parameters without the schemes in the names: a scale of one has no alpha, or the rank."""
    return mora_jax.rename_leaves(params, plan.plain_paths())


def test_ranks_and_alphas_of_single_modules_travel(tmp_path):
    alphas = {"layers/mlp/up_proj": 5.0, "layers/mlp/down_proj": None}
    plan, params = planned(
        stacked_base(),
        lambda path: LowRank(alphas.get(path, 2.0)),
        ranks=[("layers/mlp/up_proj", 3)],
    )
    peft.save_adapters(tmp_path / "lora", params, plan)
    loaded, loaded_plan = peft.load_adapters(tmp_path / "lora", base_of(params))
    assert_same_bits(plain_names(loaded, loaded_plan), plain_names(params, plan))
    scales = {path: spec.scheme.alpha / spec.config.rank for path, spec in loaded_plan.items()}
    assert scales == {
        "layers/self_attn/q_proj": 1.0,
        "layers/mlp/up_proj": 5 / 3,
        "layers/mlp/down_proj": 1.0,
    }
    assert config_of(tmp_path / "lora")["alpha_pattern"] == {
        f"model.layers.{layer}.mlp.up_proj": 5 for layer in (0, 1)
    }


def test_what_peft_says_of_modules_is_heeded(tmp_path):
    """A regular expression, exclusions, patterns of ranks and the scale of rank-stabilised LoRA."""
    rng = np.random.default_rng(0)
    tensors = {}
    for layer, rank in ((0, 4), (1, 2)):
        prefix = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_"
        tensors[prefix + "A.weight"] = rng.standard_normal((rank, 10), np.float32)
        tensors[prefix + "B.weight"] = rng.standard_normal((17, rank), np.float32)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {r"layers\.0\..*_proj": 4},
        "target_modules": r".*\.\d+\.mlp\.(up|down)_proj",
        "exclude_modules": ["down_proj"],
        "peft_version": "0.21.2",
        "lora_bias": False,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    params, plan = peft.load_adapters(tmp_path, base_of(unstacked(stacked_base())))
    assert {path: spec.config.rank for path, spec in plan.items()} == {
        "model/layers/0/mlp/up_proj": 4,
        "model/layers/1/mlp/up_proj": 2,
    }
    layer = params["model"]["layers"]["0"]["mlp"]["up_proj"]["mora"]
    assert plan["model/layers/0/mlp/up_proj"].scheme == LowRank(16.0)  # 16 / 4 = 8 / sqrt(4)
    assert np.array_equal(layer["a_alpha_16"].T, tensors[min(tensors)])
    with pytest.raises(ValueError, match=r"modules of one stack differ: ranks \{4: .*, 2: "):
        peft.load_adapters(tmp_path, stacked_base())


def test_an_adapter_in_mid_cycle_is_written_with_its_true_type(tmp_path):
    base = unflatten({"layers/0/mlp/up_proj/kernel": jnp.ones((10, 17))})
    plan, params = planned(base, Sharing(), cycle="groupings")
    for mora_type in (2, 3):
        params, _, plan, _ = mora_jax.merge_and_reset(params, (), plan, donate=False)
        peft.save_adapters(tmp_path / str(mora_type), params, plan, base_model="merged")
        assert config_of(tmp_path / str(mora_type))["mora_type"] == mora_type
    _, loaded = peft.load_adapters(tmp_path / "2", base_of(params))
    assert loaded.advance().advance()["layers/0/mlp/up_proj"].scheme == (
        mora_jax.scheme_from_mora_type(4)
    )


def test_kernels_of_other_shapes_where_names_state_their_axes(tmp_path):
    """Attention that keeps its heads apart, in an nnx.State; torch has them in the features."""
    axes = {"q_proj": KernelAxes((0,), (1, 2)), "o_proj": KernelAxes((0, 1), (2,))}
    shapes = {"q_proj": (10, 3, 4), "o_proj": (3, 4, 10)}
    names = [
        peft.KernelName(
            f"layers/{{n}}/attn/{name}/w", f"model.layers.{{n}}.self_attn.{name}", kernel
        )
        for name, kernel in axes.items()
    ]
    attention = {name: {"w": nnx.Param(np.zeros(shape))} for name, shape in shapes.items()}
    state = nnx.State({"layers": {0: {"attn": attention}}})
    config = LayerConfig(2, LowRank())
    plan = Plan(
        tuple(
            (f"layers/0/attn/{name}", AdapterSpec(config, shapes[name], kernel, (), "w"))
            for name, kernel in axes.items()
        )
    )
    params = mora_jax.attach(plan, state, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"'layers/0/attn/q_proj/w' matches no name"):
        peft.save_adapters(tmp_path / "lora", params, plan)
    peft.save_adapters(tmp_path / "lora", params, plan, names=names)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn."
    assert tensors[prefix + "q_proj.lora_B.weight"].shape == (12, 2)
    assert tensors[prefix + "o_proj.lora_A.weight"].shape == (2, 12)
    loaded, loaded_plan = peft.load_adapters(tmp_path / "lora", state, names=names)
    assert loaded_plan.kernel_paths() == plan.kernel_paths()
    assert isinstance(loaded["layers"][0]["attn"]["q_proj"]["mora"]["a_alpha_2"], MoRAParam)
    assert_same_bits(
        nnx.to_pure_dict(plain_names(loaded, loaded_plan)),
        nnx.to_pure_dict(plain_names(params, plan)),
    )
    plain = [peft.KernelName("layers/{n}/attn/*/w", "model.layers.{n}.self_attn.*")]
    with pytest.raises(ValueError, match=r"has shape \(10, 3, 4\).*State its axes: KernelName\("):
        peft.load_adapters(tmp_path / "lora", state, names=plain)


def test_names_are_those_of_whole_models(tmp_path):
    assert peft.LLAMA is export.LLAMA
    params = {"embed_tokens": {"embedding": np.zeros((7, 10), np.float32)}}
    layer = AdapterSpec(LayerConfig(2, Sharing()), (7, 10), KernelAxes((0,), (1,)), (), "embedding")
    plan = Plan((("embed_tokens", layer),))
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' in PyTorch, no k"):
        peft.save_adapters(tmp_path / "adapter", mora_jax.attach(plan, params), plan)


@pytest.mark.parametrize(
    ("path", "module", "axes", "message"),
    [
        ("a/*/kernel", "a.b", None, r"as many '\*'"),
        ("a/{n}/kernel", "a.b", None, r"has no \['\{n\}'\]"),
        ("a/{n}/{n}", "a.{n}", None, "a number stands twice"),
        ("a/kernel", "a.{n}", KernelAxes((0,), (1,)), "0 batch axes"),
    ],
)
def test_names_that_cannot_be_are_refused(path, module, axes, message):
    with pytest.raises(ValueError, match=message):
        peft.KernelName(path, module, axes)


@pytest.mark.parametrize(
    ("of_most", "of_up_proj", "message"),
    [
        (mora_jax.Rotation(wrap=True), None, r"lacks Rotation\(wrap=True\) in layers 'layers/m"),
        (mora_jax.Decoupling(), None, r"lacks Decoupling\(\) in .*'layers/self_attn/q_proj'"),
        (mora_jax.Truncation(), None, r"lacks Truncation\(\)"),
        (Sharing(signs=1), None, r"lacks Sharing\(signs=1\)"),
        (Sharing(), Sharing(shift=1), r"\(shift=1\) in layers 'layers/mlp/up_proj'\."),
        (Sharing(), LowRank(), r"one scheme: LowRank in layers 'layers/mlp/up_proj'; Sharing"),
        (Sharing(), mora_jax.Rotation(), r"scheme: Rotation\(\) in layers 'layers/mlp/up_proj';"),
    ],
)
def test_schemes_without_a_type_are_refused_by_layer(tmp_path, of_most, of_up_proj, message):
    special = {"layers/mlp/up_proj": of_up_proj or of_most}
    plan, params = planned(stacked_base(), lambda path: special.get(path, of_most))
    with pytest.raises(ValueError, match=message):
        peft.save_adapters(tmp_path / "adapter", params, plan)
    assert not os.listdir(tmp_path)


def test_what_else_is_not_saved(tmp_path, monkeypatch):
    base = stacked_base()
    plan, params = planned(base, Sharing())
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already"):
        peft.save_adapters(tmp_path / "there", params, plan)
    trained = Plan(plan.layers, also_train=(("embed/embedding", (7, 10)),))
    with pytest.raises(ValueError, match=r"no place for.*'embed/embedding'"):
        peft.save_adapters(tmp_path / "adapter", params, trained)
    with pytest.raises(ValueError, match="'layers/self_attn/q_proj' has no module in names"):
        peft.save_adapters(tmp_path / "adapter", params, plan, names=peft.LLAMA[:1])
    layers = tuple(
        (path, dataclasses.replace(s, config=dataclasses.replace(s.config, size_multiple=8)))
        for path, s in plan.layers
    )
    message = r"'layers/\S+' has a matrix of 8 rows \(size_multiple=8\); the authors' code makes it"
    with pytest.raises(ValueError, match=message):
        peft.save_adapters(tmp_path / "adapter", mora_jax.attach(Plan(layers), base), Plan(layers))
    two = [peft.KernelName(f"layers/mlp/{name}_proj/kernel", "mlp.{n}") for name in ("up", "down")]
    with pytest.raises(ValueError, match=r"one module, 'mlp\.0'"):
        peft.save_adapters(tmp_path / "adapter", params, plan, names=two)
    broken = flatten(params)
    path = "layers/mlp/up_proj/mora/matrix_sharing"
    broken[path] = np.where(np.arange(2)[:, None, None] == 1, np.nan, broken[path])
    with pytest.raises(ValueError, match="adapter of 'layers/mlp/up_proj' is not finite"):
        peft.save_adapters(tmp_path / "adapter", unflatten(broken), plan)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("mora_jax.peft._save.write_tensors", fail)
    with pytest.raises(OSError, match="no space left"):
        peft.save_adapters(tmp_path / "adapter", params, plan)
    assert os.listdir(tmp_path) == ["there"]
    assert not os.listdir(tmp_path / "there")


def test_modules_that_peft_would_confuse_are_refused(tmp_path):
    """PEFT tells modules by the ends of their names."""
    alike = [
        peft.KernelName("layers/mlp/up_proj/kernel", "proj.{n}"),
        peft.KernelName("layers/mlp/down_proj/kernel", "x.proj.{n}"),
    ]
    for ranks, kept, message in (
        ({"layers/mlp/up_proj": 3}, ["down", "up"], r"'x\.proj\.\d' \(layer 'layers/mlp/d"),
        ({}, ["up"], r"'x\.proj\.0', 'x\.proj\.1' are not adapted"),
    ):
        both, params = planned(stacked_base(), Sharing(), ranks=ranks)
        wanted = [f"layers/mlp/{name}_proj" for name in kept]
        ours = Plan(tuple((path, both[path]) for path in wanted))
        tree = {p: v for p, v in flatten(params).items() if "/mora/" not in p}
        tree |= {p: v for p, v in flatten(params).items() if p in ours.adapter_leaves()}
        with pytest.raises(ValueError, match=message):
            peft.save_adapters(tmp_path / "adapter", unflatten(tree), ours, names=alike)


def test_what_is_no_adapter_of_this_model_is_refused(tmp_path):
    plan, params = planned(stacked_base(), Sharing())
    folder = tmp_path / "adapter"
    peft.save_adapters(folder, params, plan)
    with pytest.raises(ValueError, match=r"layers\.1\..*the model has no such modules"):
        peft.load_adapters(folder, stacked_base(layers=1))
    with pytest.raises(ValueError, match=r"lacks 'base_model\.model\.model\.layers\.2\."):
        peft.load_adapters(folder, stacked_base(layers=3))
    with pytest.raises(ValueError, match=r"lora_A\.weight' has shape .*Is the adapter of an"):
        peft.load_adapters(folder, stacked_base(width=20))
    with pytest.raises(ValueError, match=r"has none; left out: 'kernel' matches no name"):
        peft.load_adapters(folder, {"kernel": jnp.zeros((10, 12))})
    with pytest.raises(ValueError, match="have adapters already"):
        peft.load_adapters(folder, params)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        peft.load_adapters(tmp_path / "nowhere", stacked_base())
    (folder / "adapter_model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(ValueError, match="no index is followed"):
        peft.load_adapters(folder, stacked_base())
    (folder / "adapter_model.safetensors.index.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        peft.load_adapters(folder, stacked_base())
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file adapter_model\.safetensors"):
        peft.load_adapters(folder, stacked_base())
