"""Merged models and LoRA projections in the files that PyTorch reads."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mora_jax
from helpers.arrays import assert_same_bits
from helpers.files import GOLDEN
from llama.loading import load_hf
from mora_jax import export, peft
from mora_jax._arrays.paths import flatten, unflatten
from mora_jax._plans.layer import LayerConfig
from mora_jax._torch.safetensors_writer import read_header

FOLDER = GOLDEN / "llama_type1"
CONFIG = json.loads((FOLDER / "base" / "config.json").read_text())


@pytest.fixture(scope="module")
def golden():
    """(params, plan): a tiny Llama, its layers stacked, with the authors' adapter."""
    _, pretrained = load_hf(FOLDER / "base")
    return peft.load_adapters(FOLDER / "adapter", pretrained)


def without(params, *paths):
    return unflatten({path: leaf for path, leaf in flatten(params).items() if path not in paths})


def test_the_merged_model_is_the_authors_in_several_files(golden, tmp_path):
    params, plan = golden
    out = tmp_path / "new" / "model"
    export.save_merged(out, params, plan, config=FOLDER / "base", shard_bytes=60_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file: load_file(out / file) for file in sorted(set(index["weight_map"].values()))}
    assert {file.name for file in out.iterdir()} == {
        *(f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)),
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
    }
    assert list(files) == sorted(file.name for file in out.glob("*.safetensors"))
    assert all(sum(t.nbytes for t in own.values()) <= 60_000 for own in files.values())
    assert index["weight_map"] == {name: file for file, own in files.items() for name in own}
    saved = {name: tensor for own in files.values() for name, tensor in own.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved.values())
    wanted = load_file(FOLDER / "merged" / "model.safetensors")
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(saved[name], tensor, rtol=0, atol=1e-6, err_msg=name)
    assert_same_bits(load_hf(out)[1], mora_jax.merge(params, plan))
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert (out.stat().st_mode & 0o777) == (tmp_path / "new").stat().st_mode & 0o777


def test_bfloat16_with_tied_embeddings(golden, tmp_path):
    params, plan = golden
    tied = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), without(params, "lm_head/kernel"))
    tied["norm"]["scale"] = tied["norm"]["scale"].astype(jnp.float32)
    adapters = {p: leaf for p, leaf in flatten(params).items() if p in plan.adapter_leaves()}
    tied = unflatten(flatten(tied) | adapters)
    out, config = tmp_path / "model", {k: v for k, v in CONFIG.items() if "tie" not in k}
    export.save_merged(out, tied, plan, config=config)
    header = read_header(out / "model.safetensors")
    assert "lm_head.weight" not in header
    assert {dtype for name, (dtype, _) in header.items() if name != "model.norm.weight"} == {"BF16"}
    assert header["model.norm.weight"] == ("F32", (48,))
    written = json.loads((out / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["torch_dtype"]) == (True, "bfloat16")
    merged = mora_jax.merge(tied, plan)
    assert_same_bits(load_hf(out, jnp.bfloat16)[1]["layers"], merged["layers"])


def test_a_sum_beyond_the_dtype_is_not_written(golden, tmp_path):
    params, plan = golden
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    trained, frozen = mora_jax.split(half, plan)
    # Finite by themselves, and not in their sums of several entries or with a kernel's.
    large = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e6, jnp.float32), trained)
    with pytest.raises(ValueError, match=r"not written: .*float16 ends at 65504.*'layers/"):
        export.save_merged(tmp_path / "m", mora_jax.join(large, frozen), plan, config=CONFIG)
    assert not (tmp_path / "m").exists()


def layer(shape, inputs, outputs, batch=(), kernel_name="kernel"):
    axes = mora_jax.KernelAxes(inputs, outputs, batch)
    config = LayerConfig(1, mora_jax.Sharing())
    return mora_jax.AdapterSpec(config, shape, axes, tuple(range(len(batch))), kernel_name)


def test_kernels_of_many_axes_and_parameters_of_the_host(tmp_path):
    plan = mora_jax.Plan(
        (
            ("attention/query", layer((6, 2, 4), (0,), (1, 2))),
            ("attention/out", layer((2, 4, 6), (0, 1), (2,))),
            ("experts", layer((6, 3, 2, 10), (0,), (3,), (2, 1))),
        )
    )
    rng = np.random.default_rng(0)
    shapes = {
        path: spec.kernel_shape
        for path, spec in zip(plan.kernel_paths(), plan.values(), strict=True)
    }
    shapes |= {path: leaf.shape for path, leaf in plan.adapter_leaves().items()}
    shapes |= {"experts/bias": (3, 10), "mlp/kernel": (6, 8)}
    leaves = {p: rng.standard_normal(shape).astype(np.float32) for p, shape in shapes.items()}
    names = [
        export.KernelName(
            "attention/out/kernel", "attention.out", mora_jax.KernelAxes((0, 1), (2,))
        ),
        export.KernelName("attention/*/kernel", "attention.*", mora_jax.KernelAxes((0,), (1, 2))),
        export.KernelName("experts/kernel", "{e}.{n}.fc", mora_jax.KernelAxes((0,), (3,), (2, 1))),
        export.KernelName("*/kernel", "*"),
        export.TensorName("experts/bias", "{n}.bias"),
    ]
    params, config = unflatten(leaves), {"tie_word_embeddings": True}
    export.save_merged(tmp_path / "model", params, plan, config=config, names=names)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    merged = mora_jax.merge(params, plan)
    assert len(saved) == 2 + 6 + 3 + 1
    for name, wanted in {
        "attention.query.weight": merged["attention"]["query"]["kernel"].reshape(6, 8).T,
        "attention.out.weight": merged["attention"]["out"]["kernel"].reshape(8, 6).T,
        "1.2.fc.weight": merged["experts"]["kernel"][:, 2, 1].T,
        "2.bias": merged["experts"]["bias"][2],
        "mlp.weight": merged["mlp"]["kernel"].T,
    }.items():
        np.testing.assert_array_equal(saved[name], wanted, err_msg=name)


