"""Regular expressions of strangers: the meaning of `re`, in bounded time and memory.

`re` tries one way through a text after another: some patterns of thirty characters take it for
ever. Here all ways are followed at once. A pattern is parsed to a tree, and each node answers:
beginning at one of these places of the text, where can a match end? A set of places is an integer,
bit p for place p, so most steps are a few operations on integers.

Which of several matches `re` would prefer makes no difference to whether a whole text matches. So
both agree, except for syntax by which one match influences another (back references, atomic groups,
possessive repeats). That is refused. Single characters, classes and anchors are left to `re`.
"""

from __future__ import annotations

import dataclasses
import re

from mora_jax._text.expression_nodes import (
    Atom,
    Branches,
    Look,
    Node,
    Repeat,
    Run,
    Sequence,
    Text,
    TooLongError,
)

__all__ = ["Alternation", "Expression", "TooLongError", "UnsupportedError"]

#: More than any pattern of a real adapter: characters, groups within groups, steps for one text.
_MOST_CHARACTERS, _DEEPEST, _MOST_STEPS = 2**16, 40, 20_000

_ANCHORS = ("^", "$", r"\A", r"\Z", r"\b", r"\B")
_COUNT = re.compile(r"\{(\d*)(?:(,)(\d*))?\}", re.ASCII)
_CLASS = re.compile(r"\[(\^?\]?(?:[^\]\\]|\\.)*)\]", re.DOTALL)
_SET_OPERATION = re.compile(r"\[|--|&&|~~|\|\|")
_FLAGS = re.compile(r"\(\?([aimsu]*)(?:-([ims]+))?([:)])")
_GROUP = re.compile(r"\((?:\?(?:P<[A-Za-z_]\w*>|:|=|!|<=|<!))?", re.ASCII)
_LETTERS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "u": re.UNICODE}


class UnsupportedError(ValueError):
    """A pattern that `re` may understand, and this engine does not."""


class Expression:
    """A pattern, parsed once.

    Attributes:
      pattern: the pattern.
      alternations: what stands between its `|`, but for repeated parts and what is only looked at.

    Raises:
      ValueError: if `re` rejects the pattern, or it is too long or nested too deeply.
      UnsupportedError: for syntax that is refused here.

    >>> Expression(r"(.|.)*\\.[qv]_proj").matches("layers.0.q_proj")
    True
    """

    def __init__(self, pattern: str):
        self.pattern = pattern
        parser = _Parser(pattern)
        self._node = parser.whole()
        self.alternations = tuple(parser.alternations)
        node = self._node
        self._parts = node.parts if isinstance(node, Sequence) else (node,)
        self._fixed = all(isinstance(part, Text | Atom) for part in self._parts)
        last = self._parts[-1] if self._parts else None
        self._ending = last.text if isinstance(last, Text) else ""

    def matches(self, text: str) -> bool:
        """Whether the whole text matches, as `re.fullmatch` says.

        Raises:
          TooLongError: if it takes too many steps.
        """
        return self.steps(text, 1)[0]

    def steps(self, text: str, starts: int, most: int = _MOST_STEPS) -> tuple[bool, int]:
        """(whether the rest of the text matches from one of these places, steps it took).

        Args:
          text: the text.
          starts: bit p for place p.
          most: the most steps that it may take.
        """
        starts &= (1 << max(len(text) + 1 - self._node.shortest, 0)) - 1
        if not starts or not text.endswith(self._ending):
            return False, 0
        if self._fixed:
            return self._matches_fixed(text, starts), 0
        run = Run(text, most)
        found = bool(run.ends(self._node, starts) >> len(text) & 1)
        return found, most - run.left

    def _matches_fixed(self, text: str, starts: int) -> bool:
        """`steps` of a pattern without branches and repeats, for which there is one way."""
        place = len(text) - self._node.shortest
        if not starts >> place & 1:
            return False
        for part in self._parts:
            if isinstance(part, Text):
                if not text.startswith(part.text, place):
                    return False
            elif isinstance(part, Atom) and not part.pattern.match(text, place):
                return False
            place += part.shortest
        return True


