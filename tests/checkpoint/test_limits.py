"""Files that stand for more than they hold, and programs that save to one place at once."""

import resource
import shutil

import jax
import jax.numpy as jnp
import pytest
import tensorstore as ts
from flax import linen as nn
from orbax.checkpoint import v1 as ocp

import mora_jax
from helpers.arrays import assert_same_bits
from mora_jax import checkpoint, peft

X = jnp.ones((1, 7))


def small(rank=2):
    """(base's parameters, plan, parameters with adapters)."""
    model = mora_jax.adapt(nn.Dense(12), mora_jax.MoRAConfig(rank=rank, scheme="sharing"))
    plan = mora_jax.plan(model, X)
    pretrained = nn.Dense(12).init(jax.random.key(0), X)["params"]
    return pretrained, plan, mora_jax.attach(plan, pretrained)


@pytest.mark.filterwarnings("ignore:the square matrix is larger")
def test_adapters_many_times_their_model_are_refused_before_they_are_read(tmp_path):
    pretrained, plan, params = small(rank=500_000)
    checkpoint.save_adapters(tmp_path / "zeros", params, plan)
    size = sum(file.stat().st_size for file in (tmp_path / "zeros").rglob("*") if file.is_file())
    assert size < 100_000
    assert plan.trained_parameters > 9e6
    del params
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError, match=r"has 9,\d+,\d+ trained numbers, and the base model has 96"
    ):
        checkpoint.load_adapters(tmp_path / "zeros", pretrained)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB


def test_an_array_in_chunks_larger_than_itself_is_refused(tmp_path):
    pretrained, plan, params = small()
    checkpoint.save_adapters(tmp_path / "saved", params, plan)
    (name,) = plan.adapter_leaves()
    shape = list(plan.adapter_leaves()[name].shape)
    base = f"file://{tmp_path}/saved/state/"
    store = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
    grid = {"name": "regular", "configuration": {"chunk_shape": [20_000, 20_000]}}
    ts.open(
        {
            "driver": "zarr3",
            "kvstore": store,
            "metadata": {"shape": shape, "chunk_grid": grid, "data_type": "float32"},
            "create": True,
            "delete_existing": True,
        }
    ).result()
    with pytest.raises(ValueError, match=r"lies in chunks of \[20000, 20000\]"):
        checkpoint.load_adapters(tmp_path / "saved", pretrained)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": [' + "[]," * 2**20 + "[]]}", " " * (2**24 + 1), '{"x": NaN}'],
    ids=range(4),
)
@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "state/_METADATA"])
def test_hostile_metadata_are_refused(tmp_path, file, text):
    pretrained, plan, params = small()
    checkpoint.save_adapters(tmp_path / "saved", params, plan)
    (tmp_path / "saved" / file).write_text(text)
    with pytest.raises(ValueError, match=r"saved is no adapter saved by|saved is an Orbax checkp"):
        checkpoint.load_adapters(tmp_path / "saved", pretrained)


def test_of_two_programs_that_save_to_one_path_one_saves_and_the_other_is_told(
    tmp_path, monkeypatch
):
    pretrained, plan, params = small()
    save = ocp.save

    def meanwhile(path, tree, **options):
        save(path, tree, **options)
        monkeypatch.setattr(ocp, "save", save)
        checkpoint.save_adapters(tmp_path / "saved", mora_jax.attach(plan, pretrained), plan)

    monkeypatch.setattr(ocp, "save", meanwhile)
    with pytest.raises(ValueError, match="saved exists already, and is not overwritten"):
        checkpoint.save_adapters(tmp_path / "saved", params, plan)
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    loaded, _ = checkpoint.load_adapters(tmp_path / "saved", pretrained)
    assert_same_bits(loaded, params)


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    _, plan, params = small()

    def fail(path, tree, **options):
        path.mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(ocp, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save_adapters(tmp_path / "saved", params, plan)
    assert list(tmp_path.iterdir()) == []


def test_what_to_do_where_something_lies_is_said_whole(tmp_path):
    pretrained, plan, params = small()
    checkpoint.save_adapters(tmp_path / "saved", params, plan)
    with pytest.raises(ValueError, match=r"name='mine'.*or remove .*shutil\.rmtree\('/.*saved'\)"):
        checkpoint.save_adapters(tmp_path / "saved", params, plan)
    with pytest.raises(
        ValueError, match=r"new directory, or remove .*shutil\.rmtree\('/.*saved'\)"
    ):
        peft.save_adapters(tmp_path / "saved", params, plan)
    shutil.rmtree(tmp_path / "saved")
    checkpoint.save_adapters(tmp_path / "saved", params, plan)
    assert_same_bits(checkpoint.load_adapters(tmp_path / "saved", pretrained)[0], params)