def refusals(params, plan, empty):
    """(what is said, parameters, plan, options) of calls that save nothing."""
    config = {"config": CONFIG}
    headless, bad = without(params, "lm_head/kernel"), jax.tree.map(lambda x: x * jnp.nan, params)
    extra = {**params, "extra": {"kernel": jnp.ones((3, 3))}}
    norms = {**params, "final": params["norm"]}
    twice = (export.TensorName("final/scale", "model.norm.weight"), *export.LLAMA)
    wide = without(params, "norm/scale") | {"norm": {"scale": jnp.ones(49)}}
    yield (
        "config ties .* would not be read",
        params,
        plan,
        {"config": {"tie_word_embeddings": True}},
    )
    yield "hold no 'lm_head.weight'", headless, plan, config
    yield (
        "not written: .* not finite: .*'layers/mlp/down_proj/mora/matrix_sharing'",
        bad,
        plan,
        config,
    )
    yield "adapters that the plan lacks", params, None, config
    yield "'extra/kernel' matches no name", extra, plan, config
    yield "'norm/scale' and 'final/scale' are both", norms, plan, {**config, "names": twice}
    base = {"config": FOLDER / "base"}
    yield (
        "not the tensors .* missing 'model.norm.weight'",
        without(params, "norm/scale"),
        plan,
        base,
    )
    yield "'model.norm.weight' would have shape", wide, plan, base
    yield "config.json", params, plan, {"config": empty}
    yield "bytes, got '5GB'", params, plan, {**config, "shard_bytes": "5GB"}
    complex_scale = {"norm": {"scale": jnp.ones(48, jnp.complex64)}}
    yield "cannot hold", without(params, "norm/scale") | complex_scale, plan, config


def test_what_is_refused_leaves_nothing_behind(golden, tmp_path):
    for said, params, plan, options in refusals(*golden, tmp_path):
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=said):
            export.save_merged(tmp_path / "model", params, plan, **options)
    assert not list(tmp_path.iterdir())
    for save in (
        lambda path: export.save_merged(path, *golden, config=CONFIG),
        lambda path: export.save_lora(path, *golden, 2),
    ):
        with pytest.raises(ValueError, match="exists already"):
            save(tmp_path)


def test_a_tensor_that_is_not_as_promised_leaves_no_model(golden, tmp_path):
    params, plan = golden
    # JAX narrows float64 of the host, so the merged kernel is not what the header says.
    host = jax.tree.map(np.asarray, params)
    up = host["layers"]["mlp"]["up_proj"]
    up["kernel"] = up["kernel"].astype(np.float64)
    with pytest.raises(ValueError, match=r"up_proj.weight' came as float32"):
        export.save_merged(tmp_path / "model", host, plan, config=CONFIG)
    assert not list(tmp_path.iterdir())


def test_lora_of_the_reported_error(golden, tmp_path):
    params, plan = golden
    report = export.save_lora(tmp_path / "lora", params, plan, 3)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 3, "LORA")
    assert "use_mora" not in config
    assert config["target_modules"] == sorted({module.rpartition("/")[2] for module in plan})
    assert len(tensors) == 2 * len(report.layers) == 2 * 14
    base, merged = (load_file(FOLDER / name / "model.safetensors") for name in ("base", "merged"))
    for layer, found in report.layers.items():
        _, group, name, index = re.fullmatch(r"(layers)/(\w+)/(\w+)\[(\d)\]", layer).groups()
        module = f"model.layers.{index}.{group}.{name}"
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        delta = merged[f"{module}.weight"] - base[f"{module}.weight"]
        error = np.linalg.norm(delta - b @ a) / np.linalg.norm(delta)
        assert 0.1 < found.error < 1
        np.testing.assert_allclose(error, found.error, rtol=1e-4, err_msg=module)


def test_what_a_lora_cannot_hold(golden, tmp_path):
    params, plan = golden
    trained = mora_jax.Plan(plan.layers, also_train=(("norm/scale", (48,)),))
    with pytest.raises(ValueError, match="norm/scale"):
        export.save_lora(tmp_path / "lora", params, trained, 2)
    plan = mora_jax.Plan((("embed_tokens", layer((128, 48), (0,), (1,), kernel_name="embedding")),))
    params = mora_jax.attach(plan, load_hf(FOLDER / "base")[1])
    with pytest.raises(ValueError, match=r"'embed_tokens/embedding' is .* no kernel of a linear"):
        export.save_lora(tmp_path / "lora", params, plan, 2)
    assert not list(tmp_path.iterdir())


def test_a_number_alone_is_a_parameter_too(tmp_path):
    params = {"scale": jnp.float32(3), "none": jnp.zeros((0, 2))}
    names = [export.TensorName("scale", "logit_scale"), export.TensorName("none", "none")]
    config = {"tie_word_embeddings": True}
    export.save_merged(tmp_path / "model", params, None, config=config, names=names)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert (saved["logit_scale"], saved["none"].shape) == (np.float32(3), (0, 2))


def test_of_several_processes_one_writes_a_lora(golden, tmp_path, monkeypatch):
    params, plan = golden
    reports = []
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        reports.append(export.save_lora(tmp_path / "lora", params, plan, 2))
        assert (tmp_path / "lora").exists() == (process == 0)
    assert reports[0] == reports[1]
