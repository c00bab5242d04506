"""A sample of what fuzz_files.py does in full: damaged and hostile files give no other numbers."""

import gc

import pytest

from integration import fuzz_files

#: Run by `python3 run.py test -m slow`.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, fuzz_files.kinds(folder)


def test_what_is_whole_is_read_as_it_was_saved(kinds):
    for name, (read, is_same) in kinds[1].items():
        assert is_same(read()), name


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's
def test_flipped_bits(kinds):
    rows = list(fuzz_files.flips(*kinds, 8))
    gc.collect()
    assert {kind for kind, *_ in rows} == kinds[1].keys()
    assert len(rows) >= 15  # TensorStore writes a file for each array, or one for several
    refused = {(kind, file): number for kind, file, number, _ in rows}
    assert refused["plan", "plan.json"] == 8
    assert refused["peft_lora", "adapter_model.safetensors"] >= 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's
def test_hostile_files(kinds):
    rows = list(fuzz_files.attacks(*kinds, 150))
    gc.collect()
    assert sum(refused for _, refused, _, _ in rows) > 75
    assert {kind: growth for kind, _, _, growth in rows if growth > 100} == {}
