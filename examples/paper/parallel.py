"""Trains methods and seeds of several experiments side by side, on all GPUs of a machine.

    python3 examples/paper/parallel.py --minutes 9 "uuid_pairs train" \
        "mathematics train --data train.jsonl --test test.jsonl"

A method's search for its rate is a program of its own, and so is each seed at the rate it found.
Each goes on where it stopped: the same command is given again until it says that all is done. The
experiment that is named first has the first workers. They share what they compile; if one was
killed as it wrote that, delete the folder `compiled`. Several programs share a GPU, since each
leaves it idle while it evaluates, saves and decomposes, each with an equal part of its memory;
without a GPU they share the cores. Where NVIDIA's MPS runs (`nvidia-cuda-mps-control -d`) their
kernels can overlap.
"""

import argparse
import contextlib
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tqdm

from paper import study
from paper.report import EXPERIMENTS
from paper.results import Results

HERE = pathlib.Path(__file__).parent

#: Seconds: with less left no program begins, for it would end before its first step.
SHORTEST = 60.0
#: Seconds that a program may take to end after its time is over; then it is killed.
GRACE = 120.0
#: Of a GPU's memory, what its programs allocate; the rest is CUDA's, for each of them.
MEMORY = 0.9


class Job(NamedTuple):
    """A method's search for its rate, or one seed at that rate.

    Attributes:
      name: of the experiment's JSON, of the method, and of the seed.
      command: that trains it, but for the time it may take.
      folder: for its checkpoints and its log.
      turn: its experiment's, among those that are trained: the first has the first workers.
      done: whether its results are there, of whatever setting.
      then: what waits for its end: of a search that is still to be done, the seeds.
    """

    name: str
    command: list[str]
    folder: pathlib.Path
    turn: int = 0
    done: bool = False
    then: "tuple[Job, ...]" = ()


class Running(NamedTuple):
    """A job at work: its program, and where in its log what it says begins."""

    job: Job
    program: subprocess.Popen[str]
    log: pathlib.Path
    offset: int


def jobs_of(commands: Sequence[str], out: pathlib.Path) -> list[Job]:
    """What all experiments have to do: searches, each with its seeds behind it, and single seeds.

    A method whose results are all there is one job, and comes last: it loads model and text only to
    see that they are of this setting.

    Raises:
      ValueError: a command trains no experiment, says what is said for all, or two train the same
        method into JSON of one name.
    """
    jobs, known = list[Job](), set[str]()
    for turn, command in enumerate(commands):
        name, *arguments = shlex.split(command) or [""]
        if name not in EXPERIMENTS or arguments[:1] != ["train"]:
            choices = ", ".join(f"'{each} train'" for each in EXPERIMENTS)
            raise ValueError(f"{command!r} is none of {choices}, with flags behind.")
        if own := [word for word in arguments if word.startswith(("--minutes", "--out"))]:
            raise ValueError(f"{command!r} has {own[0]}, which is given for all, outside of it.")
        args = EXPERIMENTS[name].parse_args(arguments)
        for method in args.methods:
            if (title := f"{args.json.stem}, {method}") in known:
                raise ValueError(f"{title} is trained twice. Name each JSON otherwise.")
            known.add(title)
            jobs += _jobs_of_method(name, arguments, args, method, out, turn)
    return sorted(jobs, key=place)


def place(job: Job) -> tuple[bool, int, bool]:
    """Where a job stands among others: of an experiment first the searches that seeds wait for."""
    return job.done, job.turn, not job.then


def _jobs_of_method(
    name: str,
    arguments: list[str],
    args: argparse.Namespace,
    method: str,
    out: pathlib.Path,
    turn: int,
) -> list[Job]:
    """The search with its seeds behind it, or the seeds that are left, or one job that is done."""
    results, (first, *others) = Results.open(args.json), dict.fromkeys(args.seeds)

    def job_of(title: str, *seeds: int) -> Job:
        title = ", ".join(filter(None, [args.json.stem, method, title]))
        folder = out / title.replace(",", "").replace(" ", "_")
        # Of flags that are given twice the last counts.
        own = ["--methods", method, "--seeds", *map(str, seeds), "--out", str(folder)]
        line = [sys.executable, str(HERE / f"{name}.py"), *arguments, *own]
        try:
            done = results.next_of(method, 0.0, seeds) is None
        except ValueError:  # it diverged at every rate, say: its own program tells that
            done = False
        return Job(title, line, folder, turn, done)

    search = job_of("", first)
    seeds = [job_of(f"seed {seed}", first, seed) for seed in others]
    if not search.done:
        return [search._replace(then=(*seeds,))]
    return [job for job in seeds if not job.done] or [job_of("", first, *others)]


def gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls each GPU that may be used."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in named.split(",")]
        return [name for name in names if name and name != "-1"]
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
        # What grows as it needs to fails for want of what the others happen to hold just then.
        if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & {*found}:
            sharing = math.ceil(workers / len(devices))
            found["XLA_CLIENT_MEM_FRACTION"] = f"{MEMORY / sharing:.3f}"
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
        return f"not done: killed {GRACE:.0f} s after its time was over; see {running.log}"
    if code:
        return f"failed with exit code {code}; see {running.log}"
    with running.log.open(errors="replace") as log:
        log.seek(running.offset)
        # A bar that is still open ends no line.
        said = any(line.endswith(study.DONE) for line in log.read().splitlines())
        return "done" if said else "not done"


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """The signals that ask for an end, as they come: none interrupts what must be done whole."""
    asked: list[int] = []
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, lambda number, _: asked.append(number)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)


def end_all(running: Sequence[Running]) -> None:
    """Ends programs, which have ten seconds to do it themselves."""
    for one in running:
        one.program.terminate()
    last = time.monotonic() + 10
    for one in running:
        try:
            one.program.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.program.kill()
            one.program.wait()


def run_all(
    jobs: Sequence[Job], workers: int, devices: Sequence[str], deadline: float
) -> dict[str, str]:
    """Trains all, each when a worker is free, until the deadline: name of a job -> its end.

    Args:
      jobs: sorted by `place`. What waits for one of them takes its own when that is done, and
        fails with it.
      workers: programs that run at a time, on each of the devices.
      devices: names of GPUs; none: the programs share one machine's cores.
      deadline: by `time.monotonic`. Programs that have begun save what they have.
    """
    todo, running = [*jobs], dict[int, Running]()
    ends = {each.name: "not begun" for job in jobs for each in (job, *job.then)}
    total = min(workers * max(1, len(devices)), len(ends))
    with stopping() as asked, tqdm.tqdm(total=len(ends), desc="programs") as bar:
        try:
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
                        if end == "done":
                            todo = sorted([*todo, *one.job.then], key=place)
                        elif end.startswith("failed"):
                            failed = f"failed with {one.job.name}"
                            ends |= dict.fromkeys((job.name for job in one.job.then), failed)
                            bar.update(len(one.job.then))
                        bar.update()
                        tqdm.tqdm.write(f"{one.job.name}: {end}")
                if asked:
                    raise SystemExit(128 + asked[0])
                time.sleep(0.1)
        finally:
            end_all([*running.values()])
    return ends


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs and says what is left."""
    parser = argparse.ArgumentParser(
        description="Trains methods and seeds of several experiments side by side."
    )
    add = parser.add_argument
    add("commands", nargs="+", help='an experiment, train, and its flags: "pretrain train"')
    add("--workers", type=int, default=3,
        help="programs that share a GPU, or the cores; fewer if one lacks memory")  # fmt: skip
    add("--minutes", type=float, default=1e6, help="after these, save and end")
    add("--out", type=pathlib.Path, default=pathlib.Path("results", "parallel"),
        help="a directory for the runs that are under way, and logs")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}, wanted 1 or more")
    if 60 * args.minutes < 2 * SHORTEST:
        parser.error(f"--minutes is {args.minutes:g}, wanted 2 or more: programs that have just "
                     "begun load and compile")  # fmt: skip
    deadline = time.monotonic() + 60 * args.minutes
    out = args.out.absolute()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    ends = run_all(jobs_of(args.commands, out), args.workers, gpus(), deadline)
    if all(end == "done" for end in ends.values()):
        print(study.DONE)
    else:
        print("\n".join(f"{name}: {end}" for name, end in ends.items() if end != "done"))
    if any(end.startswith("not") for end in ends.values()):
        print("the same command goes on")
    if any(end.startswith("failed") for end in ends.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
