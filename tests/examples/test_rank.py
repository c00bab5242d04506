"""Ranks of summed deltas (examples/paper/rank.py): what theory says of each way to regroup."""

import itertools
import json

import pytest

import mora_jax
from paper import rank

#: Run by `python3 run.py test -m slow`.
pytestmark = pytest.mark.slow

MERGES = 3


def test_ranks_are_those_of_theory(tmp_path, capsys):
    files = ["--json", str(tmp_path / "rank.json"), "--picture", str(tmp_path / "rank.png")]
    rank.main([*files, "--layers", "40x40:2", "20x56:1", "--merges", str(MERGES)])
    written = json.loads((tmp_path / "rank.json").read_text())
    assert written["setting"] == {"merges": MERGES, "seed": 0, "threshold": 1e-6}
    found = {(row["layer"], row["method"]): row for row in written["rows"]}
    assert found.keys() == set(itertools.product(("40x40:2", "20x56:1"), rank.METHODS))
    for layer, inputs, outputs, lora in (("40x40:2", 40, 40, 2), ("20x56:1", 20, 56, 1)):
        size = mora_jax.square_rank(inputs, outputs, lora, mora_jax.Sharing())
        full = min(inputs, outputs)
        number = range(1, MERGES + 1)
        # The sum of all features is in the span of every grouping but those with signs.
        wanted = {
            "ReLoRA": [lora * k for k in number],
            "one grouping": [size] * MERGES,
            "two groupings": [size, 2 * size - 1, 2 * size - 1],
            # Of 20 features in groups of 2 and 3 all shifts together leave one direction out.
            "shifts": [size, 2 * size - 1, min(3 * size - 2, full - (full == 20))],
            "signs": [min(k * size, full) for k in number],
            "cycled rotation": [full] * MERGES,
        }
        for method, ranks in wanted.items():
            assert found[layer, method]["rank"] == ranks, (layer, method)
        # The same two ways to cut each side, in all four pairs.
        assert found[layer, "four groupings"]["rank"] == wanted["two groupings"], layer
        for row in (row for row in found.values() if row["layer"] == layer):
            for effective, exact in zip(row["effective_rank"], row["rank"], strict=True):
                assert 1 <= effective <= exact
    table = capsys.readouterr().out
    picture = (tmp_path / "rank.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    (tmp_path / "rank.png").unlink()
    rank.main([*files, "--plot"])
    assert capsys.readouterr().out == table
    assert (tmp_path / "rank.png").exists()
