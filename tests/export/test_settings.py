"""What the directory of a merged model says of its weights: one meaning, and the true one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mora_jax import export

H, V = 8, 12
PLAIN = {"model_type": "llama", "hidden_size": H, "vocab_size": V, "tie_word_embeddings": False}


def params(vocabulary=V, layers=0):
    tree = {
        "embed_tokens": {"embedding": jnp.ones((vocabulary, H))},
        "norm": {"weight": jnp.ones(H)},
        "lm_head": {"kernel": jnp.ones((H, vocabulary))},
    }
    kernels = {"self_attn": {"q_proj": (H, 8), "k_proj": (H, 4)}, "mlp": {"up_proj": (H, 20)}}
    for layer in range(layers):
        tree[f"layers_{layer}"] = {
            group: {name: {"kernel": jnp.ones(shape)} for name, shape in own.items()}
            for group, own in kernels.items()
        }
    return tree


def base(folder, config=None, **files):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PLAIN if config is None else config))
    for name, text in files.items():
        (folder / name.replace("_DOT_", ".")).write_text(text)
    return folder


def written(tmp_path, config, tree=None):
    export.save_merged(tmp_path / "out", params() if tree is None else tree, None, config=config)
    return json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_was_quantised_is_not_any_more(tmp_path):
    packed = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    inner = {"text_config": {"a": 1, "torch_dtype": "float16", **packed}, **packed}
    folder = base(tmp_path / "base", PLAIN | inner, quantize_config_DOT_json="{}")
    weights = {
        "lm_head.weight": np.ones((V * H // 2, 1), np.uint8),
        "lm_head.weight.absmax": np.ones(3),
    }
    save_file(weights, folder / "model.safetensors")
    found = written(tmp_path, folder)
    assert found["text_config"] == {"a": 1, "torch_dtype": "float32"}
    assert "quantization_config" not in found
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_adapters_stay_and_code_comes_along(tmp_path):
    folder = base(
        tmp_path / "base",
        adapter_config_DOT_json="{}",
        modeling_x_DOT_py="1",
        tokenizer_DOT_json="{}",
    )
    written(tmp_path, folder)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "modeling_x.py", "tokenizer.json"}
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"an adapter's directory. Give its base model's"):
        export.save_merged(tmp_path / "again", params(), None, config=folder)


def test_the_vocabulary_is_that_of_the_embedding(tmp_path):
    old = base(tmp_path / "base")
    export.save_merged(tmp_path / "first", params(), None, config=old)
    assert written(tmp_path, tmp_path / "first", params(V + 3))["vocab_size"] == V + 3
    nested = {"text_config": {"vocab_size": V, "hidden_size": H}, "tie_word_embeddings": False}
    export.save_merged(tmp_path / "nested", params(V + 3), None, config=nested)
    text = json.loads((tmp_path / "nested" / "config.json").read_text())["text_config"]
    assert text["vocab_size"] == V + 3
    apart = params() | {"lm_head": {"kernel": jnp.ones((H, V + 1))}}
    with pytest.raises(ValueError, match=r"has 12 rows and 'lm_head.weight' 13: .*Resize both"):
        export.save_merged(tmp_path / "apart", apart, None, config=PLAIN)


SIZES = {"num_hidden_layers": 2, "intermediate_size": 20, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": 16}, "config says hidden_size 16, but .*embed_tokens.* says 8"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, but .* count 2 layers"),
        ({"intermediate_size": 24}, "intermediate_size 24, but .*up_proj.* says 20"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4, but .*heads of 2 features, says 2"),
        ({"head_dim": 4}, "num_attention_heads 4, but .*q_proj.* heads of 4 features, says 2"),
        ({"text_config": {"hidden_size": 16}}, "hidden_size 16"),
    ],
)
def test_a_config_of_other_sizes_is_refused(tmp_path, changed, said):
    export.save_merged(tmp_path / "good", params(layers=2), None, config=PLAIN | SIZES)
    with pytest.raises(ValueError, match=said):
        export.save_merged(tmp_path / "out", params(layers=2), None, config=PLAIN | SIZES | changed)
    assert not (tmp_path / "out").exists()


def test_the_index_says_which_files_count(tmp_path):
    good = tmp_path / "good"
    export.save_merged(good, params(), None, config=PLAIN, shard_bytes=500)
    stale = {"model.old_norm.weight": np.ones(5, np.float32)}
    save_file(stale, good / "model-00001-of-00009.safetensors")
    written(tmp_path, good)
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 3
    # A whole file comes before the index, as in transformers.
    save_file(stale, good / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing 'model\.old_norm\.weight'"):
        export.save_merged(tmp_path / "again", params(), None, config=good)
    (good / "model.safetensors").unlink()
    index = good / "model.safetensors.index.json"
    for text, said in (
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a safetensors file in the same dir"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a safetensors file in the same dir"),
        ('{"weight_map": {"a": "..\\\\x.safetensors"}}', "not a safetensors file in the same dir"),
        ('{"weight_map": {"a": "x.safetensors"}}', r"names 'x\.safetensors', which is not there"),
        ('{"weight_map": [1]}', "no weight_map"),
        ("[", "is not JSON"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y"}}', "'a' occurs twice"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=said):
            export.save_merged(tmp_path / "again", params(), None, config=good)
    index.unlink()
    with pytest.raises(ValueError, match="which would say which of them count"):
        export.save_merged(tmp_path / "again", params(), None, config=good)
    assert not (tmp_path / "again").exists()
