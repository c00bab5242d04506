"""The examples that look at adapters: spectra, and layers that are no stack."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

import mora_jax
from analysis import allocate, spectrum
from helpers.arrays import perturb
from helpers.files import GOLDEN
from llama.loading import load_hf
from llama.model import Llama
from mora_jax import checkpoint


@pytest.mark.slow
def test_the_example_prints_and_draws_saved_adapters(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama_type1" / "base", folder)
    Tokenizer(models.BPE({"a": 0}, merges=[])).save(str(folder / "tokenizer.json"))
    config, base = load_hf(folder)
    labelled = []
    for label, scheme in (("MoRA", "sharing"), ("LoRA", mora_jax.LowRank())):
        adapters = mora_jax.MoRAConfig(rank=2, scheme=scheme, targets=r".*(q|up)_proj")
        model = mora_jax.adapt(Llama(config), adapters)
        plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        params = mora_jax.attach(plan, base, key=jax.random.key(0))
        trainable, frozen = mora_jax.split(params, plan)
        params = mora_jax.join(perturb(trainable), frozen)
        checkpoint.save_adapters(tmp_path / label, params, plan)
        labelled.append(f"{label}={tmp_path / label}")
    out = tmp_path / "figures" / "spectrum.png"
    flags = [*labelled, "--model", folder, "--dtype", "float32", "--out", out]
    monkeypatch.setattr(sys, "argv", ["spectrum.py", *map(str, flags)])
    spectrum.main()
    *_, summary, path = capsys.readouterr().out.splitlines()
    counts = {
        label: row["count"] for label, row in json.loads(summary).items() if label[1:] == "oRA"
    }
    assert counts["LoRA"] == 2 < counts["MoRA"]
    assert path == str(out)
    assert out.stat().st_size > 10_000


def test_unrolled_layers_are_those_of_the_stack():
    config, stacked = load_hf(GOLDEN / "llama_type1" / "base")
    tokens = jnp.arange(16)[None]
    wanted = jax.jit(Llama(config).apply)({"params": stacked}, tokens)
    params = allocate.unstack(stacked, config.num_layers)
    got = jax.jit(Llama(config, unrolled=True).apply)({"params": params}, tokens)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    at_once = jax.jit(Llama(config, unroll=config.num_layers).apply)
    np.testing.assert_allclose(at_once({"params": stacked}, tokens), wanted, atol=1e-5)
    assert "while" not in at_once.lower({"params": stacked}, tokens).as_text()
