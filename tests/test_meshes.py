"""A model on meshes of eight devices: numbers, collectives, shardings."""

import pytest

from conftest import run_on_eight_devices


@pytest.fixture(scope="module")
def found():
    """Collectives of the floor and of the adapted model, in its forward pass and its step."""
    return run_on_eight_devices("eight_meshes.py")


def test_the_forward_pass_sends_what_the_floor_sends(found):
    assert len(found) == 10
    for case, counts in found.items():
        assert counts["forward"] == counts["floor forward"], case


def test_the_step_sends_the_sum_of_the_adapters_gradients_besides(found):
    for case, counts in found.items():
        floor, step = counts["floor step"], counts["step"]
        assert step.keys() == floor.keys(), case
        assert step["all-reduce"] <= floor["all-reduce"] + 1, case
        # Two matrices of 14 x 14, over each axis of the mesh on its own at worst; no activations.
        # Rotation's blocks, the fewer of 5 and 10, are summed before they are turned.
        matrices = 2 * 5 if "cycled" in case else 2
        assert step["numbers"] <= floor["numbers"] + 2 * matrices * 14 * 14, case
        # Where the compiler places (Auto), a kernel may be gathered for its second sum again.
        extra = 2 if "Auto" in case else 0
        assert step.get("all-gather", 0) <= floor.get("all-gather", 0) + extra, case
