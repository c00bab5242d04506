"""Adapters on disk."""

import gc
import json
import pathlib
import pickle
import random
import shutil

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from orbax.checkpoint import v1 as ocp

import mora_jax
from helpers.arrays import assert_same_bits, perturb
from helpers.models import Network, Small, adapted_network
from helpers.schemes import CUSTOM
from mora_jax import checkpoint
from mora_jax.checkpoint._record import digest_of


@pytest.mark.parametrize("scheme", ["sharing", "rotation", "low_rank", CUSTOM], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_travel(tmp_path, inputs, scheme, dtype):
    _, pretrained, _, plan, params = adapted_network(
        inputs, scheme=scheme, dtype=dtype, also_train="norm/.*", key=jax.random.key(3)
    )
    trainable, frozen = mora_jax.split(params, plan)
    params = mora_jax.join(perturb(trainable), frozen)
    checkpoint.save_adapters(tmp_path / "adapters", params, plan)
    loaded, loaded_plan = checkpoint.load_adapters(tmp_path / "adapters", pretrained, dtype=None)
    assert loaded_plan == plan
    assert_same_bits(loaded, params)


def test_an_adapter_in_mid_cycle_knows_its_scheme(tmp_path, inputs):
    _, _, _, plan, params = adapted_network(inputs, scheme="sharing")
    params, _, plan, _ = mora_jax.merge_and_reset(params, (), plan)
    checkpoint.save_adapters(tmp_path / "adapters", params, plan)
    base = mora_jax.merge(params, plan)
    _, loaded_plan = checkpoint.load_adapters(tmp_path / "adapters", base)
    assert loaded_plan["embed"].scheme == mora_jax.Sharing(signs=1)


def test_the_base_is_not_written(tmp_path):
    inputs = jnp.ones((1, 512))
    module = nn.Dense(512)
    *_, plan, params = adapted_network(inputs, module=module, scheme="sharing")
    checkpoint.save_adapters(tmp_path / "adapters", params, plan)
    size = sum(file.stat().st_size for file in (tmp_path / "adapters").rglob("*"))
    assert params["kernel"].nbytes == 2**20
    assert size < 2**17


def test_what_does_not_fit_is_refused(tmp_path, inputs):
    base, pretrained, _, plan, params = adapted_network(inputs, scheme="sharing")
    path = tmp_path / "adapters"
    checkpoint.save_adapters(path, params, plan)
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save_adapters(path, params, plan)
    with pytest.raises(FileNotFoundError, match="no adapters at"):
        checkpoint.load_adapters(tmp_path / "nowhere", pretrained)
    wide = base.init(jax.random.key(0), jnp.ones((2, 5, 11)))["params"]
    wide["attention"]["query"]["kernel"] = jnp.ones((4, 4))
    del wide["layers"]["up"]
    wide["layers"]["down"]["kernel"] = wide["layers"]["down"]["kernel"].astype(jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"'embed/kernel' has shape \(11, 16\).*\(10, 16\)"
    ) as error:
        checkpoint.load_adapters(path, wide)
    # Every difference, not the first.
    assert "'attention/query/kernel' has shape (4, 4), and had (16, 2, 8)" in str(error.value)
    assert "no parameter at 'layers/up/kernel', which had shape (3, 16, 24)" in str(error.value)
    assert "(no error: 'layers/down/kernel' is bfloat16, and was float32)" in str(error.value)
    with pytest.raises(ValueError, match="have adapters already"):
        checkpoint.load_adapters(path, params)
    other = Network(stacked=False).init(jax.random.key(0), inputs)["params"]
    with pytest.raises(ValueError, match=r"no parameter at 'layers/down/kernel'"):
        checkpoint.load_adapters(path, other)
    ocp.save(tmp_path / "something", {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="not one of save_adapters: no plan"):
        checkpoint.load_adapters(tmp_path / "something", pretrained)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no adapter saved by save_adapters"):
        checkpoint.load_adapters(tmp_path / "empty", pretrained)


def test_a_checkpoint_that_disagrees_with_its_plan_is_refused(tmp_path, inputs):
    _, pretrained, _, plan, params = adapted_network(inputs, scheme="sharing")
    trainable, _ = mora_jax.split(params, plan)
    metadata = {"mora_jax_plan": plan.to_json()}
    trainable = mora_jax.rename_leaves(trainable, plan.plain_paths())
    trainable["embed"]["mora"]["matrix"] = jnp.ones((8, 8))
    ocp.save(tmp_path / "shape", trainable, custom_metadata=metadata)
    with pytest.raises(ValueError, match=r"'embed/mora/matrix' was saved with shape \(8, 8\)"):
        checkpoint.load_adapters(tmp_path / "shape", pretrained)
    del trainable["embed"]
    ocp.save(tmp_path / "missing", trainable, custom_metadata=metadata)
    with pytest.raises(ValueError, match="missing 'embed/mora/matrix', surplus none"):
        checkpoint.load_adapters(tmp_path / "missing", pretrained)


def small_adapters(tmp_path):
    """(base's parameters, plan, parameters with adapters, directory they are saved in)."""
    module = nn.Sequential((nn.Dense(40), nn.Dense(40)))
    _, pretrained, _, plan, params = adapted_network(
        jnp.ones((1, 40)), module=module, scheme="sharing", rank=12, also_train="layers_1/bias"
    )
    trainable, frozen = mora_jax.split(params, plan)
    params = mora_jax.join(perturb(trainable), frozen)
    checkpoint.save_adapters(tmp_path / "saved", params, plan)
    return pretrained, plan, params, tmp_path / "saved"


def test_names_and_versions(tmp_path):
    pretrained, plan, params, unnamed = small_adapters(tmp_path)
    library = tmp_path / "library"
    library.mkdir()
    assert checkpoint.list_adapters(library) == []
    save = lambda tree, name, **more: checkpoint.save_adapters(
        library, tree, plan, name=name, **more
    )
    other = mora_jax.attach(plan, pretrained)
    versions = [
        save(other, "poems"),
        save(params, "poems", metadata={"steps": [1]}),
        save(other, "a.b-c_1"),
    ]
    assert versions == [1, 2, 1]
    # What Orbax has not finished has a name of this kind.
    shutil.copytree(library / "poems" / "1", library / "poems" / "3.orbax-checkpoint-tmp")
    load = lambda **which: checkpoint.load_adapters(library, pretrained, **which)[0]
    assert_same_bits(load(name="poems"), params)
    assert_same_bits(load(name="poems", version=1), other)
    first, *_, last = found = checkpoint.list_adapters(library)
    assert [(one.name, one.version) for one in found] == [
        ("a.b-c_1", 1),
        ("poems", 1),
        ("poems", 2),
    ]
    assert (last.plan, last.metadata, first.metadata) == (plan, {"steps": [1]}, {})
    assert last.size == 4 * plan.trained_parameters
    assert last.base["layers_0/kernel"] == {"shape": [40, 40], "dtype": "float32"}
    assert str(last).startswith("poems 2: 2 layers, Sharing(), 1 parameters in full, ")
    assert [one.name for one in checkpoint.list_adapters(unnamed)] == [""]

    with pytest.raises(
        ValueError, match=r"holds several adapters; pass name=, one of 'a\.b-c_1', 'poems'"
    ):
        load()
    with pytest.raises(FileNotFoundError, match=r"no version 3 of 'poems' at .*: \[1, 2\]"):
        load(name="poems", version=3)
    with pytest.raises(
        FileNotFoundError, match=r"no adapters 'prose' at .*; there are 'a\.b-c_1', 'poems'"
    ):
        load(name="prose")
    with pytest.raises(ValueError, match="version=1 of which name"):
        load(version=1)
    with pytest.raises(ValueError, match="a saved adapter itself"):
        checkpoint.save_adapters(unnamed, params, plan, name="poems")
    with pytest.raises(ValueError, match="saved is a saved adapter itself"):
        checkpoint.save_adapters(tmp_path, params, plan, name="saved")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, and cannot hold adapters"):
        checkpoint.save_adapters(tmp_path / "file", params, plan, name="poems")
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        save(params, "poems", metadata={"model": object()})
    with pytest.raises(FileNotFoundError, match="no adapters at"):
        checkpoint.list_adapters(tmp_path / "nowhere")
    for name in (
        "",
        ".",
        "..",
        "../saved",
        "a/b",
        "/etc",
        "a\\b",
        "-x",
        ".x",
        "a\0",
        "a\n",
        "x" * 101,
        3,
    ):
        with pytest.raises(ValueError, match="is no name for adapters"):
            save(params, name)
        with pytest.raises(ValueError, match="is no name for adapters"):
            load(name=name)
    assert sorted(p.name for p in library.iterdir()) == ["a.b-c_1", "poems"]


def test_a_fingerprint_knows_its_base(tmp_path):
    pretrained, plan, params, _ = small_adapters(tmp_path)
    checkpoint.save_adapters(tmp_path / "known", params, plan, fingerprint=True)
    loaded, _ = checkpoint.load_adapters(tmp_path / "known", pretrained)
    assert_same_bits(loaded, params)
    kernel = pretrained["layers_0"]["kernel"]
    other = {
        **pretrained,
        "layers_0": {**pretrained["layers_0"], "kernel": kernel.at[3, 5].add(1e-6)},
    }
    with pytest.raises(ValueError, match="'layers_0/kernel' holds other numbers"):
        checkpoint.load_adapters(tmp_path / "known", other)
    checkpoint.load_adapters(tmp_path / "saved", other)
    other["layers_0"]["kernel"] = -kernel
    with pytest.raises(ValueError, match="'layers_0/kernel' holds other numbers"):
        checkpoint.load_adapters(tmp_path / "known", other)
    # Of another dtype the numbers cannot be compared.
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pretrained)
    loaded, _ = checkpoint.load_adapters(tmp_path / "known", half)
    # What was trained in full is not rounded to the base's dtype.
    assert_same_bits(mora_jax.split(loaded, plan)[0], mora_jax.split(params, plan)[0])


def test_what_is_not_finite_is_neither_saved_nor_loaded(tmp_path):
    pretrained, plan, params, _ = small_adapters(tmp_path)
    params["layers_1"]["bias"] = params["layers_1"]["bias"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"not saved at .* not finite: 'layers_1/bias'"):
        checkpoint.save_adapters(tmp_path / "nan", params, plan)
    assert not (tmp_path / "nan").exists()
    trainable = mora_jax.rename_leaves(mora_jax.split(params, plan)[0], plan.plain_paths())
    # As the first version of this format did it, with the plan alone.
    ocp.save(tmp_path / "nan", trainable, custom_metadata={"mora_jax_plan": plan.to_json()})
    with pytest.raises(ValueError, match=r"not loaded from .*'layers_1/bias'"):
        checkpoint.load_adapters(tmp_path / "nan", pretrained)
    trainable["layers_1"]["bias"] = jnp.zeros(40)
    ocp.save(tmp_path / "old", trainable, custom_metadata={"mora_jax_plan": plan.to_json()})
    loaded, its_plan = checkpoint.load_adapters(tmp_path / "old", pretrained)
    assert its_plan == plan
    found = mora_jax.rename_leaves(mora_jax.split(loaded, plan)[0], plan.plain_paths())
    assert_same_bits(found, trainable)


def test_what_disagrees_with_its_own_record_is_refused(tmp_path):
    pretrained, plan, params, saved = small_adapters(tmp_path)
    custom = ocp.metadata(saved).custom_metadata
    trainable = mora_jax.rename_leaves(mora_jax.split(params, plan)[0], plan.plain_paths())
    later = {**custom, "mora_jax_record": json.dumps({"format": 3})}
    other_plan = {**custom, "mora_jax_plan": plan.advance().to_json()}
    numbers = jax.tree.map(lambda leaf: leaf, trainable)
    numbers["layers_0"]["mora"]["matrix"] = numbers["layers_0"]["mora"]["matrix"].at[2, 3].add(1e-7)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trainable)
    record = json.dumps({"format": 2, "base": [], "arrays": {}, "metadata": {}})
    digest = digest_of(custom["mora_jax_plan"], record)
    made_up = {**custom, "mora_jax_record": record, "mora_jax_digest": digest}
    cases = {
        r"its record has \[\], and not fields by path": (trainable, made_up),
        "format 3 of a later mora_jax; this version reads formats up to 2": (trainable, later),
        "is damaged: its metadata are not those": (trainable, other_plan),
        "damaged: 'layers_0/mora/matrix' are not the numbers saved": (numbers, custom),
        "is bfloat16, and was saved as float32": (half, custom),
    }
    for index, (message, (tree, metadata)) in enumerate(cases.items()):
        ocp.save(tmp_path / str(index), tree, custom_metadata=metadata)
        with pytest.raises(ValueError, match=message):
            checkpoint.load_adapters(tmp_path / str(index), pretrained)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's
