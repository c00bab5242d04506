"""MoRAConfig: which layers are adapted and how, as patterns over their paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp

from mora_jax._arrays.paths import ADAPTER, join_path, list_near, list_paths
from mora_jax._plans.cycles import Cycle
from mora_jax._plans.hints import hint_at_names
from mora_jax._plans.layer import LayerConfig
from mora_jax._plans.patterns import (
    Pattern,
    alternatives,
    check_pattern,
    ends_in,
    first_match,
    matches,
    pairs_of,
)
from mora_jax._product.axes import KernelAxes
from mora_jax._product.cost import Placement
from mora_jax._schemes.base import Scheme
from mora_jax._schemes.operators import check_rank
from mora_jax._schemes.registry import as_scheme


@hint_at_names
@dataclasses.dataclass(frozen=True)
class MoRAConfig:
    """How `adapt` chooses the layers of a model and what it gives them.

    A pattern is a regular expression that must match a whole path, or a callable from path to
    bool. Paths are written with slashes, from the root of the parameters.

    Attributes:
      rank: the LoRA rank whose number of parameters each layer trains.
      scheme: a `Scheme`, its name, or "auto": rotation that wraps below rank 32, sharing above.
      targets: the layers to adapt; "all-linear" takes every one there is, an output head too; a
        list of names, such as `["q_proj", "v_proj"]`, takes the layers whose paths end in them.
      exclude: layers to leave alone though `targets` matches them.
      ranks: pattern -> rank, for layers that differ; the first match counts.
      schemes: pattern -> scheme, likewise.
      kernels: pattern over parameters -> `KernelAxes`, for kernels of NNX layers of another kind
        than Flax's, whose axes nothing else states.
      cycle: the schemes that ReMoRA walks through, see `merge_and_reset`: "groupings" (the
        authors' types 1 to 4), "shifts", "signs", a tuple of schemes, None, or "auto" ("signs" for
        sharing, None for the rest).
      also_train: parameters (not layers) to train in full beside the adapters, such as
        `".*norm/scale"`.
      dropout: rate at which the adapter's input is dropped where an rng stream `mora` is given.
      placement: "kernel", "activation" or "auto", see `mora_dot_general`.
      dtype: dtype of the adapters.
      keep_sums: True for a model whose layers run under remat: the sum of a kernel and its delta is
        then kept until the layer's backward pass, which spares a sum, and with FSDP a gathering.
        Without remat it would be a second copy of the model.
      dora: train a magnitude for each output feature beside the direction that the delta turns, as
        DoRA does (arXiv 2402.09353) and PEFT's `use_dora`; see `_product/dora.py`. With `LowRank`
        it is DoRA itself.
      size_multiple: the sides of square matrices are rounded to multiples of it, such as 64 or 128,
        see `square_rank`: about as many parameters, in sizes that suit the machine. 1 for the
        authors' sizes, the only ones that their format knows.

    Raises:
      ValueError: for a rank that is not positive, an unknown name, a rate out of range.
      TypeError: for a dtype that is not floating.

    >>> config = MoRAConfig(rank=8, targets=r".*/(query|value)", ranks={r".*/value": 4})
    >>> config.choose("attention/value").rank, config.choose("attention/key")
    (4, None)
    """

    rank: int = 8
    scheme: Scheme | str = "auto"
    targets: Pattern | Sequence[str] = "all-linear"
    exclude: Pattern | None = None
    ranks: Mapping[str, int] | tuple[tuple[Pattern, int], ...] = ()
    schemes: Mapping[str, Scheme | str] | tuple[tuple[Pattern, Scheme | str], ...] = ()
    kernels: Mapping[str, KernelAxes] | tuple[tuple[Pattern, KernelAxes], ...] = ()
    cycle: Cycle = "auto"
    also_train: Pattern | None = None
    dropout: float = 0.0
    placement: Placement = "auto"
    dtype: Any = "float32"
    keep_sums: bool = False
    dora: bool = False
    size_multiple: int = 1

    def __post_init__(self):
        # Tuples instead of dicts and names instead of dtypes make the config hashable.
        for name in ("ranks", "schemes", "kernels"):
            object.__setattr__(self, name, pairs_of(getattr(self, name)))
        if isinstance(self.targets, list | tuple | set | frozenset):
            object.__setattr__(self, "targets", ends_in(self.targets))
        if isinstance(self.cycle, list):
            object.__setattr__(self, "cycle", tuple(self.cycle))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        for pattern in self.patterns().values():
            check_pattern(pattern)
        for rank in (self.rank, *(rank for _, rank in pairs_of(self.ranks))):
            for scheme in (self.scheme, *(scheme for _, scheme in pairs_of(self.schemes))):
                self._layer(rank, scheme)

    def choose(self, path: str) -> LayerConfig | None:
        """What the layer at `path` gets, or None where it is left alone."""
        if not self.selects(path):
            return None
        return self._layer(
            first_match(self.ranks, path, self.rank),
            first_match(self.schemes, path, self.scheme),
            train_kernel=self.trains(join_path(path, "kernel")),
        )

    @property
    def _targets(self) -> Pattern:
        return cast(Pattern, self.targets)  # names have become a pattern

    def selects(self, path: str) -> bool:
        """Whether the layer at `path` is adapted."""
        wanted = self._targets == "all-linear" or matches(self._targets, path)
        return wanted and not (self.exclude is not None and matches(self.exclude, path))

    def reason(self, path: str) -> str:
        """Why the layer at `path` is not adapted."""
        excluded = self.exclude is not None and matches(self.exclude, path)
        return "excluded" if excluded else "not in targets"

    def kernel_axes(self, path: str) -> KernelAxes | None:
        """What `kernels` says of the parameter at `path`."""
        return first_match(self.kernels, path, None)

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` is trained in full beside the adapters."""
        return self.also_train is not None and matches(self.also_train, path)

    def patterns(self) -> dict[str, Pattern]:
        """Every pattern of the config by the field it stands in."""
        patterns: dict[str, Pattern] = {}
        if self._targets != "all-linear":
            patterns["targets"] = self._targets
        for name in ("exclude", "also_train"):
            if (pattern := getattr(self, name)) is not None:
                patterns[name] = pattern
        for name in ("ranks", "schemes", "kernels"):
            patterns |= {f"{name}[{pattern!r}]": pattern for pattern, _ in getattr(self, name)}
        return patterns

    def _layer(self, rank: int, scheme: Scheme | str, train_kernel: bool = False) -> LayerConfig:
        check_rank(rank)
        return LayerConfig(
            rank=rank,
            scheme=as_scheme(scheme, rank),
            cycle=self.cycle,
            placement=self.placement,
            dropout=self.dropout,
            dtype=self.dtype,
            train_kernel=train_kernel,
            keep_sums=self.keep_sums,
            dora=self.dora,
            size_multiple=self.size_multiple,
        )


