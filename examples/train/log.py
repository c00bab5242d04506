"""The metrics of a training run: a row of CSV a step, a progress bar, tokens a second.

Reading a number off the device waits for it. So the metrics of a step are read when the next one
is under way, and a killed run has written every row up to its last checkpoint.
"""

import contextlib
import csv
import io
import os
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm

COLUMNS = ("step", "loss", "gradient_norm", "learning_rate", "tokens_per_second")


class TrainLog:
    """Writes the metrics of each step once; a context, which reads the last ones at its end.

    Args:
      path: of the CSV file; None on all processes but one, which then read and write nothing.
      start: the step that the run resumes at; rows beyond it are of a run that was killed.
      steps: where it ends.
      tokens: in a step, of all devices.
    """

    def __init__(self, path: pathlib.Path | None, start: int, steps: int, tokens: int):
        self.losses: list[float] = []
        self._path, self._start, self._steps, self._tokens = path, start, steps, tokens
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._seconds: list[float] = []

    def __enter__(self) -> "TrainLog":
        if self._path is not None:
            cut(self._path, self._start, COLUMNS)
            self._file = self._path.open("a", newline="")
            self._rows = csv.writer(self._file, lineterminator="\n")
        self._bar = tqdm.tqdm(
            total=self._steps, initial=self._start, unit="step", disable=self._path is None
        )
        self._last = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.flush()
        self._bar.close()
        if self._path is not None:
            self._file.close()

    def write(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step that is under way, and writes those of the one before."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the metrics of the last step, and writes them."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        self.losses.append(values["loss"])
        if self._path is None:
            return
        values |= {"step": step, "tokens_per_second": self._tokens / self._seconds[-1]}
        self._rows.writerow(values[name] for name in COLUMNS)
        self._file.flush()
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s"
        )
        self._bar.update()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what is done inside out of the steps' time."""
        self.flush()
        yield
        self._last = time.perf_counter()

    def say(self, message: str) -> None:
        """Prints a line above the bar, on one process."""
        if self._path is not None:
            tqdm.tqdm.write(message)

    def speed(self) -> dict[str, float]:
        """Tokens a second over the last half of the steps: their mean, and of a median step."""
        half = self._seconds[len(self._seconds) // 2 :]
        if not half:
            return {}
        return {
            "tokens_per_second": self._tokens * len(half) / sum(half),
            "tokens_per_second_median": self._tokens / statistics.median(half),
        }


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a CSV file of metrics; a last line that was cut off is left out."""
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return list(csv.DictReader(io.StringIO("".join(whole))))


def cut(path: pathlib.Path, step: int, columns: Sequence[str]) -> None:
    """Leaves only the rows up to a step, so that every step stands once; makes the file."""
    rows = read(path) if path.exists() else []
    scratch = path.with_suffix(".partial")
    with scratch.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(row.values() for row in rows if int(row["step"]) <= step)
    os.replace(scratch, path)
