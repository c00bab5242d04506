"""What is to be run next, what a table tells of it, and that the README's are those of the JSON."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest

from helpers.files import ROOT
from helpers.paper_runs import flags_of, trained
from paper import (
    biomedicine,
    mathematics,
    parallel,
    pretrain,
    recipes,
    report,
    study,
    training,
    uuid_pairs,
)
from paper.differences import matrix, paired
from paper.figures import draw_dots, ranked
from paper.results import COST, Results, note, spread, table


def test_the_search_for_a_rate_follows_the_best_until_it_lies_inside(tmp_path):
    losses = {1: 3.0, 2: 2.0, 4: 1.0, 8: None}
    results = Results(tmp_path / "runs.json", {"seed": 0})
    done = []
    while (todo := results.next_of("signs", 1, [0, 1, 2])) is not None:
        rate, seed = todo
        cost = losses[rate] and losses[rate] + seed
        results.add({"method": "signs", "rate": rate, "seed": seed, "cost": cost})
        done.append(todo)
    assert done == [(1, 0), (2, 0), (4, 0), (8, 0), (4, 1), (4, 2)]
    results.add({"method": "signs", "rate": 4, "seed": 3, "cost": None})  # and one that diverged
    assert results.next_of("signs", 16, [0, 1, 2]) is None  # found, wherever it began
    assert [run["cost"] for run in Results.open(results.path).best("signs")] == [2.0, 3.0]
    assert "| 2, 1 diverged | 1: 3, 2: 2, **4: 1**, 8: diverged |" in table(results, {})
    assert json.loads(results.path.read_text())["setting"] == {"seed": 0}


@pytest.mark.slow
def test_two_programs_write_one_file_and_steps_are_timed(tmp_path):
    one, other = (Results(tmp_path / "runs.json", {"seed": 0}) for _ in range(2))
    one.add({"method": "MoRA", "rate": 1, "seed": 0, "cost": 4.0})
    other.add({"method": "LoRA", "rate": 1, "seed": 0, "cost": 3.0})
    assert other.methods == Results.open(one.path).methods == ["LoRA", "MoRA"]
    flags = {"pairs": 4, "characters": 2, "steps": 1, "batch": 4, "methods": "LoRA 8"}
    args = uuid_pairs.parse_args(["time", *flags_of(tmp_path / "timed", **flags)])
    timed = study.time_steps(args, uuid_pairs.make_task(args), uuid_pairs.METHODS)
    timed.add({"method": "LoRA 8", "rate": 1, "seed": 0, "cost": 1.0, "curve": [], "trained": 7})
    found = Results.open(args.json).times["LoRA 8"]
    assert found["milliseconds"] == pytest.approx(np.median(found["stretches"]), abs=1e-3)
    cells = f"| LoRA 8 | 7 | {found['milliseconds']:.1f} | 0.0 | the first | **1: 1** |"
    assert cells in table(timed, COST)


@pytest.mark.slow
def test_steps_that_are_timed_are_compiled_anew(tmp_path):
    flags = {"pairs": 4, "characters": 2, "steps": 1, "batch": 4, "methods": "LoRA 8"}
    flags |= {"warmup": 0, "minutes": 0}
    for mode in ("time", "train"):
        compiled = tmp_path / mode
        command = [
            sys.executable,
            uuid_pairs.__file__,
            mode,
            *flags_of(tmp_path / "timed", **flags),
        ]
        variables = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compiled)}
        subprocess.run(command, env=variables, check=True, timeout=300)
        assert compiled.exists() == (mode == "train")


def test_a_search_goes_down_from_where_it_begins_and_from_what_diverged(tmp_path):
    losses = {1: 2.0, 2: 3.0, 0.5: 1.0, 0.25: 4.0}, {1: None, 0.5: 2.0, 0.25: 1.0, 0.125: 3.0}
    for method, costs in zip(("MoRA", "LoRA"), losses, strict=True):
        results, done = Results(tmp_path / f"{method}.json", {"seed": 0}), list[float]()
        while (todo := results.next_of(method, 1, [0])) is not None:
            done.append(todo[0])
            results.add({"method": method, "rate": todo[0], "seed": 0, "cost": costs[todo[0]]})
        assert done == [*costs]


def test_where_nothing_is_finite_smaller_rates_are_tried_and_then_it_is_said(tmp_path):
    results = Results(tmp_path / "runs.json", {"seed": 0})
    for rate in 0.5 ** np.arange(13.0):
        assert results.next_of("LoRA", 1, [0, 1]) == (rate, 0)
        results.add({"method": "LoRA", "rate": rate, "seed": 0, "cost": None})
    with pytest.raises(ValueError, match=r"LoRA diverged at every rate from 0\.000244141 on"):
        results.next_of("LoRA", 1, [0, 1])
    assert not results.methods
    ends = Results(tmp_path / "ties.json", {"seed": 0})
    done = []
    while (todo := ends.next_of("MoRA", 2, [0, 1])) is not None:
        ends.add({"method": "MoRA", "rate": todo[0], "seed": todo[1], "cost": 0.0})
        done.append(todo)
    assert done == [(2, 0), (4, 0), (1, 0), (2, 1)]
    assert [run["seed"] for run in ends.best("MoRA")] == [1]


@pytest.mark.slow
def test_a_run_that_diverges_is_told_and_seeds_differ_in_length(tmp_path, monkeypatch):
    """Rows of two lengths, one method: two programs. At an absurd rate nothing is measured."""
    todo = iter([(1e30, 0), (1e-3, 0), (1e-3, 1), None])
    monkeypatch.setattr(Results, "next_of", lambda self, *_: next(todo))
    rows = uuid_pairs.uuids.encode
    pads = iter([0, 16])  # the second seed's rows are longer by a tile

    def longer(pairs, *rest):
        examples, more = rows(pairs, *rest), next(pads)
        pad = lambda x: np.pad(x, ((0, 0), (0, more)))
        return examples._replace(tokens=pad(examples.tokens), loss_mask=pad(examples.loss_mask))

    monkeypatch.setattr(uuid_pairs.uuids, "encode", longer)
    _, found = trained(uuid_pairs, uuid_pairs.METHODS, tmp_path, methods="sharing 8", pairs=4,
                       characters=2, steps=12, evaluate_at=11, batch=4, warmup=0)  # fmt: skip
    lost, one, other = found.runs
    assert (lost["cost"], lost["diverged"], lost["curve"]) == (None, 10, [])
    assert None not in (one["cost"], other["cost"])
    assert f"| 1 | **0.001: {one['cost']:.4g}**, 1e+30: diverged |" in table(found, {})


def test_searches_begin_where_the_scale_says(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(Results, "next_of", lambda self, method, start, seeds: begun.append(start))
    flags = {"methods": "sharing 8", "pairs": 4, "characters": 2, "steps": 1, "rate_scale": 8}
    trained(uuid_pairs, uuid_pairs.METHODS, tmp_path, **flags)
    assert begun == [3.2e-2]


def test_losses_are_told_beside_those_of_merges_that_change_no_groups(tmp_path):
    run = lambda method, loss, seed=1: {
        "method": method, "rate": 1, "seed": seed, "cost": loss, "trained": 1, "rank": 1,
        "effective_rank": 1, "curve": [{"step": 1, "test": loss}],
    }  # fmt: skip
    searched = [run(method, 4.0, seed=0) for method in ("signs", "MoRA", "one grouping")]
    runs = [*searched, run("signs", 1.5), run("MoRA", 2.0)]
    results = Results(tmp_path / "runs.json", {"seed": 0}, runs)
    assert "minus MoRA's" in table(results, pretrain.columns(results))
    assert "| signs | 1.5000 | -0.5000 |" in table(results, pretrain.columns(results))
    results.runs.append(run("one grouping", 3.0))
    assert "minus one grouping's" in table(results, pretrain.columns(results))
    assert "| signs | 1.5000 | -1.5000 |" in table(results, pretrain.columns(results))


@pytest.mark.parametrize(
    ("experiment", "flags"),
    [
        (uuid_pairs, []),
        (mathematics, ["--data", "x/gsm8k_train.jsonl", "--test", "x/gsm8k_test.jsonl"]),
        (pretrain, []),
        (biomedicine, ["--medquad", "x/medquad.jsonl.xz", "--pubmedqa", "x/pubmedqa.jsonl"]),
        (biomedicine, "biomedicine_mini"),
        (pretrain, "pretrain_mini"),
        (pretrain, "pretrain_mini_16"),
        (pretrain, "pretrain_mini_32"),
        (pretrain, "pretrain_mini_steps_450"),
        (pretrain, "pretrain_mini_steps_1800"),
        (pretrain, "pretrain_mini_steps_3600"),
        (pretrain, "pretrain_mini_32_steps_450"),
        (pretrain, "pretrain_mini_32_steps_1800"),
        (pretrain, "pretrain_short"),
        (pretrain, "pretrain_60m"),
        (pretrain, "pretrain_150m"),
    ],
)
def test_the_commands_of_the_readme_go_on_with_the_results(experiment, flags):
    if isinstance(flags, str):  # the README has the whole command
        name = pathlib.Path(experiment.__file__).stem
        told = [part.split("```")[0] for part in report.README.read_text().split("```sh\n")[1:]]
        (command,) = (part for part in told if f"{flags}.json" in part)
        words = shlex.split(command.replace("\\\n", " "))
        if words[1] == "examples/paper/parallel.py":
            (job, *_) = parallel.jobs_of(words[4:], pathlib.Path())
            words = [*job.command[:1], f"examples/paper/{name}.py", *job.command[2:]]
        _, script, *flags = words
        assert script == f"examples/paper/{name}.py"
        assert flags.pop(0) == "train"
    args = experiment.parse_args(["train", *flags])
    rows = training.Rows.whole(np.zeros((2, 3), np.int32))
    made = study.settings(args, types.SimpleNamespace(rows=lambda seed: rows, base=None))
    there = Results.open(ROOT / args.json)
    unknown = {"rows": None, "base": None}  # what files and models that are not here make
    assert made | unknown == there.setting | unknown
    whole = note(there) == "3 seeds"
    partial = {"uuid_pairs", "mathematics", "pretrain_60m", "pretrain_150m"}
    assert whole == (args.json.stem not in partial)
    if whole:
        for method in there.methods:
            assert there.next_of(method, 1e-9, args.seeds) is None, method
    methods = {**recipes.RECIPES, **recipes.FINETUNING, **uuid_pairs.METHODS}
    assert {repr(methods[run["method"]]) == run["recipe"] for run in there.runs} == {True}


def test_the_tables_are_those_of_the_results(tmp_path, monkeypatch):
    written = report.README.read_text()
    assert "| method |" in written
    assert report.with_tables(written) == written  # else: python3 examples/paper/report.py
    (tmp_path / "pretrain_new.json").write_text((report.HERE / "pretrain_mini.json").read_text())
    monkeypatch.setattr(report, "HERE", tmp_path)
    with pytest.raises(ValueError, match=r"no '<!-- pretrain_new"):
        report.with_tables(written)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    names = "pretrain_new", "mathematics_search", "merging"
    marks = [f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in names]
    report.README.write_text("".join([*marks, "![](pretrain_new.png) ![](merging.png)"]))
    search = json.loads((report.HERE / "pretrain_new.json").read_text())
    fields = {"method": "LoRA 8", "rate": 1, "seed": 0, "cost": 2.0, "trained": 7, "curve": [{}]}
    fields |= {"device": "cpu", "jax": "0"}
    search |= {"setting": {"seed": 0}, "times": {}, "runs": [fields]}
    (tmp_path / "mathematics_search.json").write_text(json.dumps(search))
    report.main()
    assert {path.name for path in tmp_path.glob("*.png")} == {"pretrain_new.png", "merging.png"}
    text, gained = report.README.read_text().split("<!-- merging -->")
    first, search = text.split("<!-- end of pretrain_new -->")
    assert "| 0.461 | 0.35 | 4 | 150 | 5 | 1.6044 | -0.0364 (0.0057) | -2.3% |" in gained
    assert "| LoRA 8 | 2.0000 | 7 | the first | **1: 2** |" in search
    assert "| cycled rotation | +0.1077 (0.0062) |  |" in first  # as the README's miniature has it
    assert "<details>" not in search


def test_differences_of_any_column_are_printed(capsys):
    report.main(["--differences", "mathematics", "held-out loss"])
    caption, _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert caption == "Within a seed, held-out loss: row minus column, standard error of 3 seeds"
    (line,) = (line for line in lines if line.startswith("| truncation 8 |"))
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["sharing 8"] == "+0.0022 (0.0004)"
    with pytest.raises(ValueError, match=r"There is no maths\.json here, only .*mathematics"):
        report.main(["--differences", "maths", "held-out loss"])
    with pytest.raises(ValueError, match=r"no column 'loss', only test loss, right, %, held-out"):
        report.main(["--differences", "mathematics", "loss"])


def test_differences_are_taken_within_a_seed(tmp_path):
    losses = {  # of seeds 0, which chose the rates, 1, 2 and 3
        "worst": (0.0, 2.0, 4.0, 6.0), "best": (9.0, 1.0, 2.0, 3.0), "lost": (1.0, 7.0, None, 7.0),
        "second": (0.0, 1.5, 2.5, 3.5), "the first": (8.0,),
        "untested": (9.0, 9.0, 9.0, 9.0),
    }  # fmt: skip
    runs = [
        {"method": method, "rate": 1, "seed": seed, "cost": loss}
        | ({} if method == "untested" else {"test": loss})
        for method, found in losses.items() for seed, loss in enumerate(found)
    ]  # fmt: skip
    runs.reverse()  # the order in which seeds are done is nobody's
    results = Results(tmp_path / "runs.json", {"seed": 0}, runs)
    columns = {"loss|.3f": lambda run: run.get("test"), "seed|d": lambda run: run["seed"]}
    assert matrix(results, columns).splitlines() == [
        "Within a seed, loss: row minus column, standard error of 3 seeds",
        "",
        "| row minus column | best | second |",
        "| --- | --- | --- |",
        "| second | +0.500 (0.000) |  |",
        "| worst | +2.000 (0.577) | +1.500 (0.577) |",  # 1, 2, 3: deviation 1, over root 3
        "",
        "Without all of these seeds, and left out: lost, the first, untested.",
    ]
    more = {"method": "best", "rate": 1, "seed": 4, "cost": 0.0, "test": 0.0}
    results.runs = [*runs, more]  # one method is ahead of the others
    assert "| worst | +2.000 (0.577) | +1.500 (0.577) |" in matrix(results, columns)
    results.runs = [run for run in runs if run["method"] in ("best", "the first")]
    assert matrix(results, columns) == ""  # nobody to differ from
    results.runs = [run for run in runs if run["seed"] < 2]
    assert matrix(results, columns) == ""  # no error of one seed
    with pytest.raises(ValueError, match=r"the same of both: got \[1, 2\] and \[1, 3\]"):
        paired({1: 0.0, 2: 0.0}, {1: 0.0, 3: 0.0})
    with pytest.raises(ValueError, match=r"two seeds or more, .* got \[1\] and \[1\]"):
        paired({1: 0.0}, {1: 0.0})


def test_each_seed_is_a_dot_hollow_where_it_chose_the_rate(tmp_path):
    from matplotlib import pyplot as plt

    losses = {"two": (9.0, 3.0, 5.0), "chosen by": (6.0,), "best": (9.0, 2.0), "untold": (1.0, 0.0)}
    runs = [
        {"method": method, "rate": 1, "seed": seed, "cost": loss, "loss": loss or None}
        for method, found in losses.items() for seed, loss in enumerate(found)
    ]  # fmt: skip
    results = Results(tmp_path / "runs.json", {"seed": 0}, runs)
    number = lambda run: run["loss"]
    assert ranked(results, number) == ["best", "two", "chosen by"]
    _, axes = plt.subplots()
    draw_dots(axes, results, ["untold", *ranked(results, number)], number)
    dots = [(*line.get_xydata()[0], line.get_markerfacecolor()) for line in axes.get_lines()]
    assert dots == [(2, 1, "C0"), (3, 2, "C0"), (5, 2, "C0"), (6, 3, "none")]
    assert axes.get_yticklabels()[0].get_text() == "untold"
    plt.close()


@pytest.mark.parametrize(
    ("name", "head", "told", "unit"),
    [
        ("uuid_pairs", "% at 300|.1f", "2,000 UUID pairs: characters right after 300 steps", "%"),
        ("uuid_pairs", "ms a step|.1f", "the same: milliseconds of a step of 16,000 tokens", ""),
        ("uuid_pairs", "GB|.1f", "the same: gigabytes of that step", ""),
        ("mathematics", "test loss|.4f", "GSM8K: loss of the test answers", ""),
        ("mathematics", "right, %|.1f", "GSM8K: of 1,319 problems right", "%"),
    ],
)
def test_the_readme_of_the_library_tells_the_same(name, head, told, unit):
    results = Results.open(report.HERE / f"{name}.json")
    number, form = report.EXPERIMENTS[name].columns(results)[head], head.split("|")[1]
    sizes, cells = "| |", f"| {told} |"
    for method in ("sharing 8", "LoRA 8", "all parameters"):
        runs = results.best(method)
        timed = (results.times[method] | run for run in runs)
        mean, *seeds = spread(map(number, timed), form).split(" ", 1)
        cells += f" {' '.join([mean + unit, *seeds])} |"
        sizes += f" {method}, {runs[0]['trained'] / 1e6:.1f}M |"
    lines = (ROOT / "README.md").read_text().splitlines()
    assert cells in lines
    assert sizes.replace("M |", "M trained |", 1) in lines
