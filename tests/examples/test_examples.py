"""The examples' own parts: the Llama, its checkpoints, its generation; a tiny main job."""

import json
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import memorize
from analysis import allocate
from helpers.files import GOLDEN
from llama.loading import load_hf
from llama.model import Llama, LlamaConfig, generate

BASE = GOLDEN / "llama_type1" / "base"


def test_generation_with_padding_equals_recomputing_every_token():
    config, params = load_hf(BASE)
    model, rng = Llama(config), np.random.default_rng(0)
    prompts = rng.integers(3, config.vocab_size, (3, 7))
    mask = np.arange(7) >= np.array([[0], [2], [5]])
    generated = generate(model, params, prompts, mask, 6)
    forward = jax.jit(model.apply)
    for row, real, answer in zip(prompts, mask, generated, strict=True):
        text = row[real]
        for token in np.asarray(answer):
            logits = forward({"params": params}, np.pad(text, (0, 16 - len(text)))[None])
            assert logits[0, len(text) - 1].argmax() == token
            text = np.append(text, token)
    whole = forward({"params": params}, prompts)
    last = model.apply({"params": params}, prompts, last=True)
    np.testing.assert_allclose(last, whole[:, -1:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="pad the prompts on the left"):
        generate(model, params, prompts, mask[:, ::-1], 6)


def test_remat_changes_nothing():
    config, params = load_hf(BASE)
    tokens = jnp.arange(16)[None]

    def gradient(remat):
        model = Llama(config, remat=remat)
        loss = lambda p: jnp.square(model.apply({"params": p}, tokens)).mean()
        return jax.jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(gradient(False), gradient(True), rtol=1e-4, atol=1e-6)


def test_sharded_checkpoints(tmp_path):
    tensors = load_file(BASE / "model.safetensors")
    names = sorted(tensors)
    shutil.copy(BASE / "config.json", tmp_path)
    index = {}
    for part, own in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in own}, tmp_path / f"part{part}.safetensors")
        index |= dict.fromkeys(own, f"part{part}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config, params = load_hf(tmp_path)
    wanted_config, wanted = load_hf(BASE)
    assert config == wanted_config
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, wanted))
    for bad in ("../model.safetensors", "/model.safetensors", "model.bin"):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {**index, names[0]: bad}})
        )
        with pytest.raises(ValueError, match="is not a safetensors file in the same directory"):
            load_hf(tmp_path)


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    tensors = load_file(BASE / "model.safetensors")
    shutil.copy(BASE / "config.json", tmp_path)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing=\['model.norm.weight'\], extra=\[\]"):
        load_hf(tmp_path)
    save_file({**tensors, "model.norm.weight": norm[:-1]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight: got the shape \(47,\).*\(48,\)"):
        load_hf(tmp_path)
    hugging_face = json.loads((BASE / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0}
    with pytest.raises(ValueError, match="only plain rope is implemented"):
        LlamaConfig.from_hf({**hugging_face, "rope_scaling": scaling})
    with pytest.raises(ValueError, match="attention_bias is True"):
        LlamaConfig.from_hf({**hugging_face, "attention_bias": True})


MISTRAL = {"model_type": "mistral", "sliding_window": None}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "granite"}, "model_type is 'granite', another model .*: llama, mistral"),
        ({"model_type": "smollm3"}, "model_type is 'smollm3'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"model_type": None}, "model_type is None"),
        (MISTRAL | {"sliding_window": 4096}, "sliding_window is 4096, only None"),
        ({"model_type": "mistral"}, "of a mistral lacks 'sliding_window'"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"layer_types": ["sliding_attention"]}, r"layer_types has \['sliding_attention'\]"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rms_norm_eps": ...}, "of a llama lacks 'rms_norm_eps'"),
    ],
)
def test_models_that_are_no_llamas_are_refused_by_name(changed, said):
    config = json.loads((BASE / "config.json").read_text()) | changed
    with pytest.raises(ValueError, match=said):
        LlamaConfig.from_hf({key: value for key, value in config.items() if value is not ...})


