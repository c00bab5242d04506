"""Programs side by side: which there are, what they share, how they end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from paper import parallel, study
from paper.results import Results

DONE = f"print({study.DONE!r})"
OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
LATER = "print('the time is over')"
BAR = "import sys; print('1/2', end='', file=sys.stderr, flush=True);" + DONE


def job_of(folder, name, program):
    """A program in place of an experiment; it is told `--minutes` too."""
    return parallel.Job(name, [sys.executable, "-c", program], folder / name)


def run_all(jobs, workers=2, devices=(), seconds=90.0):
    return parallel.run_all(jobs, workers, devices, time.monotonic() + seconds)


def said(folder, name):
    return (folder / name / "log.txt").read_text()


def test_each_search_is_a_program_and_then_each_seed(tmp_path):
    commands = [
        "pretrain train --json some/runs.json --methods LoRA signs --seeds 5 7 9",
        f"uuid_pairs train --json {tmp_path}/new.json",
    ]
    found = parallel.jobs_of(commands, tmp_path)
    assert [job.name for job in found[:3]] == ["runs, LoRA", "runs, signs", "new, all parameters"]
    assert [job.name for job in found[1].then] == ["runs, signs, seed 7", "runs, signs, seed 9"]
    for job, folder, seeds in (
        (found[1], "runs_signs", ["5"]),
        (found[1].then[1], "runs_signs_seed_9", ["5", "9"]),
    ):
        assert job.folder == tmp_path / folder
        assert job.command[2:] == [
            *("train", "--json", "some/runs.json", "--methods", "LoRA", "signs"),
            *("--seeds", "5", "7", "9"),
            *("--methods", "signs", "--seeds", *seeds, "--out", str(tmp_path / folder)),
        ]
    assert len(found) == 2 + 16
    assert [job.turn for job in found] == 2 * [0] + 16 * [1]
    assert found[-1].then[0].turn == 1
    for wrong in ("uuids train", "pretrain time", "pretrain", ""):
        with pytest.raises(ValueError, match=rf"'{wrong}' is none of 'uuid_pairs train', "):
            parallel.jobs_of([wrong], tmp_path)
    with pytest.raises(ValueError, match="has --out, which is given for all, outside of it"):
        parallel.jobs_of(["pretrain train --out x"], tmp_path)
    again = "pretrain train --json other/runs.json --methods signs"
    with pytest.raises(ValueError, match=r"runs, signs is trained twice\. Name each JSON other"):
        parallel.jobs_of([*commands, again], tmp_path)


def test_what_is_done_comes_last_and_seeds_wait_for_no_search_that_is(tmp_path):
    results = Results(tmp_path / "runs.json", {"seed": 0})
    for method in ("MoRA", "LoRA"):
        for rate, cost in ((1, 3.0), (2, 2.0), (4, 3.0)):
            results.add({"method": method, "rate": rate, "seed": 0, "cost": cost})
        results.add({"method": method, "rate": 2, "seed": 1, "cost": 3.0})
    results.add({"method": "MoRA", "rate": 2, "seed": 2, "cost": 3.0})
    results.add({"method": "signs", "rate": 1, "seed": 0, "cost": 3.0})
    for rate in range(20):
        results.add({"method": "shifts", "rate": 2.0**-rate, "seed": 0, "cost": None})
    methods = "MoRA LoRA signs shifts --seeds 0 1 2 2"
    command = f"pretrain train --json {results.path} --methods {methods}"
    found = parallel.jobs_of([command], tmp_path)
    assert [(job.name, [seed.name for seed in job.then]) for job in found] == [
        ("runs, signs", ["runs, signs, seed 1", "runs, signs, seed 2"]),
        ("runs, shifts", ["runs, shifts, seed 1", "runs, shifts, seed 2"]),
        ("runs, LoRA, seed 2", []),
        ("runs, MoRA", []),
    ]
    assert found[-1].command[-6:-2] == ["--seeds", "0", "1", "2"]


def test_what_waits_for_a_program_begins_when_it_is_done(tmp_path):
    job = lambda name, program, *then: job_of(tmp_path, name, program)._replace(then=then)
    tells = lambda name: f"open({str(tmp_path / 'order')!r}, 'a').write({name!r}); {DONE}"
    jobs = [
        job("a", tells("a"), job("1", tells("1"))),
        job("b", LATER, job("2", DONE)),
        job("c", "raise SystemExit(3)", job("3", DONE)),
        job("d", tells("d"), job("4", tells("4"))),
        job("f", tells("f"), job("5", tells("5")))._replace(turn=1),
        job("e", tells("e"))._replace(done=True),
    ]
    assert run_all(jobs, workers=1) == {
        "a": "done", "1": "done", "b": "not done", "2": "not begun", "d": "done", "4": "done",
        "c": f"failed with exit code 3; see {tmp_path / 'c' / 'log.txt'}", "e": "done",
        "3": "failed with c", "f": "done", "5": "done",
    }  # fmt: skip
    assert (tmp_path / "order").read_text() == "ad14f5e"


def test_workers_have_a_gpu_and_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: 32)
    fraction = "XLA_CLIENT_MEM_FRACTION"
    for name in ("JAX_PLATFORMS", "OPENBLAS_NUM_THREADS", fraction, OLD_FRACTION):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert parallel.gpus() == ["3", "5"]
    found = [parallel.environment(worker, 6, parallel.gpus()) for worker in range(3)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in found] == ["3", "5", "3"]
    assert {env[fraction] for env in found} == {"0.300"}
    assert {env["OPENBLAS_NUM_THREADS"] for env in found} == {"5"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert parallel.gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listed = "GPU 0: some (UUID: a)\n  MIG 1g.5gb (UUID: c)\nGPU 1: some (UUID: b)\n"
    answer = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert parallel.gpus() == ["0", "1"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert parallel.gpus() == []
    alone = parallel.environment(0, 64, [])
    assert alone["OPENBLAS_NUM_THREADS"] == "1"
    assert fraction not in alone
    monkeypatch.setenv(OLD_FRACTION, ".2")  # jaxlib refuses both
    assert fraction not in parallel.environment(0, 6, ["3"])
    monkeypatch.delenv(OLD_FRACTION)
    assert parallel.environment(0, 7, ["3", "5"])[fraction] == "0.225"
    monkeypatch.setenv(fraction, ".1")
    assert parallel.environment(0, 6, ["3"])[fraction] == ".1"
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    assert parallel.environment(0, 64, [])["OPENBLAS_NUM_THREADS"] == "7"


def test_all_run_side_by_side_and_what_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meets = (
        "import os, pathlib, time; own, other = map(pathlib.Path, {files!r}); own.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'])\n" + DONE
    )
    files = [str(tmp_path / name) for name in ("one", "two")]
    jobs = [
        job_of(tmp_path, "a", meets.format(files=files)),
        job_of(tmp_path, "b", meets.format(files=files[::-1])),
        job_of(tmp_path, "c", "raise ValueError('no such text')"),
        job_of(tmp_path, "d", LATER),
        job_of(tmp_path, "e", f"import sys; print(1 < float(sys.argv[2]) < 1.5); {DONE}"),
    ]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "log.txt").write_text(f"{study.DONE}\n")  # of an earlier program
    assert run_all(jobs, workers=1, devices=["0", "1"]) == {
        "a": "done", "b": "done", "d": "not done", "e": "done",
        "c": f"failed with exit code 1; see {tmp_path / 'c' / 'log.txt'}",
    }  # fmt: skip
    assert (said(tmp_path, "a")[0], said(tmp_path, "b")[0]) == ("0", "1")
    assert "no such text" in said(tmp_path, "c")
    assert said(tmp_path, "e").startswith("True")


def test_none_begins_too_late_and_what_does_not_end_is_killed(tmp_path, monkeypatch):
    assert run_all([job_of(tmp_path, "a", DONE)], seconds=59) == {"a": "not begun"}
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(parallel, "GRACE", -74.0)
    ends = run_all([job_of(tmp_path, "b", "import time; time.sleep(600)")], seconds=75)
    assert ends["b"].startswith("not done: killed")


def test_programs_end_with_it(tmp_path):
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    jobs = [job_of(tmp_path, name, program) for name in ("a", "b", "c")]
    seen = []

    def interrupt(number, frame):
        logs = [tmp_path / name / "log.txt" for name in "ab"]
        found = [log.read_text() if log.exists() else "" for log in logs]
        if all(text.endswith("\n") for text in found):
            seen.extend(map(int, found))
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        with pytest.raises(SystemExit) as ended:
            run_all(jobs)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended.value.code == 128 + signal.SIGTERM
    for number in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    assert not (tmp_path / "c").exists()


def test_what_is_left_is_said(tmp_path, monkeypatch, capsys):
    programs = iter([BAR, LATER, "raise SystemExit(3)"])
    monkeypatch.setattr(parallel, "jobs_of", lambda *_: [job_of(tmp_path, "a", next(programs))])
    arguments = ["pretrain train", "--minutes", "2", "--out", str(tmp_path)]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    parallel.main(arguments)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")
    assert capsys.readouterr().out.endswith(f"{study.DONE}\n")
    parallel.main(arguments)
    assert capsys.readouterr().out.endswith("a: not done\nthe same command goes on\n")
    with pytest.raises(SystemExit) as failed:
        parallel.main(arguments)
    assert failed.value.code == 1
    for wrong in (["--workers", "0"], ["--minutes", "1"]):
        with pytest.raises(SystemExit):
            parallel.main(["pretrain train", *wrong])
        assert f"{wrong[0]} is {wrong[1]}" in capsys.readouterr().err


def test_two_programs_do_not_train_in_one_directory(tmp_path):
    with (
        study.alone(tmp_path / "out"),
        pytest.raises(
            ValueError, match=r"another program trains in .*: give this one another --out"
        ),
        study.alone(tmp_path / "out"),
    ):
        pass
    with study.alone(tmp_path / "out"):
        pass
