"""MoRAConfig: which layers are adapted and how, as patterns over their paths."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import jax.numpy as jnp

from mora_jax._arrays.mesh import UNKNOWN, Spread
from mora_jax._arrays.paths import join_path, listing
from mora_jax._plans.cycles import Cycle, check_cycle
from mora_jax._product.axes import KernelAxes
from mora_jax._product.cost import Placement
from mora_jax._product.dora import MAGNITUDE, magnitude_leaf
from mora_jax._schemes.base import Leaf, Scheme
from mora_jax._schemes.operators import check_multiple, check_rank, square_rank
from mora_jax._schemes.registry import as_scheme

Pattern = str | Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What one adapted layer needs to know; all static.

    Attributes:
      rank: the LoRA rank whose number of parameters the layer trains.
      scheme: the scheme it uses now.
      cycle: the schemes it walks through in ReMoRA.
      placement: where the delta is added, see `mora_dot_general`.
      dropout: rate at which the adapter's input is dropped where an rng stream `mora` is given.
      dtype: name of the adapter's dtype.
      train_kernel: whether the kernel itself is trained beside its adapter (`also_train`).
      spread: how its activations lie on a mesh; stated by `mora_jax.sharding.on_mesh`.
      keep_sums: see `MoRAConfig`.
      dora: likewise.
      size_multiple: see `MoRAConfig`.
    """

    rank: int
    scheme: Scheme
    cycle: Cycle = "auto"
    placement: Placement = "auto"
    dropout: float = 0.0
    dtype: str = "float32"
    train_kernel: bool = False
    spread: Spread = UNKNOWN
    keep_sums: bool = False
    dora: bool = False
    size_multiple: int = 1

    def __post_init__(self):
        check_rank(self.rank)
        check_multiple(self.size_multiple)
        check_cycle(self.cycle)
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"placement must be one of {get_args(Placement)}, got {self.placement!r}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}.")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise TypeError(f"an adapter's dtype must be floating, got {self.dtype!r}.")
        if not isinstance(self.dora, bool):
            raise ValueError(f"dora must be a bool, got {self.dora!r}.")

    def size(self, in_features: int, out_features: int) -> int:
        """R: the side of the square matrix, or LoRA's rank."""
        return square_rank(
            in_features, out_features, self.rank, self.scheme, multiple=self.size_multiple
        )

    def leaves(self, in_features: int, out_features: int) -> dict[str, Leaf]:
        """Name -> leaf, of one adapter; with DoRA the magnitude among them."""
        size = self.size(in_features, out_features)
        leaves = self.scheme.leaves(in_features, out_features, size)
        return leaves | ({MAGNITUDE: magnitude_leaf(out_features)} if self.dora else {})

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of one adapter's leaves."""
        leaves = self.leaves(in_features, out_features)
        return {name: leaf.shape for name, leaf in leaves.items()}


@dataclasses.dataclass(frozen=True)
class MoRAConfig:
    """How `adapt` chooses the layers of a model and what it gives them.

    A pattern is a regular expression that must match a whole path, or a callable from path to
    bool. Paths are written with slashes, from the root of the parameters.

    Attributes:
      rank: the LoRA rank whose number of parameters each layer trains.
      scheme: a `Scheme`, its name, or "auto": rotation that wraps below rank 32, sharing above.
      targets: the layers to adapt; "all-linear" takes every one there is, an output head too.
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
        DoRA does (arXiv 2402.09353) and PEFT's `use_dora`; see `_magnitude.py`. With `LowRank` it
        is DoRA itself.
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
    targets: Pattern = "all-linear"
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
            object.__setattr__(self, name, _pairs(getattr(self, name)))
        if isinstance(self.cycle, list):
            object.__setattr__(self, "cycle", tuple(self.cycle))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        for pattern in self.patterns().values():
            _check_pattern(pattern)
        for rank in (self.rank, *(rank for _, rank in _pairs(self.ranks))):
            for scheme in (self.scheme, *(scheme for _, scheme in _pairs(self.schemes))):
                self._layer(rank, scheme)

    def choose(self, path: str) -> LayerConfig | None:
        """What the layer at `path` gets, or None where it is left alone."""
        if not self.selects(path):
            return None
        return self._layer(
            _first_match(self.ranks, path, self.rank),
            _first_match(self.schemes, path, self.scheme),
            train_kernel=self.trains(join_path(path, "kernel")),
        )

    def selects(self, path: str) -> bool:
        """Whether the layer at `path` is adapted."""
        wanted = self.targets == "all-linear" or matches(self.targets, path)
        return wanted and not (self.exclude is not None and matches(self.exclude, path))

    def reason(self, path: str) -> str:
        """Why the layer at `path` is not adapted."""
        excluded = self.exclude is not None and matches(self.exclude, path)
        return "excluded" if excluded else "not in targets"

    def kernel_axes(self, path: str) -> KernelAxes | None:
        """What `kernels` says of the parameter at `path`."""
        return _first_match(self.kernels, path, None)

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` is trained in full beside the adapters."""
        return self.also_train is not None and matches(self.also_train, path)

    def patterns(self) -> dict[str, Pattern]:
        """Every pattern of the config by the field it stands in."""
        patterns: dict[str, Pattern] = {}
        if self.targets != "all-linear":
            patterns["targets"] = self.targets
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


def _pairs(value: Any) -> tuple[tuple[Pattern, Any], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple((pattern, item) for pattern, item in pairs)


def _first_match(pairs: Any, path: str, default: Any) -> Any:
    return next((item for pattern, item in _pairs(pairs) if matches(pattern, path)), default)


def matches(pattern: Pattern, path: str) -> bool:
    """Whether a pattern matches a whole path.

    >>> matches(r".*_proj", "layers/q_proj"), matches("q_proj", "layers/q_proj")
    (True, False)
    """
    if isinstance(pattern, str):
        return re.fullmatch(pattern, path) is not None
    return bool(pattern(path))


def check_matches(config: MoRAConfig, layers: Iterable[str], parameters: Iterable[str]) -> None:
    """Raises ValueError for the first pattern of the config that matches nothing.

    Args:
      config: the config.
      layers: paths of the linear layers, which most patterns speak of.
      parameters: paths of the parameters, which `also_train` and `kernels` speak of.
    """
    layers, parameters = list(layers), list(parameters)
    if not layers:
        raise ValueError("the model has no linear layer to adapt.")
    for name, pattern in config.patterns().items():
        kind, paths = ("layers", layers)
        if name.startswith(("also_train", "kernels")):
            kind, paths = ("parameters", parameters)
        if any(matches(pattern, path) for path in paths):
            continue
        near = difflib.get_close_matches(str(pattern), paths, n=8, cutoff=0.2) or paths
        raise ValueError(
            f"MoRAConfig.{name}={pattern!r} matches none of the {len(paths)} {kind} "
            f"(a pattern must match a whole path, from the root). Near it: {listing(near)}."
        )
    if not any(config.selects(path) for path in layers):
        raise ValueError(
            f"MoRAConfig.exclude={config.exclude!r} leaves out every layer that "
            f"targets={config.targets!r} matches."
        )


def _check_pattern(pattern: Pattern) -> None:
    if callable(pattern):
        return
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern must be a regular expression or a callable, got {pattern!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
