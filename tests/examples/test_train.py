"""The training script: resume, kills, several processes, other numbers of devices. All tiny."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from helpers.files import ROOT
from helpers.train_runs import FLAGS, losses, train
from train.checkpoints import OtherRunError

EXAMPLES = ROOT / "examples"
CACHE = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture(scope="module")
def environment():
    """Of subprocesses."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of the uninterrupted run on one device."""
    out = tmp_path_factory.mktemp("whole")
    summary = train(out)
    found = losses(out / "metrics.csv")
    assert [*found] == [*map(str, range(1, 9))]
    assert summary["loss"] == found["8"]
    assert found["8"] < found["1"]
    return found


def test_resumes_at_the_last_whole_checkpoint_bit_for_bit(whole, tmp_path, capsys):
    train(tmp_path, "--stop-at", 5, "--keep", 3)
    saved = tmp_path / "checkpoints"
    assert {path.name for path in saved.iterdir()} >= {"2", "4", "5"}
    # What a kill leaves: a directory that Orbax has not renamed, one that is not whole, half a row.
    (saved / "6.orbax-checkpoint-tmp").mkdir()
    (saved / "5" / "_CHECKPOINT_METADATA").unlink()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,5.0,1.0,1.0,1.0\n7,5.")
    capsys.readouterr()
    train(tmp_path)
    printed = capsys.readouterr().out
    assert "step 5 is torn: not used" in printed
    assert "step 6 was being saved when the run ended: not used" in printed
    assert f"resumed at step 4 of {saved}" in printed
    assert losses(tmp_path / "metrics.csv") == whole
    assert sorted(path.name.partition("-")[0] for path in saved.iterdir()) == ["5.torn", "6", "8"]
    with pytest.raises(OtherRunError, match=r"rank: 2 there, 3 here\n  seed: 0 there, 1 here"):
        train(tmp_path, "--rank", 3, "--seed", 1)


def start(environment, out, devices, *flags):
    """The script as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", EXAMPLES / "train" / "train_llama.py",
         *map(str, (*FLAGS, "--out", out, *flags))],
        env={**environment, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(*processes):
    """What they printed, and the summary of the first."""
    printed = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return printed[0][0], json.loads(printed[0][0].splitlines()[-1])


@pytest.mark.slow
def test_two_processes_save_on_four_devices_for_two_and_for_one(whole, environment, tmp_path):
    def pair(out, *flags):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        several = ("--fsdp", 2, "--split-adapters", "--processes", 2)
        several += ("--coordinator", f"localhost:{port}")
        # The second may not read of what is compiled what the first is writing.
        compiled = shutil.copytree(environment[CACHE], tmp_path / f"compiled {port}")
        own = environment, {**environment, CACHE: str(compiled)}
        return finish(*(start(own[n], out, 2, *several, "--process", n, *flags) for n in (0, 1)))

    four, two, one = (tmp_path / name for name in ("four", "two", "one"))
    _, summary = pair(four, "--stop-at", 3)
    assert summary["processes"] == 2
    assert summary["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    printed, summary = pair(four, "--stop-at", 4)
    assert "resumed at step 3" in printed
    assert summary["steps"] == [3, 4]
    shutil.copytree(four, two)
    shutil.copytree(four, one)
    printed, summary = finish(start(environment, two, 2, "--tensor", 2))
    assert "resumed at step 4" in printed
    assert summary["mesh"] == {"data": 1, "fsdp": 1, "tensor": 2}
    train(one, "--accumulate", 2)
    for out in (two, one):
        found = losses(out / "metrics.csv")
        assert [*found] == [*whole]
        np.testing.assert_allclose([*found.values()], [*whole.values()], rtol=1e-5)


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(environment, tmp_path):
    script = EXAMPLES / "benchmarks" / "kill.py"
    flags = ("--kills", "2", "--steps", "60", "--", *FLAGS, "--remora-every", "100")
    done = subprocess.run(
        [sys.executable, script, *flags],
        env={**environment, CACHE: str(tmp_path)},  # whose entries a kill may tear
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "all 60 losses are those of the uninterrupted run, bit for bit" in done.stdout
    assert done.stdout.count("resumed at step") == 2
