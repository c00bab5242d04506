"""What a layer sends between devices, compiled for eight of them: nothing beyond the baseline's."""

import pytest

from helpers.devices import run_on_eight_devices


@pytest.fixture(scope="module")
def found():
    """Collectives of the baseline and of each case, in the forward pass and in the whole step."""
    return run_on_eight_devices("eight_devices.py")


def test_the_forward_pass_sends_what_the_baseline_sends(found):
    assert len(found) == 34
    for case, ((baseline, _), (forward, _)) in found.items():
        # Where inputs are sharded by features, what sharing keeps of them is a sum over devices:
        # 32 rows of R numbers more, in the baseline's own all-reduce.
        sharing = "rotation" not in case and "cycled" not in case
        kept = 32 * 39 if " row " in case and sharing else 0
        assert forward == {**baseline, "numbers": baseline["numbers"] + kept}, case


def test_sharing_adds_one_sum_of_its_gradient_to_the_step(found):
    for case, ((_, baseline), (_, step)) in found.items():
        if "rotation" in case or "cycled" in case:
            continue
        assert "all-to-all" not in step, case
        assert "collective-permute" not in step, case
        assert step.get("all-reduce", 0) <= baseline.get("all-reduce", 0) + 1, case
        # Where the kernel itself is gathered, the backward pass may gather it once more.
        extra = 1 if "fsdp" in case else 0
        assert step.get("all-gather", 0) <= baseline.get("all-gather", 0) + extra, case


def test_rotation_moves_nothing_while_blocks_fill_the_shards(found):
    for case, (_, (_, step)) in found.items():
        if case.startswith("512x512") or "tokens" in case:
            assert "all-to-all" not in step, case
            assert "collective-permute" not in step, case
