"""Schemes: how a layer's features are compressed to the square matrix and decompressed from it.

A scheme is plain data, frozen, hashable and comparable, so that it can be a static argument of a
jitted function and a line of JSON. What it means is written once, in `_operators.py`.

Shape letters: I input features, O output features, R the square size (the paper's r_hat).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

#: The leaf of DoRA among an adapter's leaves.
MAGNITUDE = "magnitude"

Grouping = Literal["stride", "contiguous"]
_GROUPINGS = ("stride", "contiguous")


@dataclasses.dataclass(frozen=True, repr=False)
class Scheme:
    """What all schemes have in common; use one of its subclasses."""

    kind: ClassVar[str] = ""

    def __repr__(self) -> str:
        """The call that makes the scheme, defaults left out."""
        fields = dataclasses.fields(self)
        given = [
            (f.name, getattr(self, f.name)) for f in fields if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description, read back by `scheme_from_dict`.

        >>> Rotation(cycle=True).to_dict()
        {'kind': 'rotation', 'cycle': True}
        """
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, repr=False)
class Sharing(Scheme):
    """Features in one group share a row (or column) of the matrix: equations (6) and (7).

    `"stride"` puts feature `j` in group `j mod R`; `"contiguous"` makes R runs of neighbours.
    The four combinations are types 1 to 4 of the authors' code (`scheme_from_mora_type`).

    ReMoRA changes the grouping at every merge. Two families go beyond the authors' four, both for
    stride on both sides, both the identity at 0. With `b = j // R` the block of feature `j`:

    - `shift=s` moves feature `j` to group `(j + s b) mod R`.
    - `signs=t` multiplies feature `j` by the Walsh function `(-1) ** popcount(t & b)`. The first n
      Walsh functions on n blocks are linearly independent for every n, so merges with
      t = 0, 1, 2, ... add R to the rank each, up to full rank, at no cost but a sign.

    Args:
      input: grouping of the input features.
      output: grouping of the output features.
      shift: the shift s, non-negative.
      signs: the index t of the Walsh function, non-negative.
    """

    kind: ClassVar[str] = "sharing"
    input: Grouping = "stride"
    output: Grouping = "stride"
    shift: int = 0
    signs: int = 0

    def __post_init__(self):
        for side, grouping in (("input", self.input), ("output", self.output)):
            if grouping not in _GROUPINGS:
                raise ValueError(f"Sharing: {side} must be one of {_GROUPINGS}, got {grouping!r}.")
        for name in ("shift", "signs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"Sharing: {name} must be a non-negative int, got {value!r}.")
            if value and (self.input, self.output) != ("stride", "stride"):
                raise ValueError(
                    f"Sharing: {name}={value} moves whole blocks of R features, so it needs "
                    f"'stride' on both sides, got {self.input!r} and {self.output!r}."
                )


def _check_cycle_flag(scheme: Scheme, cycle: object) -> None:
    if not isinstance(cycle, bool):
        raise ValueError(f"{type(scheme).__name__}: cycle must be a bool, got {cycle!r}.")


@dataclasses.dataclass(frozen=True, repr=False)
class Rotation(Scheme):
    """Blocks of R features share the matrix, block i rotated by the angles `i theta_j`: (9)-(11).

    Type 6 of the authors' code, which writes as many output blocks as there are input blocks and
    then cuts or tiles them to O. On a rectangular layer some inputs are then never updated, or
    some outputs are copies. `cycle=True` mends it: with `n = max(n_in, n_out)` blocks, block i
    reads input block `i mod n_in`, writes output block `i mod n_out`, and they sum where they
    meet.
    """

    kind: ClassVar[str] = "rotation"
    cycle: bool = False

    def __post_init__(self):
        _check_cycle_flag(self, self.cycle)


@dataclasses.dataclass(frozen=True, repr=False)
class Decoupling(Scheme):
    """Blocks of R features share the matrix, unrotated: equation (8). `cycle` as in `Rotation`."""

    kind: ClassVar[str] = "decoupling"
    cycle: bool = False

    def __post_init__(self):
        _check_cycle_flag(self, self.cycle)


@dataclasses.dataclass(frozen=True, repr=False)
class Truncation(Scheme):
    """The first R features in, the first R features out: equations (4) and (5)."""

    kind: ClassVar[str] = "truncation"


@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Scheme):
    """LoRA, the paper's baseline, through the same engine: `delta = (alpha / rank) x A B`.

    Args:
      alpha: LoRA's scale; None stands for alpha = rank, a scale of one.
    """

    kind: ClassVar[str] = "low_rank"
    alpha: float | None = None

    def __post_init__(self):
        if self.alpha is not None and not (isinstance(self.alpha, int | float) and self.alpha > 0):
            raise ValueError(f"LowRank: alpha must be a positive number, got {self.alpha!r}.")


SCHEMES: dict[str, type[Scheme]] = {
    cls.kind: cls for cls in (Sharing, Rotation, Decoupling, Truncation, LowRank)
}

_MORA_TYPES: dict[int, Scheme] = {
    1: Sharing("stride", "stride"),
    2: Sharing("contiguous", "contiguous"),
    3: Sharing("contiguous", "stride"),
    4: Sharing("stride", "contiguous"),
    6: Rotation(),
}