def check_matches(config: MoRAConfig, layers: Iterable[str], parameters: Iterable[str]) -> None:
    """Raises ValueError for the first pattern of the config that matches nothing.

    That includes each alternative of a pattern, such as `value` in `.*/(query|value)`, and ranks
    and schemes for layers that are not adapted or that an earlier pattern decides.

    Args:
      config: the config.
      layers: paths of the linear layers, which most patterns speak of.
      parameters: paths of the parameters, which `also_train` and `kernels` speak of.
    """
    layers, parameters = list(layers), list(parameters)
    if not layers:
        raise ValueError("the model has no linear layer to adapt.")
    if own := [path for path in (*layers, *parameters) if ADAPTER in path.split("/")]:
        raise ValueError(
            f"the model has parameters of its own under the name {ADAPTER!r}: {list_paths(own)}. "
            "The library keeps adapters under it, so rename them."
        )
    for name, pattern in config.patterns().items():
        of_parameters = name.startswith(("also_train", "kernels"))
        kind, paths = ("parameters", parameters) if of_parameters else ("layers", layers)
        _check_matches(name, pattern, kind, paths)
    selected = [path for path in layers if config.selects(path)]
    if not selected:
        raise ValueError(
            f"MoRAConfig.exclude={config.exclude!r} leaves out every layer that "
            f"targets={config.targets!r} matches."
        )
    for name in ("ranks", "schemes"):
        _check_decides(name, [pattern for pattern, _ in getattr(config, name)], selected)


def _check_matches(name: str, pattern: Pattern, kind: str, paths: Sequence[str]) -> None:
    """Raises ValueError if a pattern, or one of its alternatives, matches none of the paths."""
    where = f"none of the {len(paths)} {kind} (a pattern must match a whole path, from the root)"
    if not any(matches(pattern, path) for path in paths):
        raise ValueError(
            f"MoRAConfig.{name}={pattern!r} matches {where}. Near it: "
            f"{list_near(str(pattern), paths)}."
        )
    for part, alone in alternatives(pattern):
        if not any(matches(alone, path) for path in paths):
            raise ValueError(
                f"MoRAConfig.{name}={pattern!r}: its alternative {part!r} matches {where}. Near "
                f"it: {list_near(part, paths)}. Leave it out, or mend it."
            )


def _check_decides(name: str, patterns: Sequence[Pattern], selected: Sequence[str]) -> None:
    """Raises ValueError for a pattern of ranks or schemes that no adapted layer goes by."""
    for index, pattern in enumerate(patterns):
        found = [path for path in selected if matches(pattern, path)]
        if not found:
            raise ValueError(
                f"MoRAConfig.{name}[{pattern!r}] matches no layer that is adapted. Adapted are "
                f"{list_near(str(pattern), selected)}. Does targets or exclude leave it out?"
            )
        if all(any(matches(other, path) for other in patterns[:index]) for path in found):
            raise ValueError(
                f"MoRAConfig.{name}[{pattern!r}] decides nothing: the first pattern that matches "
                f"counts, and earlier ones match {list_paths(found)} already. Put it before them."
            )
