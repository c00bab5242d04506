"""JSON that may come from anyone: what Python's reader lets through is refused here.

Python takes the last of two equal keys, knows numbers that JSON lacks (`NaN`, `Infinity`), turns
`1e999` into infinity, and raises RecursionError for deep nesting.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

#: In memory each takes some dozens of bytes, in a text two.
_MOST_VALUES = 2**20


def read_json_file(path: pathlib.Path, *, limit: int = 2**21) -> Any:
    """The value in a file of JSON, of which no more is read than may be in it.

    Raises:
      OSError: if the file cannot be read.
      ValueError: naming the file; as `read_json` does.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    try:
        return read_json(data.decode(), limit=limit)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or not such as is read: {error}") from error


def read_json(text: str, *, limit: int = 2**23) -> Any:
    """The value of a JSON text.

    Args:
      text: the text.
      limit: the most characters that it may have.

    Raises:
      ValueError: if the text is longer, has too many values, is not JSON, names a key twice in one
        object, holds a number that is not finite, or nests too deeply.

    >>> read_json('{"r": 8}')
    {'r': 8}
    """
    if len(text) > limit:
        raise ValueError(f"the text has more than {limit:,} characters.")
    if sum(map(text.count, "{[,")) > _MOST_VALUES:
        raise ValueError(f"the text has more than {_MOST_VALUES:,} values.")
    try:
        return json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError("the JSON text nests too deeply.") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.100} occurs twice in one object.")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON.")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text:.40} is too large.")
    return number