def scheme_from_mora_type(mora_type: int) -> Scheme:
    """The scheme of the authors' integer `mora_type`.

    >>> scheme_from_mora_type(6)
    Rotation()

    Raises:
      ValueError: for a number that has no scheme in the authors' code (5 among them).
    """
    if mora_type not in _MORA_TYPES:
        raise ValueError(
            f"mora_type {mora_type!r} is no scheme of the authors' code, which has "
            f"1 to 4 (sharing) and 6 (rotation)."
        )
    return _MORA_TYPES[mora_type]


def scheme_from_dict(fields: Mapping[str, Any]) -> Scheme:
    """The inverse of `Scheme.to_dict`.

    >>> scheme_from_dict({"kind": "sharing", "input": "contiguous", "output": "stride"})
    Sharing(input='contiguous')

    Raises:
      ValueError: for an unknown kind or an unknown field.
    """
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if kind not in SCHEMES:
        raise ValueError(f"Unknown scheme {kind!r}; there are: {', '.join(SCHEMES)}.")
    known = {field.name for field in dataclasses.fields(SCHEMES[kind])}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"Scheme {kind!r} has no field {unknown}; it has: {sorted(known)}.")
    return SCHEMES[kind](**fields)


def as_scheme(scheme: Scheme | str, rank: int) -> Scheme:
    """A scheme from itself, from its name, or from `"auto"`.

    `"auto"` is cycled rotation below rank 32 and sharing from there on: the paper uses rotation
    at rank 8 and sharing at 128 and 256, and each entry of the matrix acts on fewer pairs of
    features as the rank grows. At rank 8, in layers 128 wide, cycled rotation ended 0.02 below
    sharing, of a loss of 1.48; in a model of 135 million parameters 0.012, of 1.50 on medical
    text, 0.0025, of 0.615 on GSM8K's test, and 0.0003 on other problems, and it memorised later
    (examples/paper/README.md).

    >>> as_scheme("auto", rank=8), as_scheme("truncation", rank=8)
    (Rotation(cycle=True), Truncation())
    """
    if isinstance(scheme, Scheme):
        return scheme
    if scheme == "auto":
        return Rotation(cycle=True) if rank < 32 else Sharing()
    if scheme not in SCHEMES:
        raise ValueError(f"Unknown scheme {scheme!r}; there are: auto, {', '.join(SCHEMES)}.")
    return SCHEMES[scheme]()


def check_rank(rank: int) -> int:
    """Returns `rank`, or raises ValueError unless it is a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}.")
    return rank


def check_multiple(multiple: int) -> int:
    """Returns `multiple`, or raises ValueError unless it is a positive integer."""
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"size_multiple must be a positive integer, got {multiple!r}.")
    return multiple


def square_rank(
    in_features: int, out_features: int, rank: int, scheme: Scheme, *, multiple: int = 1
) -> int:
    """The side R of the square matrix with as many entries as LoRA has at `rank`.

    `R = int(sqrt((I + O) rank) + 0.5)`, made even by subtraction for `Rotation`, as in the
    authors' code (the paper rounds down). For `LowRank` it is `rank` itself.

    With a `multiple`, R becomes the nearest one (of those that are even, for `Rotation`): about as
    many entries, in a size that suits the machine. Rounding makes no dead entries: up to a side of
    the layer, or to R where that is longer. Where no multiple is as small, R stays as it is.

    >>> square_rank(4096, 4096, 8, Sharing())
    256
    >>> square_rank(4096, 14336, 8, Rotation())
    384
    >>> square_rank(4096, 1024, 8, Sharing()), square_rank(4096, 1024, 8, Sharing(), multiple=64)
    (202, 192)

    Raises:
      ValueError: where a size, the rank or the multiple is not a positive integer.
    """
    check_rank(rank)
    check_multiple(multiple)
    if in_features < 1 or out_features < 1:
        raise ValueError(f"features must be positive, got {in_features} -> {out_features}.")
    if isinstance(scheme, LowRank):
        return rank
    size = int(math.sqrt((in_features + out_features) * rank) + 0.5)
    if isinstance(scheme, Rotation):
        # It pairs feature j with j + R/2.
        size, multiple = max(size - size % 2, 2), math.lcm(multiple, 2)
    most = max(size, min(in_features, out_features)) // multiple
    return min(max((size + multiple // 2) // multiple, 1), most) * multiple or size


def adapter_shapes(
    in_features: int,
    out_features: int,
    rank: int,
    scheme: Scheme,
    multiple: int = 1,
    *,
    dora: bool = False,
) -> dict[str, tuple[int, int]]:
    """Names and shapes of the arrays that a scheme trains, and with DoRA the magnitude.

    `multiple` is as for `square_rank`.

    >>> adapter_shapes(64, 32, 2, Truncation())
    {'matrix': (14, 14)}
    >>> adapter_shapes(64, 32, 2, LowRank(), dora=True)
    {'a': (64, 2), 'b': (2, 32), 'magnitude': (1, 32)}
    """
    size = square_rank(in_features, out_features, rank, scheme, multiple=multiple)
    shapes = {"matrix": (size, size)}
    if isinstance(scheme, LowRank):
        shapes = {"a": (in_features, size), "b": (size, out_features)}
    return shapes | ({MAGNITUDE: (1, out_features)} if dora else {})
