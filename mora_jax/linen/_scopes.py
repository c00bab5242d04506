"""Marks on linen scopes: what keeps traces apart, and which modules belong to an adapted model.

A scope's flags are inherited by the scopes that are made below it, also by those of lifted
transformations. They are part of the keys of `nn.jit`'s trace cache, by hash, while interceptors
are not. A module under an `apply` of its own has a scope of its own, without these flags.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
from flax import linen as nn
from flax.core import freeze

from mora_jax._arrays.paths import join_path
from mora_jax._plans.config import MoRAConfig
from mora_jax._plans.layer import LayerConfig
from mora_jax._plans.plan import Plan


class Chooser(Protocol):
    """What `adapt` asks about each layer; a `MoRAConfig` or a `Plan` answers."""

    def choose(self, path: str) -> LayerConfig | None:
        """The config of the layer at `path`, or None where it is left alone."""
        ...

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` is trained in full."""
        ...


@dataclasses.dataclass(frozen=True)
class Marks:
    """The flags of the scopes of one model's modules.

    Attributes:
      flag: the name of a flag that differs from module to module, where traces must.
      below: path of a module, from the model's root -> the value of that flag.
      others: further flags, the same for all.
      depth: how many names the path of the model's root has.
    """

    flag: str
    below: Callable[[str], Any]
    others: tuple[tuple[str, Any], ...] = ()
    depth: int = 0

    def at(self, scope: Any) -> dict[str, Any]:
        """The flags of the scope of a module."""
        own = self.below(join_path(*scope.path[self.depth :]))
        return {self.flag: own, **dict(self.others)}

    def are_on(self, module: nn.Module) -> bool:
        """Whether a module is one of the model's."""
        return module.scope is not None and self.flag in module.scope.flags

    def enter(self, module: nn.Module) -> None:
        """Marks a module that is about to run, and the modules in it.

        Raises:
          ValueError: if `nn.jit` took it for another.
        """
        scope: Any = module.scope
        jitted = "jit(" in "".join(scope.debug_path[-1:])
        if jitted and scope.flags[self.flag] != self.at(scope)[self.flag]:
            raise ValueError(
                f"nn.jit traces the module at {join_path(*module.path)!r} where Flax cannot tell "
                "it from its like, so that the adapters of one would serve the other. Use nn.jit "
                "on a class or a method of modules that are made in a compact method, use jax.jit "
                "around the whole model, or leave nn.jit out."
            )
        self.put_on(scope)
        for inner in _modules_in(module):
            self.put_on(inner.scope)

    def put_on_all(self, module: nn.Module) -> None:
        """Marks a bound module, and all modules in it."""
        self.put_on(module.scope)
        for inner in _modules_in(module):
            self.put_on_all(inner)

    def put_on(self, scope: Any) -> None:
        """Sets the flags of a scope, and of those that will be made in it."""
        if not hasattr(scope, "mora_marks"):
            # `nn.jit` looks at a module before any interceptor does.
            scope.mora_marks, scope.push = {}, functools.partial(_push, scope)
        scope.mora_marks[self.flag] = self
        scope.flags = freeze({**scope.flags, **self.at(scope)})


def _push(scope: Any, *args: Any, **kwargs: Any) -> Any:
    """`Scope.push`, with the marks of the scope on the one that it makes."""
    inner = type(scope).push(scope, *args, **kwargs)
    for marks in scope.mora_marks.values():
        marks.put_on(inner)
    return inner


def _modules_in(module: nn.Module) -> Iterator[nn.Module]:
    """The bound modules that a module holds: in its fields, and those that `setup` made."""
    names = [field.name for field in dataclasses.fields(module)]
    held = [getattr(module, name, None) for name in names if name not in ("parent", "name")]
    held.append(getattr(getattr(module, "_state", None), "children", None))
    depth = len(module.path)
    for value in jax.tree.leaves(held, is_leaf=lambda value: isinstance(value, nn.Module)):
        bound = isinstance(value, nn.Module) and value.scope is not None
        # Others belong to a module around this one, and are lent.
        if bound and len(value.path) > depth and value.path[:depth] == module.path:
            yield value


def marks_of(chooser: Chooser) -> Marks:
    """The marks of a model that is adapted by this config or plan."""
    return Marks(f"mora_adapt_{hash(chooser)}", _below(chooser))


def _below(chooser: Chooser) -> Callable[[str], int]:
    """Path of a module -> a number that tells what is chosen for it and for what is below it."""
    if isinstance(chooser, MoRAConfig) and not chooser.patterns():
        return lambda path: 0  # every layer gets the same
    if not isinstance(chooser, Plan):
        return hash
    chosen: dict[str, list[tuple[str, LayerConfig, bool]]] = collections.defaultdict(list)
    for path, spec in chooser.items():
        trained = chooser.trains(join_path(path, spec.kernel_name))
        for above, rest in _splits(path):
            chosen[above].append((rest, spec.config, trained))
    numbers = {path: hash(tuple(layers)) for path, layers in chosen.items()}
    return lambda path: numbers.get(path, 0)


def _splits(path: str) -> Iterator[tuple[str, str]]:
    """Every (path of a module, path within it) of a layer.

    >>> list(_splits("a/b"))
    [('', 'a/b'), ('a', 'b'), ('a/b', '')]
    """
    parts = path.split("/") if path else []
    for end in range(len(parts) + 1):
        yield "/".join(parts[:end]), "/".join(parts[end:])
