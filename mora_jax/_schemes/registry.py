"""The schemes there are, by name and by the authors' numbers; new ones are registered here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

from mora_jax._schemes.base import Scheme
from mora_jax._schemes.blocks import Decoupling, Rotation
from mora_jax._schemes.groups import GROUPINGS, Sharing
from mora_jax._schemes.low_rank import LowRank
from mora_jax._schemes.truncation import Truncation

SchemeT = TypeVar("SchemeT", bound=Scheme)

#: Kind -> class.
SCHEMES: dict[str, type[Scheme]] = {}


@dataclass_transform(frozen_default=True)
def register_scheme(cls: type[SchemeT]) -> type[SchemeT]:
    """Makes a scheme known by its `kind`: in configs, plans, and files that are read back.

    A class decorator, which makes the class a frozen dataclass if it is not one. The class is
    derived from `mora_jax.Scheme` and defines `kind`, `compress` and `decompress`. Each field has a
    default and holds values of JSON, lists as tuples. A program that loads a plan with this scheme
    must import its module first.

    Args:
      cls: the scheme's class.

    Returns:
      The class itself.

    Raises:
      TypeError: if the class is not derived from `Scheme`, lacks a map, has an `__init__` of its
        own, a field without a default or a field called `kind`, is not frozen or not compared by
        its fields, or has other leaves than one matrix and takes what is derived for one.
      ValueError: if the kind is empty, has a meaning of its own, or is taken by another class.

    >>> import jax.numpy as jnp, mora_jax
    >>> @mora_jax.register_scheme
    ... class Last(mora_jax.Scheme):
    ...     kind = "last"
    ...     def compress(self, x, size, *, out_features=None):
    ...         return x[..., -size:]
    ...     def decompress(self, z, out_features):
    ...         return jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(out_features - z.shape[-1], 0)])
    >>> mora_jax.delta(jnp.arange(3.0), {"matrix": jnp.eye(2)}, 4, Last())
    Array([0., 0., 1., 2.], dtype=float32)
    >>> mora_jax.scheme_from_dict({"kind": "last"})
    Last()
    """
    if not (isinstance(cls, type) and issubclass(cls, Scheme)):
        raise TypeError(f"register_scheme: expected a class derived from Scheme, got {cls!r}.")
    if "__dataclass_params__" not in vars(cls):
        if "__init__" in vars(cls):
            raise TypeError(
                f"register_scheme: {cls.__name__} has an __init__ of its own. Write annotated "
                "fields with defaults instead: schemes are compared and saved by their fields."
            )
        cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    _check_class(cls)
    if not isinstance(cls.kind, str) or cls.kind in ("", "auto"):
        raise ValueError(f"register_scheme: {cls.__name__}.kind must name it, got {cls.kind!r}.")
    other = SCHEMES.get(cls.kind, cls)
    # A module that is run once more, as in a notebook, defines its classes anew.
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"register_scheme: the kind {cls.kind!r} is taken by {other!r}.")
    SCHEMES[cls.kind] = cls
    return cls


def _check_class(cls: type[Scheme]) -> None:
    """Raises TypeError for a scheme that would be compared, saved or differentiated wrongly."""
    name, params = f"register_scheme: {cls.__name__}", vars(cls)["__dataclass_params__"]
    if not params.frozen or not params.eq:
        raise TypeError(f"{name} must be frozen and compared by its fields, for it is hashed.")
    if "kind" in {field.name for field in dataclasses.fields(cls)}:
        raise TypeError(f"{name} has a field `kind`; write `kind = ...` without an annotation.")
    missing = dataclasses.MISSING
    if bare := [f.name for f in dataclasses.fields(cls) if f.default is missing]:
        raise TypeError(f"{name}: a scheme can be given by its name, so give {bare} defaults.")
    if cls.compress is Scheme.compress and cls.delta is Scheme.delta:
        raise TypeError(f"{name} must define compress and decompress.")
    if cls.leaves is not Scheme.leaves:
        # What is derived knows of one square matrix alone.
        derived = ("delta_by", "delta_kernel", "delta_transpose", "gradient_residual", "gradient")
        if left := [m for m in derived if getattr(cls, m) is getattr(Scheme, m)]:
            raise TypeError(f"{name} has leaves of its own, so it must define {', '.join(left)}.")


for _scheme in (Sharing, Rotation, Decoupling, Truncation, LowRank):
    register_scheme(_scheme)

#: The authors' number of a scheme -> the scheme.
_MORA_TYPES: dict[int, Scheme] = {**dict(enumerate(GROUPINGS, 1)), 6: Rotation()}

#: The inverse.
MORA_TYPES = {scheme: mora_type for mora_type, scheme in _MORA_TYPES.items()}


def scheme_from_mora_type(mora_type: int) -> Scheme:
    """The scheme of the authors' integer `mora_type`.

    >>> scheme_from_mora_type(6)
    Rotation()

    Raises:
      ValueError: if the authors' code has no scheme of this number (5 among them).
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
      ValueError: for an unknown kind, an unknown field, or a value of another type than the field's
        default.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"a scheme is an object of fields, got {fields!r:.80}.")
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in SCHEMES:
        raise ValueError(
            f"Unknown scheme {kind!r}; there are: {', '.join(SCHEMES)}. A scheme of your own must "
            "be registered first: import the module that calls register_scheme."
        )
    cls = SCHEMES[kind]
    fields = {cls.renamed_fields.get(name, name): value for name, value in fields.items()}
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"Scheme {kind!r} has no field {unknown}; it has: {sorted(known)}.")
    values = {name: _as_tuples(value) for name, value in fields.items()}
    for field in dataclasses.fields(cls):
        if field.name in values and not _is_like(values[field.name], field.default):
            raise ValueError(
                f"Scheme {kind!r}: {field.name} is {values[field.name]!r:.80}, wanted a "
                f"{type(field.default).__name__}."
            )
    return cls(**values)


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value of JSON can stand for a field with this default."""
    if default is None:
        return not isinstance(value, dict)
    if isinstance(default, int | float) and not isinstance(default, bool):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _as_tuples(value: Any) -> Any:
    """JSON has lists where a scheme, which is hashed, has tuples."""
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def as_scheme(scheme: Scheme | str, rank: int) -> Scheme:
    """A scheme from itself, from its name, or from `"auto"`.

    `"auto"` is rotation that wraps below rank 32 and sharing from there on: the paper uses rotation
    at rank 8 and sharing at 128 and 256, and each entry of the matrix acts on fewer pairs of
    features as the rank grows. At rank 8, in layers 128 wide, it ended 0.02 below sharing, of a
    loss of 1.48; in a model of 135 million parameters 0.012, of 1.50 on medical text, 0.0025, of
    0.615 on GSM8K's test, and 0.0003 on other problems, and it memorised later
    (examples/paper/README.md).

    >>> as_scheme("auto", rank=8), as_scheme("truncation", rank=8)
    (Rotation(wrap=True), Truncation())
    """
    if isinstance(scheme, Scheme):
        check_registered(scheme)
        return scheme
    # What everyone calls it.
    if scheme == "lora":
        return LowRank()
    if scheme == "auto":
        return Rotation(wrap=True) if rank < 32 else Sharing()
    if scheme not in SCHEMES:
        raise ValueError(f"Unknown scheme {scheme!r}; there are: auto, {', '.join(SCHEMES)}.")
    return SCHEMES[scheme]()


def check_registered(scheme: Scheme) -> None:
    """Raises ValueError for a scheme whose class `register_scheme` has not seen."""
    known = SCHEMES.get(scheme.kind)
    if known is None or known.__qualname__ != type(scheme).__qualname__:
        raise ValueError(
            f"{type(scheme).__name__} is not registered, so a plan with it could not be read "
            "back: put @mora_jax.register_scheme above the class."
        )


def owners_of(cycle: str) -> list[str]:
    """The names of the schemes that have this named cycle."""
    return [cls.__name__ for cls in SCHEMES.values() if cycle in cls.cycles]


def named_cycles() -> list[str]:
    """Every named cycle that some scheme has."""
    return sorted({cycle for cls in SCHEMES.values() for cycle in cls.cycles})