def test_damaged_files_are_refused_or_not_needed(tmp_path):
    pretrained, plan, params, saved = small_adapters(tmp_path)
    rng = random.Random(0)

    def flip(data):
        place = rng.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]

    damages = {
        "delete": lambda data: None,
        "empty": lambda data: b"",
        "truncate": lambda data: data[: rng.randrange(len(data))] if data else data,
        "flip": lambda data: flip(data) if data else data,
        "flip again": lambda data: flip(data) if data else data,
        "a pickle": lambda data: pickle.dumps({"a": 1}),
    }
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    # Where the numbers and the plan are, more often.
    large = [path for path in files if (saved / path).stat().st_size > 1000] * 6
    refused, loaded = [], 0
    for index, (file, how) in enumerate((file, how) for file in files + large for how in damages):
        copy = tmp_path / str(index)
        shutil.copytree(saved, copy)
        damaged = damages[how]((saved / file).read_bytes())
        (copy / file).unlink() if damaged is None else (copy / file).write_bytes(damaged)
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        try:
            tree, its_plan = checkpoint.load_adapters(copy, pretrained)
        except ValueError as error:
            refused.append(str(error))
            named = str(copy) in refused[-1]
        else:
            named = its_plan == plan
            assert_same_bits(tree, params)
            loaded += 1
        assert named, (file, how)
        assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        shutil.rmtree(copy)
    gc.collect()  # what TensorStore says of its own failures, now and not in another test
    silent = sum("are not the numbers saved" in text for text in refused)
    print(f"\n{len(refused)} refused, {silent} of them by checksum alone; {loaded} loaded whole")
    assert len(refused) >= 40
    # Orbax's marks and its first copy of the data are not read.
    assert loaded >= 10
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "_METADATA").write_bytes(pickle.dumps(pathlib.PurePath()))
    with pytest.raises(ValueError, match=r"torn is no adapter saved by save_adapters"):
        checkpoint.load_adapters(torn, pretrained)
    shutil.copytree(torn, tmp_path / "library" / "a" / "1")
    (one,) = checkpoint.list_adapters(tmp_path / "library")
    assert one.plan is None
    assert "is no adapter saved by save_adapters" in str(one)


def test_a_version_is_written_by_one_program_alone(inputs, tmp_path):
    _, pretrained, _, plan, params = adapted_network(inputs, module=Small(), scheme="sharing")
    (tmp_path / "poems" / ".1.is_being_saved").mkdir(parents=True)  # by another one, just now
    assert checkpoint.save_adapters(tmp_path, params, plan, name="poems") == 2
    assert sorted(p.name for p in (tmp_path / "poems").iterdir()) == [".1.is_being_saved", "2"]
    loaded, _ = checkpoint.load_adapters(tmp_path, pretrained, name="poems")
    assert_same_bits(jax.tree.map(jnp.asarray, params), loaded)
