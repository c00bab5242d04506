"""Old names that still work for one release, and say the new one."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Collection
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warns that `old` is called `new` now, at the line of the caller's caller."""
    warnings.warn(
        f"{old} has been renamed to {new}; the old name will be removed in the next release.",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def renamed_argument(old: str, new: str) -> Callable[[T], T]:
    """Lets a function, or a class's constructor, take a keyword by its old name.

    Of a class it is an attribute too.
    """

    def decorate(function: T) -> T:
        if isinstance(function, type):
            cls: Any = function
            cls.__init__ = take_old(cls.__init__, cls.__name__)

            def get(self):
                warn_renamed(f"{cls.__name__}.{old}", new)
                return getattr(self, new)

            setattr(cls, old, property(get))
            return cls
        return take_old(function, function.__name__)

    def take_old(function, name):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{name} got {old} and {new}, which are the same argument.")
                warn_renamed(f"{name}({old}=)", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_names(
    module: str, names: dict[str, tuple[str, Any]], inner: Collection[str] = ()
) -> Callable[[str], Any]:
    """A `__getattr__` for a module.

    Args:
      module: its name.
      names: names that have changed: old -> (new, the object).
      inner: modules in it that are imported where they are asked for.
    """

    def get(name: str) -> Any:
        if name in inner:
            return importlib.import_module(f"{module}.{name}")
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new, value = names[name]
        warn_renamed(f"{module}.{name}", f"{module}.{new}")
        return value

    return get
