"""Draws the figures here and writes README.md's tables and differences, from the JSON alone.

    python3 examples/paper/report.py

A JSON is named for its experiment, with more behind that where there are several. One that holds a
search for rates and no more has a table, and no figure.
"""

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import biomedicine
import mathematics
import pretrain
import uuid_pairs
from differences import matrix
from results import Results, note, table

EXPERIMENTS: dict[str, Any] = {
    "uuid_pairs": uuid_pairs, "mathematics": mathematics, "biomedicine": biomedicine,
    "pretrain": pretrain,
}  # fmt: skip
HERE = pathlib.Path(__file__).parent
README = HERE / "README.md"


def found() -> Iterator[tuple[str, Any, Results]]:
    """(name, experiment, results) of every JSON that an experiment wrote."""
    for path in sorted(HERE.glob("*.json")):
        for name, experiment in EXPERIMENTS.items():
            if path.stem == name or path.stem.startswith(f"{name}_"):
                yield path.stem, experiment, Results.open(path)


def with_tables(text: str) -> str:
    """A text with the tables of today, and the differences below them, between its marks.

    Raises:
      ValueError: results have no place in it.
    """
    for name, experiment, results in found():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{README} has no {begin!r} and {end!r} for the table of {name}.json.")
        before, rest = text.split(begin)
        _, after = rest.split(end)
        columns = experiment.columns(results)
        machines = sorted({f"{run['device']}, JAX {run['jax']}" for run in results.runs})
        told = f"*{', '.join([note(results), *machines])}.*"
        parts = filter(None, [table(results, columns), told, matrix(results, columns)])
        text = "\n\n".join([before + begin.rstrip(), *parts, end + after])
    return text


def main() -> None:
    """Draws and writes."""
    for name, experiment, results in found():
        if all(run["seed"] == results.setting["seed"] for run in results.runs):
            continue
        experiment.draw(results, HERE / f"{name}.png")
        print(f"{name}.png")
    README.write_text(with_tables(README.read_text()))
    print(README.name)


if __name__ == "__main__":
    main()
