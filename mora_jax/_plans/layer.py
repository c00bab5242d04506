"""One layer of a plan: what it was asked to be, and how its kernel and its adapter are laid out."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp

from mora_jax._arrays.mesh import UNKNOWN, FeatureSharding
from mora_jax._plans.cycles import Cycle, check_cycle, next_scheme
from mora_jax._plans.saved import Fields, axes_of, fields_of, flag, natural, naturals, rate, text
from mora_jax._product.axes import KernelAxes
from mora_jax._product.cost import Placement
from mora_jax._product.dora import MAGNITUDE, magnitude_leaf
from mora_jax._schemes.base import Adapter, Leaf, Scheme
from mora_jax._schemes.operators import check_multiple, check_rank, square_rank
from mora_jax._schemes.registry import scheme_from_dict


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
      feature_sharding: how its activations lie on a mesh; stated by `mora_jax.sharding.on_mesh`.
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
    feature_sharding: FeatureSharding = UNKNOWN
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

    def stored_name(self, leaf: str) -> str:
        """The name of a leaf in the parameters, which says the scheme.

        So a model with another scheme than the parameters' does not find it.

        >>> from mora_jax import Sharing
        >>> LayerConfig(rank=8, scheme=Sharing(signs=3)).stored_name("matrix")
        'matrix_sharing_signs_3'
        """
        tag = "" if leaf == MAGNITUDE else self.scheme.tag
        return f"{leaf}_{tag}" if tag else leaf

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of one adapter's leaves."""
        leaves = self.leaves(in_features, out_features)
        return {name: leaf.shape for name, leaf in leaves.items()}


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """One adapted layer: its kernel's layout and its adapter's.

    Attributes:
      config: rank, scheme, cycle, placement, dropout, dtype.
      kernel_shape: full shape of the kernel, the axes of stacked layers included.
      kernel_axes: which of these axes are input, output and batch (stacked layers, experts).
      adapter_batch_axes: where the batch axes stand in the adapter's leaves.
      kernel_name: name of the kernel within its layer; "" where the layer is the kernel.
    """

    config: LayerConfig
    kernel_shape: tuple[int, ...]
    kernel_axes: KernelAxes
    adapter_batch_axes: tuple[int, ...] = ()
    kernel_name: str = "kernel"

    @property
    def scheme(self) -> Scheme:
        """The scheme in use now."""
        return self.config.scheme

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes: one adapter for each element."""
        return self.kernel_axes.sizes(self.kernel_shape)[0]

    @property
    def features(self) -> tuple[int, int]:
        """(I, O): input and output features."""
        return self.kernel_axes.sizes(self.kernel_shape)[1:]

    @property
    def size(self) -> int:
        """R: the side of the square matrix, or LoRA's rank."""
        return self.config.size(*self.features)

    @property
    def leaves(self) -> dict[str, Leaf]:
        """Name -> leaf, without the batch axes."""
        return self.config.leaves(*self.features)

    @property
    def draws(self) -> bool:
        """Whether a new adapter needs a PRNG key."""
        return any(leaf.draws for leaf in self.leaves.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes of the adapter's leaves, batch axes in their places."""
        shapes = {}
        for name, leaf in self.leaves.items():
            rest = iter(leaf.shape)
            ndim = len(leaf.shape) + len(self.batch)
            sizes = dict(zip(self.adapter_batch_axes, self.batch, strict=True))
            shapes[name] = tuple(sizes[a] if a in sizes else next(rest) for a in range(ndim))
        return shapes

    @property
    def row_axis(self) -> int:
        """Which axis of the adapter's leaves is their rows; in a bank, adapter after adapter."""
        ndim = len(self.adapter_batch_axes) + 2
        return next(axis for axis in range(ndim) if axis not in self.adapter_batch_axes)

    @property
    def rows(self) -> dict[str, int]:
        """Rows of one adapter's leaves, by their names."""
        return {name: shape[self.row_axis] for name, shape in self.shapes.items()}

    @property
    def parameters(self) -> int:
        """Trained numbers in this layer's adapter."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def dead_entries(self) -> int:
        """Entries of one matrix that cannot act, where R exceeds a side of the layer."""
        return self.scheme.dead_entries(*self.features, self.size)

    def delta(self, adapter: Adapter) -> jax.Array:
        """The delta's kernel, laid out like the base kernel."""
        return self.kernel_axes.delta(self.batch_first(adapter), self.kernel_shape, self.scheme)

    def batch_first(self, adapter: Adapter) -> dict[str, jax.Array]:
        """The adapter's leaves as [B..., rows, columns], by their plain names.

        Args:
          adapter: its leaves, by their plain names or by those in the parameters.
        """
        front = tuple(range(len(self.adapter_batch_axes)))
        plain = {self.config.stored_name(name): name for name in self.leaves}
        return {
            plain.get(name, name): jnp.moveaxis(leaf, self.adapter_batch_axes, front)
            for name, leaf in adapter.items()
        }

    def advance(self) -> AdapterSpec:
        """The same layer with the next scheme of its cycle.

        Raises:
          ValueError: where the next scheme's matrix has another size.
        """
        scheme = next_scheme(self.scheme, self.config.cycle, *self.features, self.size)
        spec = dataclasses.replace(self, config=dataclasses.replace(self.config, scheme=scheme))
        if spec.shapes != self.shapes:
            raise ValueError(
                f"a cycle must keep the adapter's shape: {self.scheme} has {self.shapes}, the next "
                f"one, {scheme}, has {spec.shapes}."
            )
        return spec


def spec_to_dict(spec: AdapterSpec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec)
    del fields["config"]["feature_sharding"]  # of a mesh, not of the adapter
    fields["config"]["scheme"] = spec.scheme.to_dict()
    if isinstance(spec.config.cycle, tuple):
        fields["config"]["cycle"] = [scheme.to_dict() for scheme in spec.config.cycle]
    return fields


def spec_from_dict(value: Any, where: str) -> AdapterSpec:
    """The inverse of `spec_to_dict`.

    Args:
      value: what JSON has.
      where: its place in the plan, for errors.

    Raises:
      ValueError: naming the key.
    """
    fields = Fields(value, where)
    shape = fields.take("kernel_shape", naturals)
    axes = fields.take("kernel_axes", functools.partial(_axes_from_dict, ndim=len(shape)))
    batch = len(axes.batch)
    spec = AdapterSpec(
        config=_config_from_dict(
            Fields(fields.take("config", fields_of), fields.name_of("config"))
        ),
        kernel_shape=shape,
        kernel_axes=axes,
        adapter_batch_axes=fields.take("adapter_batch_axes", axes_of(batch + 2, batch)),
        kernel_name=fields.take("kernel_name", text),
    )
    fields.end()
    try:
        _ = spec.rows  # a scheme that cannot be on this kernel is an error here
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{where} has no adapter: {error}") from error
    return spec


def _axes_from_dict(value: Any, ndim: int) -> KernelAxes:
    fields = Fields(value, "")
    axes = KernelAxes(
        **{name: fields.take(name, axes_of(ndim)) for name in ("inputs", "outputs", "batch")}
    )
    fields.end()
    if sorted(axes.inputs + axes.outputs + axes.batch) != [*range(ndim)]:
        raise ValueError(f"wanted each of {ndim} axes once")
    return axes


def _config_from_dict(fields: Fields) -> LayerConfig:
    checks = {"placement": text, "dropout": rate, "dtype": text, "size_multiple": natural}
    checks |= dict.fromkeys(("train_kernel", "keep_sums", "dora"), flag)
    # Plans of earlier versions lack the later fields.
    known = {key: fields.take(key, checks[key]) for key in checks if key in fields.left}
    known["rank"] = fields.take("rank", natural)
    known["scheme"] = fields.take("scheme", scheme_from_dict)
    known["cycle"] = fields.take("cycle", _cycle_from_json, "auto")
    fields.end()
    try:
        return LayerConfig(**known)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{fields.where}: {error}") from error


def _cycle_from_json(value: Any) -> Cycle:
    if isinstance(value, list):
        value = tuple(map(scheme_from_dict, value))
    check_cycle(value)
    return value
