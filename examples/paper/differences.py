"""How far apart methods lie within a seed: what the text of README.md tells of two methods.

A seed's order and start move all methods alike, often by more than lies between them. So one is
subtracted from the other seed by seed, and the standard error is that of these differences.
"""

import collections
from collections.abc import Mapping

import numpy as np

from paper.results import Columns, Results


def paired(numbers: Mapping[int, float], others: Mapping[int, float]) -> tuple[float, float]:
    """Mean of what two methods differ by, the first minus the second, and its standard error.

    >>> paired({1: 5.0, 2: 7.0}, {2: 3.0, 1: 3.0})
    (3.0, 1.0)

    Args:
      numbers: seed -> what the first reached.
      others: the same of the second.

    Raises:
      ValueError: their seeds are not the same, or fewer than two.
    """
    if numbers.keys() != others.keys() or len(numbers) < 2:
        raise ValueError(
            "A standard error is that of two seeds or more, the same of both: "
            f"got {sorted(numbers)} and {sorted(others)}."
        )
    found = [number - others[seed] for seed, number in numbers.items()]
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(len(found)))


def matrix(results: Results, columns: Columns) -> str:
    """A caption, and in Markdown the first column's differences in the order of the table.

    Of the commonest set of seeds, without the one that chose the rates. Methods that lack one of
    them are named below. Where there are not two methods and two seeds, nothing is given.
    """
    head, number = next(iter(columns.items()))
    name, _, form = head.partition("|")
    numbers = {
        method: {
            run["seed"]: found
            for run in results.best(method)
            if run["seed"] != results.setting["seed"] and (found := number(run)) is not None
        }
        for method in results.methods
    }
    counts = collections.Counter(frozenset(found) for found in numbers.values() if len(found) > 1)
    seeds = max(counts, key=lambda seeds: counts[seeds], default=frozenset())
    whole = [method for method in numbers if numbers[method].keys() >= seeds]
    if len(whole) < 2 or not seeds:
        return ""
    told = {method: {seed: numbers[method][seed] for seed in seeds} for method in whole}
    caption = f"Within a seed, {name}: row minus column, standard error of {len(seeds)} seeds"
    lines = [caption, ""]
    lines += ["| row minus column | " + " | ".join(whole[:-1]) + " |", "| --- " * len(whole) + "|"]
    for place, method in enumerate(whole[1:], 1):  # above the diagonal nothing new would stand
        pairs = [paired(told[method], told[other]) for other in whole[:place]]
        cells = [f"{mean:+z{form}} ({error:{form}})" for mean, error in pairs]
        cells += [""] * (len(whole) - 1 - place)
        lines.append(f"| {' | '.join([method, *cells])} |")
    if lacking := [method for method in numbers if method not in whole]:
        lines += ["", f"Without all of these seeds, and left out: {', '.join(lacking)}."]
    return "\n".join(lines)
