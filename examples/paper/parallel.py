"""Trains the methods of several experiments side by side, on all GPUs of a machine.

    python3 examples/paper/parallel.py --minutes 9 "uuid_pairs train" \
        "mathematics train --data train.jsonl --test test.jsonl"

Each method is a program of its own, that goes on where it stopped; the same command is given again
until it says that all is done. Several share a GPU, since each leaves it idle while it evaluates,
saves and decomposes. Without a GPU they share the cores.
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import tqdm

import study
from report import EXPERIMENTS

HERE = pathlib.Path(__file__).parent

#: Seconds: with less left no program begins, for it would end before its first step.
SHORTEST = 60.0
#: Seconds that a program may take to end after its time is over; then it is killed.
GRACE = 120.0


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


class Running(NamedTuple):
    """A job at work: its program, and where in its log what it says begins."""

    job: Job
    program: subprocess.Popen[str]
    log: pathlib.Path
    offset: int


def jobs_of(commands: Sequence[str], out: pathlib.Path) -> list[Job]:
    """The methods of all experiments, a job each: `"pretrain train --methods LoRA MoRA"` -> two.

    Raises:
      ValueError: a command trains no experiment, or two train the same method into JSON of one
        name.
    """
    found: dict[str, Job] = {}
    for command in commands:
        name, *arguments = shlex.split(command) or [""]
        if name not in EXPERIMENTS or arguments[:1] != ["train"]:
            known = ", ".join(f"'{known} train'" for known in EXPERIMENTS)
            raise ValueError(f"{command!r} is none of {known}, with flags behind.")
        args = EXPERIMENTS[name].parse_args(arguments)
        for method in args.methods:
            folder = out / f"{args.json.stem} {method}".replace(" ", "_")
            # Of flags that are given twice the last counts.
            own = ["--methods", method, "--out", str(folder)]
            line = [sys.executable, str(HERE / f"{name}.py"), *arguments, *own]
            job = Job(f"{args.json.stem}, {method}", line, folder)
            if job.name in found:
                raise ValueError(f"{job.name} is trained twice. Name each JSON otherwise.")
            found[job.name] = job
    return [*found.values()]


def gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls each GPU that may be used."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))]


def cores() -> int:
    """How many this program may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def environment(worker: int, workers: int, devices: Sequence[str]) -> dict[str, str]:
    """The variables of a worker's programs: its GPU, and its share of what all have."""
    # LAPACK's threads wait for each other by spinning: three programs with a thread for every core
    # decompose their matrices not three but thirty times as slowly as one.
    threads = max(1, cores() // workers)
    found = {"OPENBLAS_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    if devices:
        found["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]
        found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return found


def begin(job: Job, variables: dict[str, str], seconds: float) -> Running:
    """Starts a job's program, which saves and ends after so many seconds."""
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / "log.txt"
    with path.open("a") as log:
        offset = log.tell()
        program = subprocess.Popen(
            [*job.command, "--minutes", f"{seconds / 60:.3f}"],
            env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
        )  # fmt: skip
    return Running(job, program, path, offset)


def end_of(running: Running, deadline: float) -> str | None:
    """ "done", "not done", what went wrong, or None while the program runs."""
    code = running.program.poll()
    if code is None and time.monotonic() < deadline + GRACE:
        return None
    if code is None:
        running.program.kill()
        return f"failed: still running {GRACE:.0f} s after its time was over; see {running.log}"
    if code:
        return f"failed with exit code {code}; see {running.log}"
    with running.log.open(errors="replace") as log:
        log.seek(running.offset)
        return "done" if study.DONE in log.read().splitlines() else "not done"


@contextlib.contextmanager
def ended(running: dict[int, Running]) -> Iterator[None]:
    """Ends the programs that still run when it ends, however it does."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for one in running.values():
            one.program.terminate()
        for one in running.values():
            one.program.wait()
        signal.signal(signal.SIGTERM, before)


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
    todo, running = [*jobs], {}
    total = min(workers * max(1, len(devices)), len(jobs))
    ends = {job.name: "not begun" for job in jobs}
    with ended(running), tqdm.tqdm(total=len(jobs), desc="methods") as bar:
        while running or (todo and deadline - time.monotonic() >= SHORTEST):
            for worker in range(total):
                left = deadline - time.monotonic()
                if worker not in running and todo and left >= SHORTEST:
                    variables = environment(worker, total, devices)
                    running[worker] = begin(todo.pop(0), variables, left)
            for worker, one in [*running.items()]:
                if (end := end_of(one, deadline)) is not None:
                    ends[one.job.name] = end
                    one.program.wait()
                    del running[worker]
                    bar.update()
                    tqdm.tqdm.write(f"{one.job.name}: {end}")
            time.sleep(0.1)
    return ends


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs and says what is left."""
    parser = argparse.ArgumentParser(
        description="Trains the methods of several experiments side by side."
    )
    add = parser.add_argument
    add("commands", nargs="+", help='an experiment, train, and its flags: "pretrain train"')
    add("--workers", type=int, default=3, help="programs that share a GPU, or the cores")
    add("--minutes", type=float, default=1e6, help="after these, save and end")
    add("--out", type=pathlib.Path, default=pathlib.Path("results", "parallel"),
        help="a directory for the runs that are under way, and logs")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}, wanted 1 or more")
    if 60 * args.minutes < SHORTEST:
        parser.error(f"--minutes is {args.minutes:g}: no program begins with less than a minute")
    deadline = time.monotonic() + 60 * args.minutes
    ends = run_all(jobs_of(args.commands, args.out.absolute()), args.workers, gpus(), deadline)
    if all(end == "done" for end in ends.values()):
        print(study.DONE)
    else:
        left = [f"{name}: {end}" for name, end in ends.items() if end != "done"]
        print("\n".join([*left, "the same command goes on"]))
    if any(end.startswith("failed") for end in ends.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
