"""Marks on linen scopes: what keeps traces apart, and which modules belong to an adapted model.

A scope's flags are inherited by the scopes that are made below it, also by those of lifted
transformations. They are part of the keys of `nn.jit`'s trace cache, by hash, while interceptors
are not. A module under an `apply` of its own has a scope of its own, without these flags.
"""

from __future__ import annotations

import collections
import dataclasses
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


def mark_scope(module: nn.Module, **marks: Any) -> None:
    """Sets flags of a bound module's scope. Scopes made below it from then on inherit them."""
    if module.scope is not None:
        module.scope.flags = freeze({**module.scope.flags, **marks})


def mark_fields(module: nn.Module, **marks: Any) -> None:
    """`mark_scope` of a module and of the bound modules in its fields, below it."""
    if module.scope is None:
        return
    mark_scope(module, **marks)
    depth = len(module.path)
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name"):
            continue
        values = getattr(module, field.name, None)
        for value in jax.tree.leaves(values, is_leaf=lambda value: isinstance(value, nn.Module)):
            ours = isinstance(value, nn.Module) and value.scope is not None
            # Others belong to a module around this one, and are lent.
            if ours and len(value.path) > depth and value.path[:depth] == module.path:
                mark_fields(value, **marks)


def has_mark(module: nn.Module, name: str) -> bool:
    """Whether a module is bound, to a scope that has this flag."""
    return module.scope is not None and name in module.scope.flags


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What one adapted model has chosen, and how its modules are told from others.

    Attributes:
      chooser: the config or plan.
      flag: the name of the flag that the scopes of the model's modules have.
      below: path of a module -> a number for what is chosen in it and below it.
    """

    chooser: Chooser
    flag: str
    below: Callable[[str], int]

    @classmethod
    def of(cls, chooser: Chooser) -> Adaptation:
        """The adaptation by this config or plan."""
        return cls(chooser, f"mora_adapt_{hash(chooser)}", _below(chooser))

    def marks(self, path: str = "") -> dict[str, int]:
        """The flags of the scope of the module at `path`."""
        return {self.flag: self.below(path)}

    def mark(self, module: nn.Module, path: str) -> None:
        """Marks a module that is about to run, so that `nn.jit` tells it from its like.

        Raises:
          ValueError: where `nn.jit` has looked at the module already.
        """
        scope: Any = module.scope
        marks = self.marks(path)
        lifted = scope.debug_path[-1:] if hasattr(scope, "debug_path") else ()
        if lifted and "jit(" in lifted[0] and scope.flags[self.flag] != marks[self.flag]:
            raise ValueError(
                f"the module at {path!r} is an argument of a function that `nn.jit` has traced. "
                "Flax cannot tell such modules apart, so that one module's adapters would serve "
                "another. Use nn.jit on the module's class or on its method."
            )
        mark_scope(module, **marks)


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
