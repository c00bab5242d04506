"""Programs side by side: which there are, what they share, how they end."""

import subprocess
import sys
import time

import pytest

import parallel


def job_of(folder, name, program):
    """A program in place of an experiment; it is told `--minutes` too."""
    return parallel.Job(name, [sys.executable, "-c", program], folder / name)


def test_each_method_of_each_experiment_is_a_program(tmp_path):
    found = parallel.jobs_of("pretrain train --json some/runs.json --methods LoRA signs", tmp_path)
    assert [job.name for job in found] == ["runs, LoRA", "runs, signs"]
    assert [job.folder.name for job in found] == ["runs_LoRA", "runs_signs"]
    assert found[1].command[2:] == [
        *("train", "--json", "some/runs.json", "--methods", "LoRA", "signs"),
        *("--methods", "signs", "--out", str(tmp_path / "runs_signs")),
    ]
    assert len(parallel.jobs_of("uuid_pairs train", tmp_path)) == 16
    with pytest.raises(ValueError, match=r"'uuids train' does not begin with an experiment"):
        parallel.jobs_of("uuids train", tmp_path)


def test_workers_have_a_gpu_and_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert parallel.gpus() == ["3", "5"]
    found = [parallel.environment(worker, 6, parallel.gpus()) for worker in range(3)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in found] == ["3", "5", "3"]
    assert {env["OPENBLAS_NUM_THREADS"] for env in found} == {"5"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listed = "GPU 0: some (UUID: a)\nGPU 1: some (UUID: b)\n"
    answer = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert parallel.gpus() == ["0", "1"]
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in parallel.environment(0, 64, [])
    assert parallel.environment(0, 64, [])["OPENBLAS_NUM_THREADS"] == "1"


def test_all_run_and_what_fails_is_told(tmp_path, capsys):
    jobs = [
        job_of(tmp_path, "a", "print('LoRA, rate 1, seed 0: cost 2'); print('all is done')"),
        job_of(tmp_path, "b", "raise ValueError('no such text')"),
        job_of(tmp_path, "c", "print('the time is over; the same command goes on')"),
        job_of(tmp_path, "d", "import sys; print(float(sys.argv[2]) < 1); print('all is done')"),
    ]
    ends = parallel.run_all(jobs, 2, [], time.monotonic() + 59)
    assert ends["a"] == ends["d"] == "done"
    assert ends["b"] == f"failed with exit code 1; see {tmp_path / 'b' / 'log.txt'}"
    assert ends["c"] == "not done"
    assert "no such text" in (tmp_path / "b" / "log.txt").read_text()
    assert (tmp_path / "d" / "log.txt").read_text().startswith("True")
    assert "a: LoRA, rate 1, seed 0: cost 2" in capsys.readouterr().out
    late = parallel.run_all(jobs[:1], 2, [], time.monotonic() - 1)
    assert late == {"a": "not begun"}
