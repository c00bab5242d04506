"""What merging gains: whom it is taken from, how it is told and drawn."""

import numpy as np
import pytest

from paper import merging, pretrain, report
from paper.results import Results

LOSSES = {  # of seeds 0, which chose the rates, 1, 2 and 3
    "MoRA": (0.0, 2.0, 2.5, 3.0), "signs": (9.0, 1.9, 2.5, 2.7),
    "signs every 4th": (0.0, 2.1, 2.6, 3.1), "signs every 2nd": (0.0, 1.0, 1.0),
    "shifts": (0.0, 0.0, 0.0, 0.0),
}  # fmt: skip


def made(tmp_path, losses, **changed):
    setting = {"seed": 0, "model": "mini", "rank": 8, "dtype": "float32", "steps": 900,
               "batch": 32, "length": 64, "merge_every": 150, **changed}  # fmt: skip
    runs = [
        {"method": method, "rate": 1, "seed": seed, "cost": loss, "curve": [{"test": loss}]}
        for method, found in losses.items() for seed, loss in enumerate(found)
    ]  # fmt: skip
    return Results(tmp_path / "runs.json", setting, runs)


def test_gains_are_within_a_seed_of_what_merges_and_has_the_seeds_of_what_does_not(tmp_path):
    often, rarely = merging.gains_of(made(tmp_path, LOSSES))
    assert (often.merges, often.interval, often.seeds) == (5, 150, 3)
    assert (rarely.merges, rarely.interval, rarely.seeds) == (1, 600, 3)
    differences = np.array([-0.1, 0.0, -0.3])
    assert often.change == pytest.approx(differences.mean())
    assert often.error == pytest.approx(differences.std(ddof=1) / np.sqrt(3))
    assert (rarely.loss, rarely.change) == (pytest.approx(2.5), pytest.approx(0.1))
    assert often.parameters == 461_440  # as the miniature's full training has it
    assert often.seen == 900 * 32 * 64 / 461_440
    assert often.width == 45 / 128  # R = sqrt(256 * 8), rounded
    results = made(tmp_path, LOSSES)
    at_another_rate = {"method": "signs", "rate": 2, "cost": 9.5, "curve": [{"test": 0.0}]}
    results.runs += [{**at_another_rate, "seed": seed} for seed in range(4)]
    assert merging.gains_of(results)[0] == often  # 1 cost the first seed less
    alone = {method: found[:2] for method, found in LOSSES.items()}
    assert merging.gains_of(made(tmp_path, alone)) == []  # no error of one seed


def test_gains_are_told_and_drawn_the_largest_model_first(tmp_path, monkeypatch):
    pair = {method: LOSSES[method][:3] for method in ("MoRA", "signs")}
    small = merging.gains_of(made(tmp_path, LOSSES))
    large = merging.gains_of(made(tmp_path, pair, model="20m", rank=16))
    assert merging.table([*small, *large]).splitlines()[2:] == [
        "| 3.3 | 0.36 | 0.56 | 150 | 5 | 2.2500 | -0.0500 (0.0500), 2 seeds | -2.2% |",
        "| 0.461 | 0.35 | 4 | 600 | 1 | 2.5000 | +0.1000 (0.0000) | +4.0% |",
        "| 0.461 | 0.35 | 4 | 150 | 5 | 2.5000 | -0.1333 (0.0882) | -5.3% |",
    ]
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    merging.draw([*small, *large], tmp_path / "merging.png")
    (axes,) = plt.gcf().axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["0.461 million, M 0.35 of a square layer's width",
                     "3.3 million, M 0.35 of a square layer's width"]  # fmt: skip
    marks = {(t.get_text(), round(t.xy[0], 2), round(t.xy[1], 1)) for t in axes.texts}
    assert marks == {("5", 0.56, -2.2), ("1", 3.99, 4.0), ("5", 3.99, -5.3)}
    assert (tmp_path / "merging.png").exists()


def test_the_larger_models_have_been_compared():
    """The README tells of them; each has its M, its bytes a parameter and its own steps."""
    often = sorted(report.gains(), key=lambda gain: gain.merges)  # the last of a size merges most
    told = {round(gain.parameters / 1e6): gain for gain in often if gain.parameters > 1e7}
    assert {*told} >= {26, 152}
    assert told[152].change > 0 > told[26].change
    found = Results.open(report.HERE / "pretrain_150m.json")
    assert told[152].parameters == pretrain.parameters_of(found.setting) == 151_741_440
