"""Fields of a saved plan, each checked as it is read: an error names its key.

A plan may come from anyone's file, and what is accepted here is computed with much later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

#: Larger than any size or number of parameters, and no trouble for 64 bits.
_LARGEST = 2**48


def digest_of(fields: dict[str, Any]) -> str:
    """What tells whether a value of JSON was changed."""
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


class Fields:
    """An object of JSON, whose fields are taken one by one.

    Args:
      value: the object.
      where: its place in the plan, for errors.
    """

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'it'} is {value!r:.80}: wanted an object of fields")
        self.left, self.where = dict(value), where

    def take(self, key: str, check: Callable[[Any], T], default: Any = ...) -> T:
        """A field's value, checked; the default where the field is missing and there is one.

        Raises:
          ValueError: naming the field, if it is missing, or as `check` does.
        """
        where = self.name_of(key)
        if key not in self.left:
            if default is ...:
                raise ValueError(f"{where} is missing")
            return default
        value = self.left.pop(key)
        try:
            return check(value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} is {value!r:.80}: {error}") from error

    def name_of(self, key: str) -> str:
        """A field's place in the plan."""
        return f"{self.where}.{key}" if self.where else key

    def end(self) -> None:
        """Raises ValueError for fields that nobody has taken."""
        if self.left:
            raise ValueError(f"{self.name_of(min(self.left))} is not known")


def fields_of(value: Any) -> dict[str, Any]:
    """An object of fields, or ValueError."""
    if not isinstance(value, dict):
        raise ValueError("wanted an object of fields")
    return value


def natural(value: Any) -> int:
    """An integer from zero on, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise ValueError("wanted a number of 0 or more")
    return value


def naturals(value: Any) -> tuple[int, ...]:
    """Some of them, or ValueError."""
    if not isinstance(value, list):
        raise ValueError("wanted a list of numbers")
    return tuple(map(natural, value))


def text(value: Any) -> str:
    """A string, or ValueError."""
    if not isinstance(value, str):
        raise ValueError("wanted a text")
    return value


def flag(value: Any) -> bool:
    """True or False, or ValueError."""
    if not isinstance(value, bool):
        raise ValueError("wanted true or false")
    return value


def rate(value: Any) -> float:
    """A number, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("wanted a number")
    return float(value)


def axes_of(ndim: int, count: int | None = None) -> Callable[[Any], tuple[int, ...]]:
    """A check of a list of different axes of an array of this many, `count` of them."""

    def check(value: Any) -> tuple[int, ...]:
        axes = naturals(value)
        if len(set(axes)) < len(axes) or any(axis >= ndim for axis in axes):
            raise ValueError(f"wanted different axes below {ndim}")
        if count is not None and len(axes) != count:
            raise ValueError(f"wanted {count} axes")
        return axes

    return check