def test_a_mistral_without_a_window_is_a_llama():
    config = json.loads((BASE / "config.json").read_text())
    assert LlamaConfig.from_hf(config | MISTRAL) == LlamaConfig.from_hf(config)


@pytest.fixture
def tiny_model(tmp_path):
    """A directory in Hugging Face's layout: the golden Llama and a tokenizer of characters."""
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    # Tokens 0 to 2 are unknown, begin and end, as the config says.
    characters = {character: i for i, character in enumerate("?^$0123456789abcdef-\n")}
    Tokenizer(models.BPE(characters, merges=[])).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "mora", "--remora-every", "100"],
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in (
                ["--method", "mora", "--scheme", "rotation", "--remat"],
                ["--method", "lora"],
                ["--method", "fft"],
            )
        ),
    ],
    ids=lambda flags: " ".join(flags[1:]),
)
def test_the_main_job_in_miniature(tiny_model, tmp_path, monkeypatch, capsys, flags):
    out = tmp_path / "out"
    arguments = ["--model", tiny_model, "--out", out, "--pairs", 1, "--steps", 150, "--rank", 4,
                 "--lr", 1e-2, "--evaluations", 1, *flags]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["memorize.py", *map(str, arguments)])
    memorize.main()
    printed = capsys.readouterr().out
    history = json.loads((out / "history.json").read_text())
    steps, accuracies = zip(*history["accuracy"], strict=True)
    assert steps == (0, 75, 150)
    assert accuracies[0] < 0.3
    # LoRA of this rank does not get there in a model this small; that it learns is shown below.
    assert accuracies[-1] == 1.0 or "lora" in flags
    assert len(history["loss"]) == 150
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    assert (out / "memorize.png").stat().st_size > 10_000
    if "fft" not in flags:
        assert "14 adapters in 7 kernels" in printed
        assert printed.count("generates the same for 1 of 1 keys") == 2
        assert (out / "adapters").is_dir()
    if "--remora-every" in flags:
        assert "ResetReport(layers=7, moments=14, counts=1)" in printed


@pytest.mark.slow
def test_an_allocation_has_the_parameters_of_half_the_rank_and_compiles_once(
    tiny_model, tmp_path, capsys
):
    flags = ["--model", tiny_model, "--pairs", 2, "--batch", 2, "--length", 80, "--steps", 2,
             "--rank", 4, "--seeds", 0, "--lrs", 1e-2, 3e-2, "--variants", "allocated",
             "--stacked", "--out", tmp_path / "out"]  # fmt: skip
    allocate.train_step.clear_cache()
    allocate.main([*map(str, flags)])
    assert allocate.train_step._cache_size() == 1  # for both rates, to train and to measure
    table = capsys.readouterr().out.splitlines()[-3:]
    runs = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [run["lr"] for run in runs] == [0.01, 0.03]
    half = 2 * (2 * 14**2 + 2 * 12**2 + 3 * 18**2)  # by hand: sqrt((in + out) * 2) of each kind
    assert 0.9 * half < runs[0]["trained"] <= half
    assert all(0 < run["loss"] < run["losses"][0] for run in runs)  # measured after the last step
    allocate.main([*map(str, flags)])  # nothing is left to do
    assert capsys.readouterr().out.splitlines() == table
    allocate.main([*map(str, flags), "--draw"])
    assert (tmp_path / "out/losses.png").stat().st_size > 10_000
    drawn = capsys.readouterr().out
    (tmp_path / "out/results.jsonl").unlink()
    (tmp_path / "out/losses.png").unlink()
    allocate.main([*map(str, flags), "--draw"])  # from the summary that was written beside it
    assert capsys.readouterr().out == drawn
    assert (tmp_path / "out/losses.png").stat().st_size > 10_000
