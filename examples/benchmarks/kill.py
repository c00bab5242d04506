"""Kills a training run again and again, and holds what it resumes to an uninterrupted one.

    python3 kill.py --kills 20                  # one process
    python3 kill.py --kills 6 --processes 2     # two processes of jax.distributed, killed together

Every other kill waits until Orbax is writing a checkpoint; the rest fall at a random step. ReMoRA
merges on the way, so that the base is a part of what is saved. In the end every loss of every step
has to be that of the uninterrupted run, bit for bit; exits with 1 where one is not.
"""

import argparse
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from train import log as train_log

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "train" / "train_llama.py"
FLAGS = (
    "--model", "tiny", "--rank", "2", "--targets", ".*(q|up|down)_proj", "--length", "32",
    "--remora-every", "7", "--save-every", "10", "--keep", "2",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    """The flags; `--help` prints them."""
    parser = argparse.ArgumentParser(
        description="Kills a training run again and again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of where the kills fall")
    parser.add_argument("flags", nargs="*", help="after --: further flags of train_llama.py")
    return parser.parse_args()


class Run:
    """The processes of one start of a run; what they print goes to a file.

    Args:
      out: the run's directory.
      args: the flags of this script.
    """

    def __init__(self, out: pathlib.Path, args: argparse.Namespace):
        self.out, self.log = out, out.with_suffix(".log")
        command = [sys.executable, SCRIPT, *FLAGS, *args.flags]
        command += ["--out", out, "--steps", args.steps]
        if args.processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            command += ["--coordinator", f"localhost:{port}", "--processes", args.processes]
        self._processes = []
        for number in range(args.processes):
            own = ["--process", number] if args.processes > 1 else []
            with self.log.with_suffix(f".{number}.log").open("w") as log:
                self._processes.append(
                    subprocess.Popen([*map(str, [*command, *own])], stdout=log, stderr=log)
                )

    def wait(self) -> None:
        """Waits for the end; RuntimeError with what was printed where it is no good one."""
        for number, process in enumerate(self._processes):
            if process.wait():
                raise RuntimeError(f"exit status {process.returncode}:\n{self.printed(number)}")

    def kill(self) -> bool:
        """SIGKILL; whether the run was still going."""
        going = all(process.poll() is None for process in self._processes)
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        return going

    def going(self) -> bool:
        """Whether every process still runs."""
        return all(process.poll() is None for process in self._processes)

    def printed(self, number: int = 0) -> str:
        """What a process has printed, without its progress bar."""
        text = self.log.with_suffix(f".{number}.log").read_text()
        return re.sub(r"[^\n]*\r", "", text)

    def rows(self) -> list[dict[str, str]]:
        """The metrics written so far."""
        path = self.out / "metrics.csv"
        return train_log.read(path) if path.exists() else []

    def is_saving(self) -> bool:
        """Whether a checkpoint is half written."""
        return any((self.out / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def main() -> int:
    """Runs, kills, resumes, compares; gives the exit status."""
    args = parse_args()
    draw = random.Random(args.seed)
    folder = pathlib.Path(tempfile.mkdtemp())
    whole = Run(folder / "whole", args)
    whole.wait()
    wanted = {row["step"]: row["loss"] for row in whole.rows()}
    assert len(wanted) == args.steps
    checked = during = 0
    for kill in range(args.kills + 1):
        started = time.perf_counter()
        run = Run(folder / "killed", args)
        before = int(rows[-1]["step"]) if (rows := run.rows()) else 0
        if kill == args.kills:
            run.wait()
            where = "ran to the end"
        else:
            # Kills spread over the steps, so that the last one still has some to come.
            target = draw.randint(1, (args.steps - 1) * (kill + 1) // (args.kills + 1))
            target = max(target, min(before, args.steps - 20))
            at_save = kill % 2 == 1
            while run.going():
                rows = run.rows()
                if rows and int(rows[-1]["step"]) > target and (run.is_saving() or not at_save):
                    break
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.01) if at_save else draw.uniform(0, 0.1))
            if not run.kill():
                print(run.printed())
                raise RuntimeError("the run ended before it could be killed: take more --steps")
            during += (torn := run.is_saving())
            where = f"killed after step {run.rows()[-1]['step']}"
            where += ", a checkpoint half written" if torn else ""
        messages = re.findall(r"resumed at step \d+|step \d+ was being saved|step \d+ is torn",
                              run.printed())  # fmt: skip
        for row in run.rows():
            if row["loss"] != wanted[row["step"]]:
                print(f"step {row['step']}: {row['loss']}, uninterrupted {wanted[row['step']]}")
                return 1
            checked += 1
        print(
            f"start {kill}: {'; '.join(messages) or 'from step 0'}; {where} "
            f"({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    steps = [int(row["step"]) for row in run.rows()]  # pyright: ignore[reportPossiblyUnboundVariable]
    assert steps == [*range(1, args.steps + 1)], "a step is missing, or stands twice"
    print(
        f"{args.kills} kills, {during} of them while a checkpoint was written: "
        f"all {args.steps} losses are those of the uninterrupted run, bit for bit"
    )
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