@dataclasses.dataclass(frozen=True)
class Alternation:
    """Alternatives within a pattern, each of which a reader expects to match something.

    Attributes:
      start: where the first begins.
      end: where the last ends.
      parts: their texts.
    """

    start: int
    end: int
    parts: tuple[str, ...]


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str):
        self.pattern, self.at, self.depth = pattern, 0, 0
        self.flags = re.RegexFlag(0)
        self.alternations: list[Alternation] = []

    def whole(self) -> Node:
        if len(self.pattern) > _MOST_CHARACTERS:
            raise UnsupportedError(f"it has more than {_MOST_CHARACTERS:,} characters")
        if not self.pattern.isascii():
            raise UnsupportedError("it has characters beyond ASCII, which no module's name has")
        if (found := _FLAGS.match(self.pattern)) and found[3] == ")" and not found[2]:
            self._set_flags(found)
            self.at = found.end()
        node = self._alternatives()
        try:
            re.compile(self.pattern)  # all that is malformed
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{error}") from error
        if self.at < len(self.pattern):
            raise UnsupportedError(f"the character at {self.at} is not understood")
        return node

    def _alternatives(self) -> Node:
        start, starts, parts = self.at, [self.at], [self._sequence()]
        while self._take("|"):
            starts.append(self.at)
            parts.append(self._sequence())
        if len(parts) == 1:
            return parts[0]
        ends = [*(begin - 1 for begin in starts[1:]), self.at]
        texts = (self.pattern[a:b] for a, b in zip(starts, ends, strict=True))
        self.alternations.append(Alternation(start, self.at, tuple(texts)))
        return Branches(min(part.shortest for part in parts), tuple(parts))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            known = len(self.alternations)
            part, repeats = self._counted(self._item())
            if repeats:
                del self.alternations[known:]
            before = parts[-1] if parts else None
            if isinstance(before, Text) and isinstance(part, Text):
                parts[-1] = Text(before.shortest + part.shortest, before.text + part.text)
            else:
                parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return Sequence(sum(part.shortest for part in parts), tuple(parts))

    def _counted(self, part: Node) -> tuple[Node, bool]:
        """(a part with the count that follows it, whether it may occur twice)."""
        least, most = self._count()
        if (least, most) == (1, 1):
            return part, False
        if self._take("+"):
            raise UnsupportedError("it has a possessive repeat")
        self._take("?")
        return Repeat(part.shortest * least, part, least, most), most is None or most > 1

    def _count(self) -> tuple[int, int | None]:
        for mark, count in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(mark):
                return count
        if not self.pattern.startswith("{", self.at):
            return 1, 1
        found = _COUNT.match(self.pattern, self.at)
        if found is None or not (found[1] or found[2]) or len(found[0]) > 16:
            raise UnsupportedError("it has braces that hold no number of times")
        self.at = found.end()
        least = int(found[1] or 0)
        return least, (int(found[3]) if found[3] else None) if found[2] else least

    def _item(self) -> Node:
        character = self.pattern[self.at]
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == "\\":
            return self._escape()
        if character in "{*+?":
            raise UnsupportedError(f"nothing stands before {character!r} at {self.at}")
        self.at += 1
        if character in "^$":
            return self._atom(character, 0)
        return self._atom(".", 1) if character == "." else self._character(character)

    def _group(self) -> Node:
        flags, known = self.flags, len(self.alternations)
        self.depth += 1
        if self.depth > _DEEPEST:
            raise UnsupportedError(f"it has more than {_DEEPEST} groups within groups")
        found = _FLAGS.match(self.pattern, self.at)
        if found and found[3] == ":":
            self._set_flags(found)
        else:
            found = _GROUP.match(self.pattern, self.at)
        if found is None or self.pattern.startswith("?", found.end()):
            raise UnsupportedError(f"it has a group of an unusual kind at {self.at}")
        self.at = found.end()
        node = self._alternatives()
        if not self._take(")"):
            self.at = len(self.pattern)  # `re` says what is missing
        self.flags, self.depth = flags, self.depth - 1
        if (kind := found[0]) in ("(?=", "(?!", "(?<=", "(?<!"):
            del self.alternations[known:]
            return Look(0, node, "<" in kind, "=" in kind)
        return node

    def _set_flags(self, found: re.Match[str]) -> None:
        for letter in found[1]:
            self.flags |= _LETTERS[letter]
        if "u" in found[1]:
            self.flags &= ~(re.ASCII | re.UNICODE)
        for letter in found[2] or "":
            self.flags &= ~_LETTERS[letter]

    def _class(self) -> Node:
        found = _CLASS.match(self.pattern, self.at)
        if found is None:
            self.at = len(self.pattern)
            return Sequence(0, ())
        # Python warns of what a later version may read as operations on sets.
        if _SET_OPERATION.search(re.sub(r"\\.", "", found[1], flags=re.DOTALL)):
            raise UnsupportedError("it has a class with another, or an operation on sets, in it")
        if odd := [c for c in re.findall(r"\\(.)", found[1], re.DOTALL) if not _is_plain(c)]:
            raise UnsupportedError(rf"it has \{odd[0]} in a class")
        self.at = found.end()
        return self._atom(found[0], 1)

    def _escape(self) -> Node:
        escape = self.pattern[self.at : self.at + 2]
        self.at += 2
        if escape in _ANCHORS:
            return self._atom(escape, 0)
        if len(escape) == 2 and not _is_plain(escape[1]):
            raise UnsupportedError(f"it has {escape}")
        return self._atom(escape, 1) if escape[1:].isalpha() else self._character(escape[1:])

    def _character(self, character: str) -> Node:
        if self.flags & re.IGNORECASE:
            return self._atom(re.escape(character), 1)
        return Text(len(character), character)

    def _atom(self, text: str, size: int) -> Node:
        try:
            return Atom(size, re.compile(text, self.flags))
        except re.error as error:
            raise ValueError(f"{error}") from error

    def _take(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found


def _is_plain(character: str) -> bool:
    """Whether a character may follow a backslash: a class, a blank, or one that stands for itself.

    Numbers are back references or octal, other letters are codes of characters or unknown.
    """
    return character in "dDwWsSnrtfv" or not character.isalnum()
