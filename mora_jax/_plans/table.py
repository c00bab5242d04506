"""Tables as text, of what plans and reports print."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mora_jax._plans.layer import AdapterSpec
    from mora_jax._plans.plan import Plan


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its head underlined.

    >>> print(*table([("layer", "size"), ("up", "4"), ("down", "16")]), sep="\\n")
    layer  size
    -----------
    up     4
    down   16
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def plan_table(plan: Plan) -> str:
    """What `print(plan)` shows: a row for each kind of layer, totals, and what was left alone."""
    rows = [("layer", "kernel", "scheme", "size", "trained")]
    rows += _rows_of_layers(plan.layers)
    rows += [
        (path, " x ".join(map(str, shape)), "(trained in full)", "", f"{math.prod(shape):,}")
        for path, shape in plan.also_train
    ]
    return "\n".join([*table(rows), _totals(plan), *_reasons(plan.unadapted)])


def _rows_of_layers(
    layers: Sequence[tuple[str, AdapterSpec]],
) -> Iterator[tuple[str, str, str, str, str]]:
    """Layers whose paths differ in numbers alone share a row."""
    alike: dict[tuple[str, str, str, str, str], list[str]] = {}
    for path, spec in layers:
        row = (
            re.sub(r"\d+", "*", path),
            " x ".join(map(str, spec.kernel_shape)),
            f"{spec.scheme}, DoRA" if spec.config.dora else str(spec.scheme),
            str(spec.size),
            f"{spec.parameters:,}",
        )
        alike.setdefault(row, []).append(path)
    for (pattern, *rest), paths in alike.items():
        kernel, scheme, size, trained = rest
        name = paths[0] or "(root)" if len(paths) == 1 else f"{pattern} ({len(paths)}x)"
        yield name, kernel, scheme, size, trained


def _totals(plan: Plan) -> str:
    adapters = sum(math.prod(spec.batch) for _, spec in plan.layers)
    share = plan.trained_parameters / max(plan.base_parameters, 1)
    return (
        f"{adapters:,} adapters in {len(plan):,} kernels; {plan.trained_parameters:,} trained "
        f"parameters, {share:.2%} of the base model's {plan.base_parameters:,}"
    )


def _reasons(left: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A line for each reason, with the paths that were left alone for it."""
    reasons: dict[str, dict[str, int]] = {}
    for path, why in left:
        paths = reasons.setdefault(why, {})
        pattern = re.sub(r"\d+", "*", path) or "(root)"
        paths[pattern] = paths.get(pattern, 0) + 1
    for why, paths in reasons.items():
        names = (f"{path} ({n}x)" if n > 1 else path for path, n in paths.items())
        yield f"left alone, {why}: {', '.join(names)}"
