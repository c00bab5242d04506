"""Trains the methods of several experiments side by side, on all GPUs of a machine.

    python3 examples/paper/parallel.py --minutes 9 "uuid_pairs train" \
        "mathematics train --data train.jsonl --test test.jsonl"

Each method is a program of its own, that goes on where it stopped; the same command is given again
until it says that all is done. Several share a GPU, since each leaves it idle while it evaluates,
saves and decomposes. Without a GPU they share the cores.
"""

import argparse
import concurrent.futures
import importlib
import os
import pathlib
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import tqdm

HERE = pathlib.Path(__file__).parent


class Job(NamedTuple):
    """One method of one experiment.

    Attributes:
      name: of the experiment's JSON and of the method.
      command: that trains it, but for the time it may take.
      folder: for its checkpoints and its log.
    """

    name: str
    command: list[str]
    folder: pathlib.Path


def jobs_of(command: str, out: pathlib.Path) -> list[Job]:
    """The methods of an experiment, a job each: `"pretrain train --methods LoRA MoRA"` -> two."""
    name, *arguments = shlex.split(command)
    if not (HERE / f"{name}.py").is_file():
        raise ValueError(f"{command!r} does not begin with an experiment: {HERE}/{name}.py is none")
    args = importlib.import_module(name).parse_args(arguments)
    found = []
    for method in args.methods:
        folder = out / f"{args.json.stem} {method}".replace(" ", "_")
        own = ["--methods", method, "--out", str(folder)]
        line = [sys.executable, str(HERE / f"{name}.py"), *arguments, *own]
        found.append(Job(f"{args.json.stem}, {method}", line, folder))
    return found


def gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls each GPU that may be used."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number in range(len(listed.stdout.splitlines()))]


def environment(worker: int, workers: int, devices: Sequence[str]) -> dict[str, str]:
    """The variables of a worker's programs: its GPU, and its share of what all have."""
    # LAPACK's threads wait for each other by spinning. Two programs that each have a thread for
    # every core decompose a matrix not twice but fifty times as slowly.
    threads = max(1, (os.cpu_count() or 1) // workers)
    found = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if devices:
        found["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]
        found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return found


def run(job: Job, variables: dict[str, str], seconds: float) -> str:
    """Trains for so long at most: "done", "not done", or what went wrong."""
    job.folder.mkdir(parents=True, exist_ok=True)
    path, last = job.folder / "log.txt", ""
    line = [*job.command, "--minutes", f"{seconds / 60:.3f}"]
    with (
        path.open("a") as log,
        subprocess.Popen(
            line, env=variables, stdout=subprocess.PIPE, stderr=log, text=True
        ) as program,
    ):
        assert program.stdout is not None
        for said in program.stdout:
            log.write(said)
            if ": cost" in said:
                tqdm.tqdm.write(f"{job.name.partition(',')[0]}: {said}", end="")
            last = said if said.startswith(("all is done", "the time is over")) else last
    if program.returncode:
        return f"failed with exit code {program.returncode}; see {path}"
    return "done" if last.startswith("all is done") else "not done"


def run_all(
    jobs: Sequence[Job], workers: int, devices: Sequence[str], deadline: float
) -> dict[str, str]:
    """Trains all, each when a worker is free, until the deadline: name of a job -> its end.

    Args:
      jobs: in the order they begin in; those that take longest are best first.
      workers: programs that run at a time, on each of the devices.
      devices: names of GPUs; none: the programs share one machine's cores.
      deadline: by `time.monotonic`. Programs that have begun save what they have.
    """
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    total = min(workers * max(1, len(devices)), len(jobs))
    ends, lock = {job.name: "not begun" for job in jobs}, threading.Lock()
    bar = tqdm.tqdm(total=len(jobs), desc="methods")

    def work(worker: int) -> None:
        variables = environment(worker, total, devices)
        while (left := deadline - time.monotonic()) > 0:
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            end = run(job, variables, left)
            with lock:
                ends[job.name] = end
                bar.update()

    with concurrent.futures.ThreadPoolExecutor(total) as pool, bar:
        list(pool.map(work, range(total)))
    return ends


def main() -> None:
    """Runs and says what is left."""
    parser = argparse.ArgumentParser(
        description="Trains the methods of several experiments side by side."
    )
    add = parser.add_argument
    add("commands", nargs="+", help='an experiment and its flags each: "pretrain train"')
    add("--workers", type=int, default=3, help="programs that share a GPU, or the cores")
    add("--minutes", type=float, default=1e6, help="after these, save and end")
    add("--out", type=pathlib.Path, default=pathlib.Path("results", "parallel"),
        help="a directory for the runs that are under way, and logs")  # fmt: skip
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    jobs = [job for command in args.commands for job in jobs_of(command, args.out.absolute())]
    # Programs compile the same evaluations; who comes second reads them.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out.absolute() / "compiled"))
    ends = run_all(jobs, args.workers, gpus(), deadline)
    for name, end in ends.items():
        if end != "done":
            print(f"{name}: {end}")
    if all(end == "done" for end in ends.values()):
        print("all is done")
    if any(end.startswith("failed") for end in ends.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
