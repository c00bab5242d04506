"""Sharing: features in one group share a row, or a column, of one matrix.

`Groups` is one side of it. Its `sum` and `spread` are each other's transposes, and each has two
spellings of the same numbers:

- on one device, slices and copies of whole blocks, which compilers fuse into a single pass;
- where features may lie on several devices, tables of indices, which each device reads for its own
  features. Blocks that do not divide a shard would have to be sent around. And on TPUs, whose
  compiler writes copies of blocks to memory, in float32, but multiplies by a table fast.

Shape letters: I input features, O output features, F either, R groups, T rows, P parts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from mora_jax._arrays import blockwise as features
from mora_jax._arrays.dtypes import summable, wide_dtype, widen
from mora_jax._arrays.mesh import MeshAxes, feature_axes, may_be_sharded, platform, shards_of
from mora_jax._schemes.base import Adapter, Scheme, Work

Grouping = Literal["stride", "contiguous"]
_GROUPINGS = ("stride", "contiguous")


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
    cycles: ClassVar[tuple[str, ...]] = ("groupings", "shifts", "signs")
    input: Grouping = "stride"
    output: Grouping = "stride"
    shift: int = 0
    signs: int = 0

    def __post_init__(self) -> None:
        for side, grouping in (("input", self.input), ("output", self.output)):
            if grouping not in _GROUPINGS:
                raise ValueError(f"Sharing: {side} must be one of {_GROUPINGS}, got {grouping!r}.")
        for name in ("shift", "signs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"Sharing: {name} must be a non-negative int, got {value!r}.")
            if value and not self._has_strides:
                raise ValueError(
                    f"Sharing: {name}={value} moves whole blocks of R features, so it needs "
                    f"'stride' on both sides, got {self.input!r} and {self.output!r}."
                )

    @property
    def _has_strides(self) -> bool:
        return self.input == self.output == "stride"

    def compress(self, x: jax.Array, size: int, *, out_features: int | None = None) -> jax.Array:
        del out_features
        return self._input_groups(x.shape[-1], size).sum(x)

    def decompress(self, z: jax.Array, out_features: int) -> jax.Array:
        return self._output_groups(out_features, z.shape[-1]).spread(z)

    def compress_transpose(self, z: jax.Array, in_features: int, out_features: int) -> jax.Array:
        del out_features
        return self._input_groups(in_features, z.shape[-1]).spread(z)

    def decompress_transpose(self, dy: jax.Array, size: int, in_features: int) -> jax.Array:
        del in_features
        return self._output_groups(dy.shape[-1], size).sum(dy)

    def blocks(self, in_features: int, out_features: int, size: int) -> tuple[int, ...]:
        del in_features, out_features, size
        return ()

    def gradient_residual(self, x: jax.Array, adapter: Adapter, out_features: int) -> jax.Array:
        """[P, T, R], one part on each of the devices that features are known to be split over."""
        del out_features
        groups = self._input_groups(x.shape[-1], self.size_of(adapter))
        return groups.partial_sums(summable(x))

    def output_gradient_parts(self, dy: jax.Array, size: int, in_features: int) -> jax.Array:
        """[P, T, R], likewise."""
        del in_features
        return self._output_groups(dy.shape[-1], size).partial_sums(dy)

    def work(self, in_features: int, out_features: int, size: int) -> Work:
        del in_features, out_features
        return Work(entries=size * size, table_terms=size)

    def dead_entries(self, in_features: int, out_features: int, size: int) -> int:
        """Strides fill every row, around the end; runs leave rows without a feature."""
        rows = min(size, in_features) if self.input == "contiguous" else size
        return size**2 - min(size, out_features) * rows

    def successor(self, cycle: str, in_features: int, out_features: int, size: int) -> Scheme:
        """The next grouping.

        - `"groupings"`: the authors' types 1, 2, 3, 4. The summed rank stays at or below 2 R.
        - `"shifts"`: `shift` 0, 1, ..., R - 1. About R - 1 a merge, short of full rank by the
          directions that all shifts share.
        - `"signs"`: `signs` 0, 1, ..., n - 1 for n blocks. R a merge, up to full rank.
        - `"auto"`: `"signs"` for strides without a shift, else the scheme itself.
        """
        if cycle == "groupings":
            if self not in GROUPINGS:
                raise ValueError(f"{self} is no element of the cycle {GROUPINGS}.")
            return GROUPINGS[(GROUPINGS.index(self) + 1) % len(GROUPINGS)]
        if cycle == "auto" and (self.shift or not self._has_strides):
            return self
        if not self._has_strides:
            raise ValueError(f"cycle {cycle!r} needs Sharing('stride', 'stride'), got {self}.")
        if cycle == "shifts":
            return dataclasses.replace(self, shift=(self.shift + 1) % size)
        blocks = -(-max(in_features, out_features) // size)
        return dataclasses.replace(self, signs=(self.signs + 1) % blocks)

    def _input_groups(self, in_features: int, size: int) -> Groups:
        axes, _ = feature_axes()
        return Groups(in_features, size, self.input, self.signs, self.shift, True, axes)

    def _output_groups(self, out_features: int, size: int) -> Groups:
        _, axes = feature_axes()
        return Groups(out_features, size, self.output, self.signs, self.shift, False, axes)


#: The authors' cycle: their types 1, 2, 3, 4.
GROUPINGS = (
    Sharing("stride", "stride"),
    Sharing("contiguous", "contiguous"),
    Sharing("contiguous", "stride"),
    Sharing("stride", "contiguous"),
)


@dataclasses.dataclass(frozen=True)
class Groups:
    """One side of `Sharing`.

    Attributes:
      features: F.
      size: R.
      grouping: "stride" (feature j is in group `j mod R`) or "contiguous" (runs of neighbours; the
        first `F mod R` runs are longer by one).
      signs: index of the Walsh function by which blocks of R features are multiplied.
      shift: block b is rolled by `shift * b`.
      circular: whether the last block is filled up by the first features, or is short.
      axes: mesh axes over which the features to sum are split, none where they are whole on every
        device, None where it is not known.

    >>> groups = Groups(features=5, size=2)
    >>> groups.sum(jnp.arange(5)), groups.spread(jnp.arange(2))
    (Array([6, 4], dtype=int32), Array([0, 1, 0, 1, 0], dtype=int32))
    """

    features: int
    size: int
    grouping: Grouping = "stride"
    signs: int = 0
    shift: int = 0
    circular: bool = False
    axes: MeshAxes | None = ()

    def sum(self, x: jax.Array) -> jax.Array:
        """[..., F] -> [..., R], added in float32 or better."""
        if self.axes != () or platform() == "tpu":
            return self._sum_by_table(x)
        return self._sum_runs(x) if self.grouping == "contiguous" else self._sum_strides(x)

    def partial_sums(self, x: jax.Array) -> jax.Array:
        """[..., F] -> [P, ..., R], whose sum over P is `sum(x)`; in the dtype of `x`.

        Where features are split over P devices, each has the sum over its own: nothing is sent.
        Elsewhere P is 1.
        """
        axes = self.axes or ()
        parts, filled = shards_of(axes), -self.features % self.size
        in_shards = (
            axes
            and platform() != "tpu"
            and self.grouping == "stride"
            and not self.shift
            and self.features % parts == 0
            and self.size <= self.features
            and (not self.circular or filled <= self.features // parts)
        )
        if not in_shards:
            return self.sum(x)[None]
        lead = [None] * (x.ndim - 1)
        return jax.shard_map(
            functools.partial(self._sum_of_shard, axes=axes),
            in_specs=PartitionSpec(*lead, axes),
            out_specs=PartitionSpec(axes, *lead, None),
            axis_names=frozenset(axes),
        )(x)

    def _sum_of_shard(self, x: jax.Array, axes: MeshAxes) -> jax.Array:
        """What the features of one device add to every group: [..., F / P] -> [1, ..., R]."""
        start = lax.axis_index(axes) * x.shape[-1]
        signed = x
        if self.signs:
            # Blocks are counted from the first feature of all, not from that of the shard.
            block = (start + lax.broadcasted_iota(np.int32, x.shape, x.ndim - 1)) // self.size
            odd = lax.population_count(block & self.signs) % 2 == 1
            signed = jnp.where(odd, -x, x)
        total = widen(features.add_blocks(signed, self.size))
        total = jnp.roll(total, start % self.size, axis=-1)
        if self.circular and (end := self.features % self.size):
            again = _walsh(self.signs, self.features // self.size) * x[..., : self.size - end]
            total = total.at[..., end:].add(jnp.where(start == 0, widen(again), 0))
        return total.astype(x.dtype)[None]

    def spread(self, z: jax.Array) -> jax.Array:
        """[..., R] -> [..., F]."""
        # In float32, because JAX's transpose of it is a sum.
        wide = widen(z)
        if may_be_sharded() or platform() == "tpu":
            spread = self._spread_by_table(wide)
        elif self.grouping == "contiguous":
            spread = self._repeat_runs(wide)
        else:
            spread = self._tile_strides(wide)
        return spread.astype(z.dtype)

    def _sum_strides(self, x: jax.Array) -> jax.Array:
        total = None
        for index, block in enumerate(features.blocks_of(x, self.size, circular=self.circular)):
            if step := self.shift * index % self.size:
                block = jnp.roll(block, step, axis=-1)
            term = widen(block)
            if total is None:
                total = term
            else:
                total = total - term if _walsh(self.signs, index) < 0 else total + term
        assert total is not None
        return total.astype(x.dtype)

    def _tile_strides(self, z: jax.Array) -> jax.Array:
        count = -(-self.features // self.size)
        # Rolls by a step that grows: the rows of a tiling that is cut a step later each time.
        step = self.shift % self.size
        tiled = features.tile(z, count * (self.size + step))
        if step:
            rows = tiled.reshape(*z.shape[:-1], count, self.size + step)
            tiled = rows[..., : self.size].reshape(*z.shape[:-1], count * self.size)
        if self.signs:
            table = np.repeat([_walsh(self.signs, index) for index in range(count)], self.size)
            tiled = tiled * features.expand(table, tiled)
        return features.fold(tiled, self.features) if self.circular else tiled[..., : self.features]

    def _sum_runs(self, x: jax.Array) -> jax.Array:
        length, longer = divmod(self.features, self.size)
        cut, lead = longer * (length + 1), x.shape[:-1]
        long_runs = x[..., :cut].reshape(*lead, longer, length + 1).sum(-1)
        short_runs = x[..., cut:].reshape(*lead, self.size - longer, length).sum(-1)
        return jnp.concatenate([long_runs, short_runs], axis=-1)

    def _repeat_runs(self, z: jax.Array) -> jax.Array:
        length, longer = divmod(self.features, self.size)
        long_runs = jnp.repeat(z[..., :longer], length + 1, axis=-1)
        short_runs = jnp.repeat(z[..., longer:], length, axis=-1)
        return jnp.concatenate([long_runs, short_runs], axis=-1)

    def tables(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs of the group and the weight (1, -1 or 0) of each feature: [F] int, [F] int.

        More than one pair where the last block is filled up: those features act twice.
        """
        feature = np.arange(self.features)
        if self.grouping == "contiguous":
            length, longer = divmod(self.features, self.size)
            lengths = np.full(self.size, length) + (np.arange(self.size) < longer)
            return [(np.repeat(np.arange(self.size), lengths), np.ones_like(feature))]
        end = -(-self.features // self.size) * self.size
        pairs = []
        for start in range(0, end if self.circular else 1, self.features):
            place = feature + start
            block = place // self.size
            sign = np.asarray([_walsh(self.signs, int(b)) for b in block])
            group = (place + self.shift * block) % self.size
            pairs.append((group, np.where(place < end, sign, 0)))
        return pairs

    def _one_hot(self, dtype: Any) -> jax.Array:
        """[F, R], made from counting where it is used: each device makes its own rows."""
        column = lax.broadcasted_iota(np.int32, (self.features, self.size), 1)
        terms = [
            jnp.where(column == group[:, None], jnp.asarray(weight[:, None], dtype), 0)
            for group, weight in self.tables()
        ]
        return sum(terms[1:], terms[0])

    def _sum_by_table(self, x: jax.Array) -> jax.Array:
        return _exact_product(x, self._one_hot(x.dtype))

    def _spread_by_table(self, z: jax.Array) -> jax.Array:
        def look_up(z: jax.Array) -> jax.Array:
            terms = [
                jnp.take(z, group, axis=-1, mode="clip") * features.expand(weight, z)
                for group, weight in self.tables()
            ]
            return sum(terms[1:], terms[0])

        def multiply(z: jax.Array) -> jax.Array:
            return _exact_product(z, self._one_hot(z.dtype).T)

        # TPUs look up slowly, and multiply fast.
        return lax.platform_dependent(z, tpu=multiply, default=look_up)


def _exact_product(x: jax.Array, one_hot: jax.Array) -> jax.Array:
    """`x @ one_hot` in the dtype of `x`, no number of which is rounded on the way."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.matmul(
        x,
        one_hot,
        precision=lax.Precision.HIGHEST if x.dtype.itemsize > 2 else None,
        preferred_element_type=wide_dtype(x.dtype) if floating else None,
    ).astype(x.dtype)


def _walsh(signs: int, block: int) -> int:
    """The Walsh function of index `signs` at `block`: 1 or -1."""
    return (-1) ** (signs & block).bit_count()
