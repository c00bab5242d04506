"""Draws the figures here and writes README.md's tables and differences, from the JSON alone.

    python3 examples/paper/report.py
    python3 examples/paper/report.py --differences mathematics "held-out loss"    # prints those

A JSON is named for its experiment, with more behind that where there are several. One that holds a
search for rates and no more has a table, and no figure.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
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
        parts = filter(None, [table(results, columns), told, folded(matrix(results, columns))])
        text = "\n\n".join([before + begin.rstrip(), *parts, end + after])
    return text


def folded(text: str) -> str:
    """A text below its first line, which unfolds it."""
    caption, _, rest = text.partition("\n")
    return text and f"<details><summary>{caption}</summary>\n{rest}\n\n</details>"


def differences(name: str, column: str) -> str:
    """Those of one column, of the results of this name.

    Raises:
      ValueError: there are no such results, or they have no such column.
    """
    known = {stem: (experiment, results) for stem, experiment, results in found()}
    if name not in known:
        raise ValueError(f"There is no {name}.json here, only {', '.join(known)}.")
    experiment, results = known[name]
    columns = {head.partition("|")[0]: {head: n} for head, n in experiment.columns(results).items()}
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}, only {', '.join(columns)}.")
    return matrix(results, columns[column])


def main(arguments: Sequence[str] = ()) -> None:
    """Draws and writes, or prints differences."""
    parser = argparse.ArgumentParser(description="Draws figures and writes tables.")
    parser.add_argument("--differences", nargs=2, metavar=("NAME", "COLUMN"))
    args = parser.parse_args(arguments)
    if args.differences:
        print(differences(*args.differences))
        return
    for name, experiment, results in found():
        if all(run["seed"] == results.setting["seed"] for run in results.runs):
            continue
        experiment.draw(results, HERE / f"{name}.png")
        print(f"{name}.png")
    README.write_text(with_tables(README.read_text()))
    print(README.name)


if __name__ == "__main__":
    main(sys.argv[1:])
