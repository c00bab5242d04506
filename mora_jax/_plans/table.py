"""Tables as text, of what plans and reports print."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from mora_jax._arrays.paths import readable
from mora_jax._plans.layer import AdapterSpec


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


def plan_table(
    layers: Sequence[tuple[str, AdapterSpec]],
    also_train: Sequence[tuple[str, tuple[int, ...]]],
    unadapted: Sequence[tuple[str, str]],
    base_parameters: int,
) -> str:
    """What `print(plan)` shows: a row for each kind of layer, totals, and what was left alone.

    The arguments are the fields of a `Plan`.
    """
    rows = [("layer", "kernel", "scheme", "size", "trained")]
    rows += _rows_of_layers(layers)
    rows += [
        (
            readable(path),
            " x ".join(map(str, shape)),
            "(trained in full)",
            "",
            f"{math.prod(shape):,}",
        )
        for path, shape in also_train
    ]
    adapters = sum(math.prod(spec.batch) for _, spec in layers)
    trained = sum(spec.parameters for _, spec in layers)
    trained += sum(math.prod(shape) for _, shape in also_train)
    total = (
        f"{_count(adapters, 'adapter')} in {_count(len(layers), 'kernel')}; "
        f"{_count(trained, 'trained parameter')}, "
        f"{trained / max(base_parameters, 1):.2%} of the base model's {base_parameters:,}"
    )
    return "\n".join([*table(rows), total, *_reasons(unadapted)])


def _count(number: int, what: str) -> str:
    """A number of things, as one writes it.

    >>> _count(1, "adapter"), _count(2_000, "adapter")
    ('1 adapter', '2,000 adapters')
    """
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _rows_of_layers(
    layers: Sequence[tuple[str, AdapterSpec]],
) -> Iterator[tuple[str, str, str, str, str]]:
    """Layers whose paths differ in numbers alone share a row."""
    alike: dict[tuple[str, str, str, str, str], list[str]] = {}
    for path, spec in layers:
        row = (
            re.sub(r"\d+", "*", readable(path)),
            " x ".join(map(str, spec.kernel_shape)),
            f"{spec.scheme}, DoRA" if spec.config.dora else str(spec.scheme),
            str(spec.size),
            f"{spec.parameters:,}",
        )
        alike.setdefault(row, []).append(path)
    for (pattern, *rest), paths in alike.items():
        kernel, scheme, size, trained = rest
        name = readable(paths[0]) or "(root)" if len(paths) == 1 else f"{pattern} ({len(paths)}x)"
        yield name, kernel, scheme, size, trained


def _reasons(left: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A line for each reason, with the paths that were left alone for it."""
    reasons: dict[str, dict[str, int]] = {}
    for path, why in left:
        paths = reasons.setdefault(why, {})
        pattern = re.sub(r"\d+", "*", readable(path)) or "(root)"
        paths[pattern] = paths.get(pattern, 0) + 1
    for why, paths in reasons.items():
        names = (f"{path} ({n}x)" if n > 1 else path for path, n in paths.items())
        yield f"left alone, {why}: {', '.join(names)}"
