"""The short scripts at the top of examples/: each runs, and what it prints is what it promises."""

import re

import pytest

import adapter_bank
import any_function
import quantised
import quickstart
import remora
import to_pytorch
import with_nnx


@pytest.fixture
def printed(capsys):
    """(script) -> what its main prints."""

    def run(script):
        script.main()
        return capsys.readouterr().out

    return run


def numbers(pattern, text):
    """The groups of every match, as numbers; there must be one."""
    found = [tuple(map(float, match.groups())) for match in re.finditer(pattern, text)]
    assert found, text
    return found


FELL = r"loss ([\d.]+) -> ([\d.]+)"
OFF = r"differs? (?:from .*)?by ([\d.e+-]+)"


@pytest.mark.parametrize("script", [quickstart, with_nnx, any_function], ids=lambda s: s.__name__)
def test_the_same_training_in_three_kinds_of_model(printed, script):
    text = printed(script)
    assert "2 adapters in 2 kernels; 392 trained parameters" in text
    assert numbers(FELL, text) == [pytest.approx((0.0955, 0.0627), abs=2e-3)]
    assert numbers(OFF, text)[0][0] < 1e-5


def test_remora_adds_rank_with_every_merge_until_it_is_full(printed):
    rows = numbers(r"step (\d+): loss ([\d.]+), added rank (\d+),", printed(remora))
    steps, losses, ranks = zip(*rows, strict=True)
    assert steps == (100, 200, 300, 400)
    assert ranks == (14, 28, 32, 32)  # the kernel is 32 x 64 and R is 14
    assert list(losses) == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]  # what one rank-14 delta cannot do


def test_each_adapter_of_a_bank_does_its_own_task(printed):
    text = printed(adapter_bank)
    ((own, other),) = numbers(r"poems: loss on poems ([\d.]+), loss on maths ([\d.]+)", text)
    assert own < 0.6 * other
    ((other, own),) = numbers(r"maths: loss on poems ([\d.]+), loss on maths ([\d.]+)", text)
    assert own < 0.6 * other
    off = numbers(OFF, text)
    assert len(off) == 2
    assert max(off)[0] < 1e-5


def test_a_quantised_base_is_small_and_its_adapters_learn(printed):
    text = printed(quantised)
    assert all(small < 0.3 * whole for whole, small in numbers(r"(\d+) bytes -> (\d+)", text))
    ((first, last),) = numbers(FELL, text)
    assert last < 0.7 * first
    assert numbers(r"merged model ([\d.]+)", text)[0][0] < 1.05 * last


def test_pytorch_gets_the_names_it_knows(printed):
    text = printed(to_pytorch)
    mora, lora = text.split("the nearest LoRA")
    assert "read back bit for bit: True" in mora
    assert "mlp.fc_out.lora_A.weight [14, 14]" in mora
    assert "mlp.fc_in.lora_A.weight [8, 32]" in lora
    assert "mlp.fc_in.lora_B.weight [64, 8]" in lora
    ((kept,),) = numbers(r"all, rank 8 .* ([\d.]+)%", lora)
    assert 80 < kept < 100
