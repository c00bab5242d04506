"""Tables as text, of what plans and reports print."""

from collections.abc import Sequence


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
