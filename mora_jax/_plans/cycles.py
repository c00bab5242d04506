"""Cycles: the schemes that ReMoRA walks through, one after each merge.

Merging the same grouping again and again adds nothing to the rank of what was learned: the sum
stays in the span of one compression. A cycle gives every merge a new grouping.

Shape letters: I input features, O output features, R the square size.
"""

from __future__ import annotations

import dataclasses

from mora_jax._schemes.base import Scheme, Sharing, scheme_from_mora_type

Cycle = str | tuple[Scheme, ...] | None

#: The authors' cycle.
GROUPINGS = tuple(scheme_from_mora_type(mora_type) for mora_type in (1, 2, 3, 4))

#: Cycles with a name. Only `Sharing` has groupings to change.
NAMED_CYCLES = ("groupings", "shifts", "signs")


def check_cycle(cycle: Cycle) -> None:
    """Raises ValueError unless it is a named cycle, a tuple of distinct schemes or None."""
    if cycle is None or cycle in (*NAMED_CYCLES, "auto"):
        return
    if isinstance(cycle, str):
        raise ValueError(f"Unknown cycle {cycle!r}; there are: auto, {', '.join(NAMED_CYCLES)}.")
    is_tuple = isinstance(cycle, tuple) and len(cycle) > 0
    if not is_tuple or not all(isinstance(scheme, Scheme) for scheme in cycle):
        raise ValueError(f"cycle must be a name, None or a tuple of schemes, got {cycle!r}.")
    if len(set(cycle)) < len(cycle):
        raise ValueError(f"cycle names a scheme twice: {cycle!r}.")


def next_scheme(
    scheme: Scheme, cycle: Cycle, in_features: int, out_features: int, size: int
) -> Scheme:
    """The scheme that follows `scheme` after a merge.

    - `"groupings"`: the authors' types 1, 2, 3, 4. The summed rank stays at or below 2 R.
    - `"shifts"`: `shift` 0, 1, ..., R - 1. About R - 1 a merge, short of full rank by the
      directions that all shifts share.
    - `"signs"`: `signs` 0, 1, ..., n - 1 for n blocks. R a merge, up to full rank.
    - a tuple: its elements in order.
    - None: the scheme itself.
    - `"auto"`: `"signs"` for stride sharing without a shift, None for the rest.

    >>> next_scheme(Sharing(), "signs", in_features=64, out_features=32, size=16)
    Sharing(signs=1)

    Raises:
      ValueError: where `scheme` is no element of the cycle.
    """
    stride = None
    if isinstance(scheme, Sharing) and scheme.input == scheme.output == "stride":
        stride = scheme
    if cycle == "auto":
        cycle = "signs" if stride is not None and not stride.shift else None
    if cycle is None:
        return scheme
    if cycle in ("shifts", "signs"):
        if stride is None:
            raise ValueError(f"cycle {cycle!r} needs Sharing('stride', 'stride'), got {scheme}.")
        if cycle == "shifts":
            return dataclasses.replace(stride, shift=(stride.shift + 1) % size)
        blocks = -(-max(in_features, out_features) // size)
        return dataclasses.replace(stride, signs=(stride.signs + 1) % blocks)
    members = GROUPINGS if isinstance(cycle, str) else cycle
    if scheme not in members:
        raise ValueError(f"{scheme} is no element of the cycle {members}.")
    return members[(members.index(scheme) + 1) % len(members)]
