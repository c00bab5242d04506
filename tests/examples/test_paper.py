"""The paper's experiments: miniatures of each, and runs that are cut off."""

import functools
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax
from helpers.files import ROOT
from helpers.paper_runs import flags_of, trained
from llama.model import Llama
from paper import (
    biomedicine,
    libraries,
    mathematics,
    pretrain,
    python_model,
    recipes,
    study,
    training,
    uuid_pairs,
)
from paper.results import Results

#: Run by `python3 run.py test -m slow`.
pytestmark = pytest.mark.slow

SHORT = {
    "rank": 1, "steps": 2, "evaluate_at": 1, "merge_every": 1, "warmup": 0, "batch": 2,
    "length": 16, "held_out": 4, "save_every": 100, "text": ROOT / "LICENSE",
}  # fmt: skip


def test_a_run_that_is_cut_off_goes_on_and_random_groups_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(Results, "next_of", lambda self, *_: None if self.runs else (0.01, 0))
    seen = []
    restart = training.Training.restart

    def loss(task, state, plan):
        """Of the model that the parameters make, without its step."""
        tokens = np.arange(34, dtype=np.int32).reshape(2, 17)
        rows = training.Rows.whole(tokens)
        return training.held_out_loss(task.base_model, task.merged(state, plan), rows, 2)

    def checked(task, state, plan, key):
        """The model is the same function before and after, in other groups."""
        before, schemes = loss(task, state, plan), [spec.scheme for spec in plan.values()]
        state, plan = restart(task, state, plan, key)
        seen.append((before, loss(task, state, plan)))
        assert len({*schemes, *(spec.scheme for spec in plan.values())}) == 2 * len(plan)
        return state, plan

    monkeypatch.setattr(training.Training, "restart", checked)

    def train(name, **flags):
        flags = {"methods": "random groups", "seeds": 0, **SHORT, **flags}
        return trained(pretrain, recipes.RECIPES, tmp_path / name, **flags)[1]

    whole = train("whole")
    assert not train("parts", minutes=0).runs  # one step, and a merge
    parts = train("parts")
    (one,), (other,) = whole.runs, parts.runs
    assert one == other
    assert [found["step"] for found in one["curve"]] == [1, 2]
    # Twice 8 of 32, or 11 of 32 in the wider layers: the second groups add all that they can.
    assert one["rank"] == pytest.approx((4 * 16 + 3 * 22) / 7 / 32, abs=0.03)
    assert len(seen) == 2  # one of each
    np.testing.assert_allclose(*np.array(seen).T, rtol=1e-5)
    with pytest.raises(ValueError, match=r"of another setting: rank 1, not 2\."):
        train("whole", rank=2)
    args = pretrain.parse_args(["plot", *flags_of(tmp_path / "whole", **SHORT)])
    study.main(args, pretrain.make_task, {}, pretrain.columns, pretrain.draw)
    assert (tmp_path / "whole" / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_mora_memorises_what_lora_of_its_size_does_not(tmp_path, capsys):
    """Table 2 in small: each at its own best rate, which lies within the rates that it tried."""
    methods = {
        "LoRA 8": recipes.Recipe(mora_jax.LowRank(), 8, 1.6e-2),
        "sharing 8": recipes.Recipe(mora_jax.Sharing(), 8, 1.6e-2),
    }
    args, found = trained(
        uuid_pairs, methods, tmp_path, methods=(*methods,), pairs=96, characters=6, steps=60,
        evaluate_at=30, batch=96, warmup=5,
    )  # fmt: skip
    (lora,), (mora,) = (found.best(method) for method in args.methods)
    assert lora["seed"] == mora["seed"] == 1
    assert lora["trained"] <= mora["trained"] < 1.02 * lora["trained"]
    lora_accuracy, mora_accuracy = (run["curve"][-1]["accuracy"] for run in (lora, mora))
    assert mora_accuracy > 0.9
    assert mora_accuracy > lora_accuracy + 0.3
    assert mora["above"] > 16 > 8 >= lora["above"] > 7  # the spectrum of Figure 5
    for run in (lora, mora):
        assert min(found.rates(run["method"])) < run["rate"] < max(found.rates(run["method"]))
    drawn = uuid_pairs.parse_args(["plot", *flags_of(tmp_path)])
    study.main(drawn, uuid_pairs.make_task, {}, uuid_pairs.columns, uuid_pairs.draw)
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| method | % at 30 | % at 60 |" in printed
    assert f"| sharing 8 | {100 * mora['curve'][0]['accuracy']:.1f} |" in printed


def test_problems_are_answered_at_chosen_rates_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Results, "next_of", lambda self, *_: [(2e-2, 0), (2e-2, 1), None][len(self.runs)]
    )
    for name in ("train", "test"):
        rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, found = trained(
        mathematics, recipes.FINETUNING, tmp_path, methods="DoRA on sharing 8", batch=4, steps=30,
        merge_every=9, length=16, warmup=2, held_out=2, test_items=5, test_batch=2, new_tokens=8,
        data=tmp_path / "train.jsonl", test=tmp_path / "test.jsonl",
    )  # fmt: skip
    chose, tested = found.runs
    assert [found["step"] for found in tested["curve"]] == [0, 10, 20, 30]
    assert tested["curve"][0]["loss"] > 5 > 3 > tested["cost"] == tested["curve"][-1]["loss"]
    assert chose["curve"][-1].keys() == {"step", "loss"}
    assert tested["curve"][-1].keys() == {"step", "loss", "test", "exact", "last_number"}
    # Of the five that are tested, those that are trained on are learned by now.
    assert tested["curve"][-1]["exact"] >= 0.4
    mathematics.draw(found, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").exists()


def test_biomedicine_holds_diseases_out_and_counts_likeliest_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Results, "next_of", lambda self, *_: [(2e-2, 0), (2e-2, 1), None][len(self.runs)]
    )
    names = [f"Disease {number}" for number in range(200)]
    quads = [
        {"question": ask.format(name), "answer": f"{name} is a disease. " * 3}
        for name in names for ask in ("What is (are) {} ?", "Is {} inherited ?")
    ]  # fmt: skip
    studies = [
        {"question": f"Is {i} odd?", "context": f"{i} is a number.", "answer": "maybe"}
        for i in range(20)
    ]
    for name, rows in (("quad", quads), ("pub", studies)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    args, found = trained(
        biomedicine, recipes.FINETUNING, tmp_path, methods="ReMoRA 8", batch=8, steps=9, length=64,
        merge_every=3, warmup=1, medquad=tmp_path / "quad", pubmedqa=tmp_path / "pub",
    )  # fmt: skip
    task, base = biomedicine.make_task(args), biomedicine.base_models.load("tiny")
    assert "of the questions' answers 0.0% yes, 0.0% no, 100.0% maybe" in capsys.readouterr().out
    held = [name for name in names if biomedicine.share(name.lower()) <= 0.05]
    assert 3 < len(held) < 20
    text = base.tokenizer.decode(np.ravel(task.rows(0).tokens).tolist())
    assert not any(f"{name} is" in text for name in held)
    assert sum(f"{name} is" in text for name in names) >= len(names) - len(held) - 1
    assert sum(study["context"] in text for study in studies) in range(4, 17)
    chose, tested = found.runs
    assert chose["curve"][-1].keys() == {"step", "loss"}
    assert tested["curve"][-1].keys() == {"step", "loss", "test", "right"}
    assert tested["cost"] < tested["curve"][0]["loss"] - 1
    # A model that has only these letters is right about every study that says maybe.
    sure = jax.tree.map(jnp.zeros_like, base.params)
    sure["norm"]["scale"] += 1
    sure["embed_tokens"]["embedding"] += 1
    letters = base.tokenizer.encode(" maybe").ids
    sure["lm_head"]["kernel"] = sure["lm_head"]["kernel"].at[:, np.array(letters)].add(1)
    assert task.measure(args.steps, 1, sure)["right"] == 1
    flags = flags_of(tmp_path, medquad=tmp_path / "quad", held_out=1, length=64)
    args = biomedicine.parse_args(["train", *flags])
    short = biomedicine.make_task(args)
    assert short.measure(args.steps, 1, sure).keys() == {"loss", "test"}
    assert short.measure(0, 0, base.params) != task.measure(0, 0, base.params)
    half = biomedicine.make_task(biomedicine.parse_args(["train", *flags, "--dtype", "bfloat16"]))
    assert half.base_model.dtype == "bfloat16"  # trains in it, but is measured as others are
    assert half.measure(0, 0, base.params) == short.measure(0, 0, base.params)
    with pytest.raises(SystemExit):
        biomedicine.parse_args(["train", *flags, "--held-out", "0"])
    biomedicine.draw(found, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").exists()


def test_the_authors_two_and_four_groupings_go_round():
    config = pretrain.PRESETS["tiny"]
    model = pretrain.Llama(pretrain.dataclasses.replace(config, vocab_size=256))
    make_plan = functools.partial(training.make_plan, base_model=model, rank=2, also_train=None)
    assert make_plan(recipes.RECIPES["full rank"]) is None
    for name, length in (("two groupings", 2), ("four groupings", 4), ("one grouping", 1)):
        plans = [make_plan(recipes.RECIPES[name])]
        for _ in range(length):
            plans.append(plans[-1].advance())
        assert plans[0] == plans[-1]
        assert len(set(plans)) == length


def test_recipes_merge_each_time_or_more_rarely():
    args = pretrain.parse_args(["train", "--steps", "90", "--merge-every", "10", "--rewarm", "2"])
    wanted = {
        "MoRA": (), "signs": (10, 20, 30, 40, 50, 60, 70, 80),
        "signs every 2nd": (20, 40, 60, 80), "signs every 4th": (40, 80),
    }  # fmt: skip
    args.warmup = 3
    for name, merges in wanted.items():
        assert training.merges_of(args, recipes.RECIPES[name]) == merges
        rates = training.make_rates(args, recipes.RECIPES[name], 1.0)
        assert tuple(np.flatnonzero(rates[1:] < 0.7 * rates[:-1]) + 1) == merges  # to climb again


def test_a_small_model_is_pretrained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(python_model, "STEPS", 12)
    documents = [(ROOT / "LICENSE").read_text()]
    monkeypatch.setattr(python_model.text, "python_documents", lambda: iter(documents))
    trained, train = [], python_model._train
    monkeypatch.setattr(python_model, "_train", lambda *a: trained.append(a) or train(*a))
    first, again = (biomedicine.base_models.load("mini") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert len(trained) == 1
    monkeypatch.setattr(python_model, "RATE", 1e-9)
    other = biomedicine.base_models.load("mini")
    assert len(trained) == 2
    names = {biomedicine.base_models.fingerprint("mini", x) for x in (first, again, other)}
    assert len(names) == 2
    tokens = np.array([first.tokenizer.encode(documents[0]).ids[:65]], np.int32)
    model = Llama(first.config)
    fresh = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    loss = lambda params: float(training.held_out_loss(model, params, rows, 1))
    rows = training.Rows.whole(tokens)
    assert loss(first.params) < loss(fresh) - 1


def test_libraries_are_their_python_files_in_order(tmp_path, monkeypatch):
    files = {"b/2.py": b"second", "b/1.py": b"first \xff", "b/data.txt": b"no", "a.py": b"0" * 99}
    for wheel in ("one", "two"):
        with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, wheel.encode() + content)
    monkeypatch.setattr(libraries, "WHEELS", {"two": "digest", "one": "digest"})
    monkeypatch.setattr(libraries.wheels, "fetch", lambda wheel, member, sha256: tmp_path / wheel)
    found = list(libraries.documents())
    assert [text[:9] for text in found[:3]] == ["two000000", "twofirst ", "twosecond"]
    assert found[4] == "onefirst \ufffd"
    flags = flags_of(tmp_path, length=16, held_out=4)
    task = pretrain.make_task(pretrain.parse_args(["train", "--libraries", *flags]))
    assert task.rows(0).tokens.shape == (
        sum(len(text.encode()) + 1 for text in found) // 17 - 4,
        17,
    )
