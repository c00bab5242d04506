"""Patterns over paths: regular expressions that match a whole path, or functions of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mora_jax._arrays.paths import readable
from mora_jax._text.expressions import Alternation, Expression

Pattern = str | Callable[[str], bool]


def pairs_of(value: Any) -> tuple[tuple[Pattern, Any], ...]:
    """A mapping by pattern, or pairs, as a tuple of pairs: hashable, in the same order."""
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple((pattern, item) for pattern, item in pairs)


def ends_in(names: Iterable[str]) -> str:
    """The pattern of the paths that end in one of these names.

    >>> ends_in(["q_proj", "mlp/up"])
    '(?:.*/)?(?:mlp/up|q_proj)'
    """
    return f"(?:.*/)?(?:{'|'.join(re.escape(name) for name in sorted(names))})"


def first_match(pairs: Any, path: str, default: Any) -> Any:
    """The value of the first pattern that matches a path, or the default."""
    return next((item for pattern, item in pairs_of(pairs) if matches(pattern, path)), default)


def matches(pattern: Pattern, path: str) -> bool:
    """Whether a pattern matches a whole path, as users write it.

    >>> matches(r".*_proj", "layers/q_proj"), matches("q_proj", "layers/q_proj")
    (True, False)
    >>> matches("mlp/~/linear_0", "mlp%2F~%2Flinear_0")
    True
    """
    if isinstance(pattern, str):
        # A pattern may also spell the slashes within names as paths do, by %2F.
        fullmatch = _compiled(pattern).fullmatch
        return any(fullmatch(name) is not None for name in {readable(path), path})
    return bool(pattern(readable(path)))


# `re` itself keeps 512; a config may have more, and asks all of them for every layer.
_compiled = functools.lru_cache(maxsize=2**14)(re.compile)


def alternatives(pattern: Pattern) -> Iterator[tuple[str, str]]:
    """(alternative, the pattern with this one alone), for what stands between the `|` of a pattern.

    Where one stands in a branch of another, that branch is alone too. Alternatives that are
    repeated, empty or only looked at are left out, and those of patterns with rarer syntax.

    >>> list(alternatives("head|.*/(query|value)"))
    [('query', '.*/(query)'), ('value', '.*/(value)'), ('head', 'head'),
     ('.*/(query|value)', '.*/(query|value)')]
    """
    if not isinstance(pattern, str):
        return
    try:
        found = Expression(pattern).alternations
    except ValueError:
        return
    for one in found:
        for part in filter(None, one.parts):
            yield part, _alone(pattern, one, part, found)


def _alone(pattern: str, one: Alternation, part: str, others: Iterable[Alternation]) -> str:
    """The pattern with a part in place of an alternation, and the branches around it alone."""
    text, start, end = part, one.start, one.end
    around = [of for of in others if of.start <= start and end <= of.end and of is not one]
    for outer in sorted(around, key=lambda of: of.end - of.start):
        begin = outer.start
        for branch in outer.parts:
            if begin <= start and end <= begin + len(branch):
                text = pattern[begin:start] + text + pattern[end : begin + len(branch)]
                break
            begin += len(branch) + 1
        start, end = outer.start, outer.end
    return pattern[:start] + text + pattern[end:]


def check_pattern(pattern: Pattern) -> None:
    """Raises TypeError or ValueError unless it is a regular expression or a callable."""
    if callable(pattern):
        return
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern must be a regular expression or a callable, got {pattern!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
