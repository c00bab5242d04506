"""What `adapter_config.json` says by patterns over the names of modules, as PEFT reads them.

PEFT's rules: a text is an expression for a whole name, a list holds ends of names, and a key of
`rank_pattern` or `alpha_pattern` is an expression for the end of a name, after a dot. The file may
come from anyone, so an engine of our own matches them, in bounded time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mora_jax._arrays.paths import list_near
from mora_jax._text.expressions import Expression, TooLongError

Modules = str | tuple[str, ...]

#: The most that one file may hold, and the most steps that its patterns may take together.
MOST_PATTERNS, _MOST_CHARACTERS, _MOST_STEPS = 4096, 2**20, 5_000_000
#: PEFT's word for every linear layer but the output head.
_ALL_LINEAR = "all-linear"


class ModulePatterns:
    """The patterns of one file, each parsed once."""

    def __init__(self):
        self._parsed: dict[str, Expression] = {}
        self._found: dict[tuple[str, str], str] = {}
        self._left = _MOST_STEPS

    def add(self, key: str, patterns: Iterable[str]) -> None:
        """Parses the patterns of one field.

        Raises:
          ValueError: if one is malformed or of a kind that is refused, or they are too many.
        """
        for pattern in patterns:
            try:
                self._parsed[pattern] = Expression(pattern)
                if key.endswith("_pattern"):
                    re.compile(rf"(.*\.)?({pattern})$")  # what PEFT makes of it
            except (ValueError, re.error) as error:
                raise ValueError(
                    f"{key} has the pattern {pattern!r:.200}, which cannot be used: {error}."
                ) from error
        check_count(self._parsed)

    def names(self, key: str, modules: Modules, module: str) -> bool:
        """Whether `target_modules` or `exclude_modules` names a module.

        Raises:
          ValueError: if that takes too many steps.
        """
        if not isinstance(modules, str):
            return ends_as(modules, module)
        if modules.lower() == _ALL_LINEAR:
            return not ends_as(("lm_head",), module)
        return bool(modules) and self._matches(key, modules, module, 1)

    def key_of(self, key: str, patterns: Collection[str], module: str) -> str | None:
        """The key of `rank_pattern` or `alpha_pattern` that is a module's: the first that matches.

        Raises:
          ValueError: if that takes too many steps.
        """
        if (key, module) not in self._found:
            ends = (p for p in patterns if self.ends(key, p, module))
            own = module if module in patterns else ""
            self._found[key, module] = next(ends, own)
        return self._found[key, module] or None

    def ends(self, key: str, pattern: str, module: str) -> bool:
        """Whether a key of `rank_pattern` or `alpha_pattern` matches the end of a module's name."""
        starts, dot = 1, module.find(".")
        while dot >= 0:
            starts |= 2 << dot
            dot = module.find(".", dot + 1)
        return self._matches(key, pattern, module, starts)

    def _matches(self, key: str, pattern: str, module: str, starts: int) -> bool:
        if (expression := self._parsed.get(pattern)) is None:
            expression = self._parsed[pattern] = Expression(pattern)
        try:
            found, steps = expression.steps(module, starts)
            self._left -= steps
            if self._left < 0:
                raise TooLongError
        except TooLongError as error:
            raise ValueError(
                f"{key} has the pattern {pattern!r:.200}, which takes too many steps for the name "
                f"{module!r:.200}: given up. Adapters name modules by short patterns; is the file "
                "from someone you trust?"
            ) from error
        return found


def ends_as(names: tuple[str, ...], module: str) -> bool:
    """Whether a list of `target_modules` names a module: by the end of its name."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def check_count(patterns: Collection[str]) -> None:
    """Raises ValueError if there are more patterns than a file may hold."""
    if len(patterns) > MOST_PATTERNS or sum(map(len, patterns)) > _MOST_CHARACTERS:
        raise ValueError(
            f"there are {len(patterns):,} patterns; a file may hold {MOST_PATTERNS:,}, of "
            f"{_MOST_CHARACTERS:,} characters in all."
        )


def check_used(
    patterns: ModulePatterns, key: str, values: Mapping[str, Any], modules: Collection[str]
) -> None:
    """Raises ValueError for keys that match none of the adapted modules.

    Args:
      patterns: of the file.
      key: "rank_pattern" or "alpha_pattern".
      values: what stands there.
      modules: names of the adapted modules.
    """
    used = {patterns.key_of(key, values, module) for module in modules}
    for pattern in values:
        if pattern in used or any(patterns.ends(key, pattern, module) for module in modules):
            continue
        raise ValueError(
            f"{key} has {pattern!r:.200}, which matches none of the {len(modules)} adapted "
            f"modules. Near it: {list_near(pattern, modules)}."
        )
