"""Cycles: the schemes that ReMoRA walks through, one after each merge.

Merging the same grouping again and again adds nothing to the rank of what was learned: the sum
stays in the span of one compression. A cycle gives every merge a new grouping. Cycles with a name
are the schemes' own (`Scheme.successor`).

Shape letters: I input features, O output features, R the square size.
"""

from __future__ import annotations

from mora_jax._schemes.base import Scheme
from mora_jax._schemes.registry import check_registered, named_cycles, owners_of

Cycle = str | tuple[Scheme, ...] | None


def check_cycle(cycle: Cycle) -> None:
    """Raises ValueError unless it is a named cycle, a tuple of distinct schemes or None."""
    if cycle is None or cycle == "auto":
        return
    if isinstance(cycle, str):
        if cycle not in (names := named_cycles()):
            raise ValueError(f"Unknown cycle {cycle!r}; there are: auto, {', '.join(names)}.")
        return
    is_tuple = isinstance(cycle, tuple) and len(cycle) > 0
    if not is_tuple or not all(isinstance(scheme, Scheme) for scheme in cycle):
        raise ValueError(f"cycle must be a name, None or a tuple of schemes, got {cycle!r}.")
    for scheme in cycle:
        check_registered(scheme)
    if len(set(cycle)) < len(cycle):
        raise ValueError(f"cycle names a scheme twice: {cycle!r}.")


def next_scheme(
    scheme: Scheme, cycle: Cycle, in_features: int, out_features: int, size: int
) -> Scheme:
    """The scheme that follows `scheme` after a merge.

    - a name: what the scheme says, see `Sharing.successor`; `"auto"` leaves the choice to it.
    - a tuple: its elements in order.
    - None: the scheme itself.

    >>> from mora_jax import Sharing
    >>> next_scheme(Sharing(), "signs", in_features=64, out_features=32, size=16)
    Sharing(signs=1)

    Raises:
      ValueError: if `scheme` is not part of the cycle.
    """
    if cycle is None:
        return scheme
    if isinstance(cycle, str):
        if cycle not in ("auto", *scheme.cycles):
            raise ValueError(
                f"cycle {cycle!r} needs {' or '.join(owners_of(cycle))}, got {scheme}."
            )
        return scheme.successor(cycle, in_features, out_features, size)
    if scheme not in cycle:
        raise ValueError(f"{scheme} is no element of the cycle {cycle}.")
    return cycle[(cycle.index(scheme) + 1) % len(cycle)]
