"""Damaged and hostile files in PEFT's format: each is refused by an error that says where."""

import itertools
import json
import math
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from helpers.peft_adapters import config_of, planned, stacked_base
from mora_jax import LowRank, Sharing, peft
from mora_jax._arrays.paths import flatten, unflatten
from mora_jax._text.expressions import Expression


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


def saved(tmp_path, **changed):
    """(base, directory of an adapter whose config was changed)."""
    base = stacked_base()
    plan, params = planned(base, LowRank(2.0))
    peft.save_adapters(tmp_path / "adapter", params, plan)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(config_of(tmp_path / "adapter") | changed))
    return base, tmp_path / "adapter"


#: `re` would take for ever to see that this matches no name.
SLOW = "(.|.)*[A-Z]"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_modules": SLOW}, "which target_modules of adapter_config.json do not name"),
        ({"rank_pattern": {SLOW: 2}}, r"json: rank_pattern has .* which matches none of the 6 ad"),
        ({"alpha_pattern": {"up_prj": 2}}, r"'up_prj', which matches none .*Near it: .*up_proj'"),
        (
            {"rank_pattern": {"q_proj.x": 2}},
            r"adapter_config\.json: rank_pattern has 'q_proj.x', which matches none",
        ),
        ({"target_modules": "a|" * 21_000}, "json: target_modules has .* takes too many steps"),
        ({"target_modules": "(?:.*up_prj){0<=e<=1}"}, "braces that hold no number"),
        ({"exclude_modules": ".*[[:digit:]]"}, "json: exclude_modules has .* a class with another"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "rank_pattern has .* global flags not at the start"),
        ({"rank_pattern": {f"q_proj{n}": 2 for n in range(5000)}}, "there are 5,000 patterns"),
        ({"modules_to_save": ["lm_head"]}, "are trained in full, and replace those of the base"),
        ({"layers_to_transform": [1]}, "it chooses layers by their numbers"),
    ],
    ids=range(11),
)
def test_what_a_config_says_of_modules_is_refused_by_name(tmp_path, changed, message):
    base, folder = saved(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        peft.load_adapters(folder, base)


@pytest.mark.parametrize(
    "changed",
    [
        {"exclude_modules": SLOW},
        {"target_modules": "all-linear"},
        {"merge_weights": True, "enable_lora": None, "loftq_config": {}, "megatron_config": None},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"up_proj|.*\.down_proj": 2}},
    ],
    ids=range(5),
)
def test_what_changes_no_number_is_read(tmp_path, changed):
    base, folder = saved(tmp_path, **changed)
    _, plan = peft.load_adapters(folder, base)
    assert {spec.scheme for spec in plan.values()} == {LowRank(2.0)}
    assert len(plan) == 3


def test_what_was_changed_after_it_was_saved_is_refused(tmp_path):
    base, folder = saved(tmp_path, lora_alpha=3)
    with pytest.raises(ValueError, match=r"damaged, .*scales .*If you changed them on purpose"):
        peft.load_adapters(folder, base)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file)
    _, plan = peft.load_adapters(folder, base)
    assert {spec.scheme for spec in plan.values()} == {LowRank(3.0)}


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    base, folder = saved(tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 2', '"r": 3, "r": 2'))
    with pytest.raises(ValueError, match=r"adapter_config\.json .*'r' occurs twice"):
        peft.load_adapters(folder, base)


def test_each_pattern_is_parsed_once(tmp_path, monkeypatch):
    base = unflatten(
        {
            f"model/layers/{layer}/mlp/{name}/kernel": np.zeros((2, 3), np.float32)
            for layer in range(40)
            for name in "abcd"
        }
    )
    layers = [path.removesuffix("/kernel") for path in flatten(base)]
    plan, params = planned(base, LowRank(2.0), ranks=[(layer, 3) for layer in layers[::3]])
    peft.save_adapters(tmp_path / "adapter", params, plan)
    patterns, parse = [], Expression.__init__

    def note(self, pattern):
        patterns.append(pattern)
        parse(self, pattern)

    monkeypatch.setattr(Expression, "__init__", note)
    _, loaded = peft.load_adapters(tmp_path / "adapter", base)
    assert sorted(patterns) == sorted(config_of(tmp_path / "adapter")["rank_pattern"])
    assert len(patterns) == len(set(patterns)) == 54
    ranks = [spec.config.rank for spec in loaded.values()]
    assert ranks == [spec.config.rank for spec in plan.values()]


def test_an_adapter_many_times_its_model_is_refused_before_it_is_read(tmp_path, monkeypatch):
    base = unflatten({"layers/0/mlp/up_proj/kernel": np.zeros((2, 3), np.float32)})
    monkeypatch.setattr("mora_jax.peft._load.read_tensors", None)
    folder = tmp_path / "adapter"
    folder.mkdir()
    rank, name = 2**21, "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    shapes = {name.format("A"): [rank, 2], name.format("B"): [3, rank]}
    header, at = {}, 0
    for key, shape in shapes.items():
        header[key] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [at, at + 4 * math.prod(shape)],
        }
        at = header[key]["data_offsets"][1]
    text = json.dumps(header).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # zeros, of no size on disk
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"has 10,485,760 trained numbers, and the base model has 6"
    ):
        peft.load_adapters(folder, base)


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
