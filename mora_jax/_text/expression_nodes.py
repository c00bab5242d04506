"""The parts of a parsed pattern, and how each of them matches: all ways through a text at once.

A set of places in a text is an integer, bit p for place p, so most steps are a few operations on
integers. Each node answers: beginning at one of these places, where can a match end?
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Iterator


class TooLongError(ValueError):
    """A match that takes more than the allowed number of steps."""


class Run:
    """One text, and what has been found out about it."""

    def __init__(self, text: str, steps: int):
        self.text, self.left = text, steps
        self.masks: dict[re.Pattern[str], int] = {}
        self.known: dict[tuple[int, int], int] = {}

    def ends(self, node: Node, starts: int) -> int:
        """Where matches end that begin at one of these places."""
        self.left -= 1
        if self.left < 0:
            raise TooLongError
        if (key := (id(node), starts)) not in self.known:
            self.known[key] = node.ends(self, starts) if starts else 0
        return self.known[key]

    def mask(self, pattern: re.Pattern[str]) -> int:
        """The places at which `re` matches the pattern of one character, or an anchor."""
        if pattern not in self.masks:
            places = range(len(self.text) + 1)
            self.masks[pattern] = sum(1 << p for p in places if pattern.match(self.text, p))
        return self.masks[pattern]


@dataclasses.dataclass(frozen=True, eq=False)
class Node(abc.ABC):
    """A part of a pattern. It matches texts of at least `shortest` characters."""

    shortest: int

    @abc.abstractmethod
    def ends(self, run: Run, starts: int) -> int:
        """Where matches end that begin at one of these places; at least one is given."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text(Node):
    """Characters that stand for themselves."""

    text: str

    def ends(self, run: Run, starts: int) -> int:
        size = len(self.text)
        return sum(1 << p + size for p in _places(starts) if run.text.startswith(self.text, p))


@dataclasses.dataclass(frozen=True, eq=False)
class Atom(Node):
    """One character of a class (`shortest` is 1), or an anchor (0)."""

    pattern: re.Pattern[str]

    def ends(self, run: Run, starts: int) -> int:
        return (starts & run.mask(self.pattern)) << self.shortest


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence(Node):
    """One part after another."""

    parts: tuple[Node, ...]

    def ends(self, run: Run, starts: int) -> int:
        for part in self.parts:
            starts = run.ends(part, starts)
        return starts


@dataclasses.dataclass(frozen=True, eq=False)
class Branches(Node):
    """One of several."""

    parts: tuple[Node, ...]

    def ends(self, run: Run, starts: int) -> int:
        ends = 0
        for part in self.parts:
            ends |= run.ends(part, starts)
        return ends


@dataclasses.dataclass(frozen=True, eq=False)
class Repeat(Node):
    """A part some number of times; `most` None is any number.

    A text of n characters lets a match move forward n times at most. What is repeated more than
    n times stays in place once more, and can do so any number of times: from n + 1 repeats on, the
    places that can be reached stay the same. So no count needs more turns.
    """

    part: Node
    least: int
    most: int | None

    def ends(self, run: Run, starts: int) -> int:
        turns = len(run.text) + 1
        for _ in range(min(self.least, turns)):
            if (after := self._once(run, starts)) == starts:
                break
            starts = after
        more = turns if self.most is None else min(self.most - self.least, turns)
        reached = new = starts
        for _ in range(more):
            # Who was there before has the more turns left.
            if not (new := self._once(run, new) & ~reached):
                break
            reached |= new
        return reached

    def _once(self, run: Run, starts: int) -> int:
        # One character more is a step so short that it need not be counted.
        part = self.part
        return part.ends(run, starts) if isinstance(part, Atom) else run.ends(part, starts)


@dataclasses.dataclass(frozen=True, eq=False)
class Look(Node):
    """What must, or must not, follow or precede a place."""

    part: Node
    behind: bool
    wanted: bool

    def ends(self, run: Run, starts: int) -> int:
        found = 0
        if self.behind:  # what `re` allows there has one length alone
            for p in range(len(run.text) + 1):
                found |= run.ends(self.part, 1 << p)
        else:
            found = sum(1 << p for p in _places(starts) if run.ends(self.part, 1 << p))
        return starts & (found if self.wanted else ~found)


def _places(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
