"""The paper's pretraining: what is to be done next, random groups, runs that are cut off."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "paper"))

import pretrain  # noqa: E402
import recipes  # noqa: E402
from results import Results  # noqa: E402

FLAGS = {
    "model": "tiny", "rank": 1, "steps": 2, "evaluate-every": 1, "merge-every": 1, "warmup": 0,
    "rewarm": 1, "batch": 2, "length": 16, "held-out": 4, "save-every": 100, "seeds": 0,
    "rates": 0.001, "text": ROOT / "LICENSE",
}  # fmt: skip


def run(folder, *flags, mode="train"):
    folder.mkdir(exist_ok=True)
    files = {"json": "runs.json", "out": "out", "picture": "runs.png"}
    files = FLAGS | {name: folder / file for name, file in files.items()}
    given = [part for name, value in files.items() for part in (f"--{name}", value)]
    return [*map(str, (mode, *given, *flags))]


def test_a_run_that_is_cut_off_goes_on_and_random_groups_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(Results, "next_of", lambda self, *_: None if self.runs else (0.01, 0))
    seen = []
    merge = pretrain.Pretraining.merge

    def checked(task, state, plan, groups, after, key):
        """The model is the same function before and after, in other groups."""
        tokens = np.arange(68, dtype=np.int32).reshape(2, 2, 17)
        before = task.evaluate(state.trainable, state.frozen, tokens, plan, groups)
        state, plan = merge(task, state, plan, groups, after, key)
        seen.append((before, task.evaluate(state.trainable, state.frozen, tokens, plan, after)))
        assert any((groups[path][0] != after[path][0]).any() for path in groups)
        return state, plan

    monkeypatch.setattr(pretrain.Pretraining, "merge", checked)

    def train(name, *flags):
        flags = ("--methods", "random groups", *flags)
        return pretrain.train(pretrain.parse_args(run(tmp_path / name, *flags)))

    whole = train("whole")
    assert not train("parts", "--minutes", 0).runs  # one step, and a merge
    parts = train("parts")
    (one,), (other,) = whole.runs, parts.runs
    del one["seconds"], other["seconds"]
    assert one == other
    assert [step for step, _ in one["curve"]] == [1, 2]
    # Twice 8 of 32, or 11 of 32 in the wider layers: the second groups add all that they can.
    assert one["rank"] == pytest.approx((4 * 16 + 3 * 22) / 7 / 32, abs=0.03)
    assert len(seen) == 2  # one of each
    np.testing.assert_allclose(*np.array(seen).T, rtol=1e-5)
    with pytest.raises(ValueError, match=r"of another setting: \{'rank': 1\}"):
        train("whole", "--rank", 2)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *run(tmp_path / "whole", mode="plot")])
    pretrain.main()
    assert (tmp_path / "whole" / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_the_authors_two_and_four_groupings_go_round():
    config = pretrain.PRESETS["tiny"]
    model = pretrain.Llama(pretrain.dataclasses.replace(config, vocab_size=256))
    assert pretrain.make_plan(recipes.RECIPES["full rank"], model, 2) is None
    for name, length in (("two groupings", 2), ("four groupings", 4), ("one grouping", 1)):
        plans = [pretrain.make_plan(recipes.RECIPES[name], model, 2)]
        for _ in range(length):
            plans.append(plans[-1].advance())
        assert plans[0] == plans[-1]
        assert len(set(plans)) == length


def test_the_rate_is_the_best_of_a_grid_that_grows_at_its_ends(tmp_path):
    losses = {1: 3.0, 2: 2.0, 4: 1.0, 8: float("nan")}
    results = Results(tmp_path / "runs.json", {"seeds": [0, 1, 2]}, [])
    done = []
    while (todo := results.next_of("signs", [1, 2], [0, 1, 2])) is not None:
        rate, seed = todo
        results.add({"method": "signs", "rate": rate, "seed": seed, "loss": losses[rate] + seed})
        done.append(todo)
    assert done == [(1, 0), (2, 0), (4, 0), (8, 0), (4, 1), (4, 2)]
    assert [run["loss"] for run in Results.open(results.path).best("signs")] == [2.0, 3.0]
    assert json.loads(results.path.read_text())["setting"] == {"seeds": [0, 1, 2]}


def test_permutations_are_undone():
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.standard_normal((2, 5, 7))}, "b": np.ones(3)}
    groups = {"a/kernel": (rng.permutation(5), rng.permutation(7))}
    mixed = recipes.permuted(params, groups)
    assert (mixed["a"]["kernel"] != params["a"]["kernel"]).any()
    back = recipes.permuted(mixed, recipes.inverse(groups))
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.float32, params))
