"""Damaged and hostile files in PEFT's format: each is refused by an error that says where."""

import itertools
import json
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from helpers.peft_adapters import config_of, planned, stacked_base
from mora_jax import LowRank, Sharing, peft


def mutations(rng, config, tensors):
    """Endless (what was done, config, tensors' file, what the error must name)."""
    whole = save(tensors)
    names = sorted(tensors)
    start = 8 + int.from_bytes(whole[:8], "little")

    def fields(**changed):
        return json.dumps(config | changed).encode()

    text = fields()
    bad_fields = [
        ("peft_type", ["IA3", None, 1]),
        ("r", [0, -1, 1.5, True, "8", None, 10**9, 10**400, 7]),
        ("target_modules", [None, [], 3, "(", ["up_proj"], "no_such", [1]]),
        ("exclude_modules", [["up_proj"], "(", 1]),
        (
            "rank_pattern",
            [{"up_proj": 0}, {"(": 4}, {"up_pro{e}": 4}, {"up_proj": 5}, 3, {"q_proj": "4"}],
        ),
        ("alpha_pattern", [{"up_proj": -1}, {"(": 4}, [2]]),
        ("lora_alpha", [0, -2, "8", True, float("nan"), float("inf")]),
        ("lora_dropout", [1.0, -0.1, "0", None]),
        ("bias", ["all", "lora_only"]),
        ("modules_to_save", [["lm_head"]]),
        ("init_lora_weights", ["pissa", "loftq"]),
        ("use_rslora", ["yes"]),
        ("a_field_of_the_future", [1, "on"]),
        *((name, [True]) for name in ("use_dora", "lora_bias", "layers_to_transform")),
    ]
    if "use_mora" in config:
        bad_fields += [("use_mora", [False, "yes", 1]), ("mora_type", [0, 5, 7, "1", None, True])]
    bad = itertools.cycle((field, value) for field, values in bad_fields for value in values)
    hostile = [
        "../../etc/passwd",
        "/etc/passwd",
        "base_model.model.../../x.lora_A.weight",
        "base_model.model.model.layers.99.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector",
        "base_model.model.lm_head.weight",
        "",
    ]
    while True:
        name = names[rng.integers(len(names))]
        tensor = tensors[name]
        place = tuple(rng.integers(size) for size in tensor.shape)

        def one(value, name=name):
            return save(tensors | {name: np.ascontiguousarray(value)})

        def at(value, tensor=tensor, place=place):
            changed = tensor.copy()
            changed[place] = value
            return changed

        for field, value in itertools.islice(bad, 2):
            yield f"{field}={value}", fields(**{field: value}), whole, ""
        yield "cut file", text, whole[: rng.integers(len(whole))], ""
        yield "cut config", text[: rng.integers(len(text))], whole, ""
        index = rng.integers(whole.index(b"base_model"), whole.rindex(b"}", 0, start))
        flipped = bytes([whole[index] ^ (1 << rng.integers(8))])
        yield f"bit of byte {index}", text, whole[:index] + flipped + whole[index + 1 :], ""
        dtype = rng.choice(["int32", "uint8", "bool", "float64", "float16", "int64"])
        yield f"dtype {dtype}", text, one(tensor.astype(dtype)), name
        shape = [tensor[1:], tensor[:, 1:], tensor[None], tensor.ravel(), np.pad(tensor, 1)]
        yield "shape", text, one(shape[rng.integers(len(shape))]), name
        yield "missing", text, save({k: v for k, v in tensors.items() if k != name}), name
        strange = hostile[rng.integers(len(hostile))]
        yield "extra", text, save(tensors | {strange: tensor}), strange
        yield "not finite", text, one(at(rng.choice([np.nan, np.inf, -np.inf]))), name
        if "use_mora" in config:
            module = name.rpartition("lora_")[0]
            yield "copies differ", text, one(at(np.nextafter(tensor[place], np.inf))), module
        harmless = pickle.dumps(tensors, protocol=int(rng.integers(6)))
        yield "pickle", text, harmless, ""
        yield "torch.save", text, b"PK\x03\x04" + rng.bytes(100), "pickle"
        yield "noise", rng.bytes(50), whole, ""
        yield "noise", text, rng.bytes(rng.integers(200)), ""
        yield "nesting", b"[" * 100_000, whole, ""


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_would_take_for_ever_is_given_up(tmp_path, key):
    base = stacked_base()
    plan, params = planned(base, Sharing())
    peft.save_adapters(tmp_path / "adapter", params, plan)
    file = tmp_path / "adapter" / "adapter_config.json"
    pattern = "(.|.)*[A-Z]"
    value = {pattern: 4} if key == "rank_pattern" else pattern
    file.write_text(json.dumps(config_of(tmp_path / "adapter") | {key: value}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key} has the pattern .*\[A-Z\]"):
        peft.load_adapters(tmp_path / "adapter", base)


@pytest.mark.parametrize("scheme", [Sharing(), LowRank(2.0)], ids=["mora", "lora"])
def test_damaged_and_hostile_files_are_refused(tmp_path, scheme):
    """A thousand mutations in all: each an error that says where, nothing written or loaded."""
    base = stacked_base()
    plan, params = planned(base, scheme)
    folder = tmp_path / "adapter"
    peft.save_adapters(folder, params, plan)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    rng = np.random.default_rng(0)
    stream = mutations(rng, config_of(folder), load_file(file))
    for _, (what, text, data, named) in zip(range(500), stream, strict=False):
        config.write_bytes(text)
        file.write_bytes(data)
        try:
            peft.load_adapters(folder, base)
        except ValueError as error:
            message = str(error)
        else:
            pytest.fail(f"{what} was loaded")
        assert str(folder) in message, what
        assert named in message, (what, message)
        assert len(message) < 2000, what
    assert sorted(os.listdir(tmp_path)) == ["adapter"]
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
