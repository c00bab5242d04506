"""The README's Python runs, block by block, as it stands."""

import pathlib
import re
import shutil

import jax.numpy as jnp
import optax

from helpers.files import GOLDEN
from llama.loading import load_hf
from llama.model import Llama

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, params = load_hf(GOLDEN / "llama_type1" / "base")

    def loss_fn(logits, tokens):
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    namespace = {
        "base_model": Llama(config),
        "pretrained_params": params,
        "tokens": jnp.arange(32).reshape(2, 16),
        "loss_fn": loss_fn,
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 12
    for part in ("adapter", "base"):
        shutil.copytree(GOLDEN / "llama_type1" / part, tmp_path / "downloaded" / part)
    for block in blocks:
        # Rank 8 is more than the smallest layers of this small model can use, and warns.
        exec(block.replace("rank=8", "rank=2"), namespace)
    assert "14 adapters in 7 kernels" in capsys.readouterr().out
    assert namespace["report"] == (7, 14, 1, {})
    assert all((tmp_path / name).is_dir() for name in ("adapters", "library", "out"))
