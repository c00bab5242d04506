"""Draws the figures here and writes README.md's tables and differences, from the JSON alone.

    python3 examples/paper/report.py
    python3 examples/paper/report.py --differences mathematics "held-out loss"    # prints those

A JSON is named for its experiment, with more behind that where there are several. All have a table;
a figure is drawn where README.md shows one.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from paper import biomedicine, mathematics, merging, pretrain, uuid_pairs
from paper.differences import matrix
from paper.results import Results, note, table

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


def gains() -> list[merging.Gain]:
    """What merging gained, of all results that tell it."""
    return [g for _, by, results in found() if by is pretrain for g in merging.gains_of(results)]


def with_tables(text: str) -> str:
    """A text with the tables of today, and the differences below them, between its marks.

    Raises:
      ValueError: results have no place in it.
    """
    for name, experiment, results in found():
        columns = experiment.columns(results)
        machines = sorted({f"{run['device']}, JAX {run['jax']}" for run in results.runs})
        told = f"*{', '.join([note(results), *machines])}.*"
        parts = table(results, columns), told, folded(matrix(results, columns))
        text = between_marks(text, name, *parts)
    return between_marks(text, "merging", merging.table(gains()))


def between_marks(text: str, name: str, *parts: str) -> str:
    """A text with these parts, those that are not empty, between the marks of a name.

    Raises:
      ValueError: it has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"{README} has no {begin!r} and {end!r} for the table of {name}.")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return "\n\n".join([before + begin.rstrip(), *filter(None, parts), end + after])


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
    text = with_tables(README.read_text())
    draw = {name: functools.partial(by.draw, results) for name, by, results in found()}
    draw["merging"] = functools.partial(merging.draw, gains())
    for name in [name for name in draw if f"({name}.png)" in text]:
        draw[name](HERE / f"{name}.png")
        print(f"{name}.png")
    README.write_text(text)
    print(README.name)


if __name__ == "__main__":
    main(sys.argv[1:])
