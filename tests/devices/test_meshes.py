"""A model on meshes of eight devices: numbers, collectives, shardings."""

import pytest

from helpers.devices import run_on_eight_devices


@pytest.fixture(scope="module")
def found():
    """Collectives of the baseline and of the adapted model, in its forward pass and its step."""
    return run_on_eight_devices("eight_meshes.py")


def test_the_forward_pass_sends_what_the_baseline_sends(found):
    assert len(found["delta"]) == 10
    for case, counts in found["delta"].items():
        assert counts["forward"] == counts["baseline forward"], case


def test_the_step_sends_the_sum_of_the_adapters_gradients_besides(found):
    for case, counts in found["delta"].items():
        baseline, step = counts["baseline step"], counts["step"]
        assert step.keys() == baseline.keys(), case
        assert step["all-reduce"] <= baseline["all-reduce"] + 1, case
        # Two matrices of 14 x 14, over each axis of the mesh on its own at worst; no activations.
        # Rotation's blocks, the fewer of 5 and 10, are summed before they are turned.
        matrices = 2 * 5 if "cycled" in case else 2
        assert step["numbers"] <= baseline["numbers"] + 2 * matrices * 14 * 14, case
        # Where the compiler places (Auto), a kernel may be gathered for its second sum again.
        extra = 2 if "Auto" in case else 0
        assert step.get("all-gather", 0) <= baseline.get("all-gather", 0) + extra, case


def test_norms_of_dora_are_sums_of_two_numbers_for_each_output(found):
    """Besides, only the magnitudes and their gradients are summed or gathered: no activations."""
    # Outputs of the layers whose inputs are in parts, as a device has them: where it is Explicit
    # the wider layer's kernel is gathered first.
    outputs = {"Auto": 64 + 32, "Explicit": 64}
    assert found["dora"].keys() == outputs.keys()
    for kind, counts in found["dora"].items():
        plain = found["delta"][f"2x2x2 {kind} sharing"]
        forward = {"all-reduce": 2, "numbers": 2 * outputs[kind], "all-gather": 1, "gathered": 64}
        step = {"numbers": forward["numbers"] + 2 * 64, "all-gather": 2, "gathered": 2 * 64}
        for case, extra in {"forward": forward, "step": forward | step}.items():
            got, without = counts[case], plain[case]
            assert got.keys() == without.keys(), (kind, case)
            assert all(got[name] <= without[name] + extra[name] for name in got), (kind, case)
        assert counts["forward"]["numbers"] > plain["forward"]["numbers"], kind


def test_the_forward_pass_of_a_custom_scheme_sends_what_the_baseline_sends(found):
    """Its numbers are those of one device; what its gradient sends is left to the compiler."""
    assert found["custom"].keys() == {"Auto", "Explicit"}
    for kind, counts in found["custom"].items():
        assert counts["forward"] == counts["baseline forward"], kind
