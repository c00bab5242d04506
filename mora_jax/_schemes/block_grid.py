"""A grid of blocks: products of inputs and outputs that are cut into blocks of R features.

Shape letters: I input features, O output features, R features a block, N blocks, T rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from mora_jax._arrays import blockwise as features
from mora_jax._arrays.dtypes import summable, wide_dtype
from mora_jax._arrays.mesh import MeshAxes, feature_axes, may_be_sharded, platform, shards_of


@dataclasses.dataclass(frozen=True)
class BlockGrid:
    """Which block of the inputs meets which block of the outputs.

    Blocks stand in squares of `side` blocks. Within a square, input block a meets output block a.
    A scheme that wraps, on a layer that is wider than high has several squares side by side
    (`columns`), on one that is higher than wide one below the other (`rows`). N is
    `rows * columns * side`, counted square by square; what lies outside the layer is zero.
    """

    in_features: int
    out_features: int
    size: int
    wrap: bool

    @property
    def input_blocks(self) -> int:
        """Blocks that the inputs fill, the last one around the end."""
        return -(-self.in_features // self.size)

    @property
    def side(self) -> int:
        """Blocks along a side of a square."""
        return min(self.input_blocks, -(-self.out_features // self.size))

    @property
    def rows(self) -> int:
        """Squares one below the other."""
        return -(-self.input_blocks // self.side) if self.wrap else 1

    @property
    def columns(self) -> int:
        """Squares side by side."""
        return -(-self.out_features // (self.side * self.size)) if self.wrap else 1

    @property
    def count(self) -> int:
        """N."""
        return self.rows * self.columns * self.side

    def read(self, x: jax.Array) -> jax.Array:
        """The inputs in blocks: [..., I] -> [..., rows, side, R]."""
        x = features.resize(x, self.input_blocks * self.size, circular=True)
        x = features.resize(x, self.rows * self.side * self.size, circular=False)
        return x.reshape(*x.shape[:-1], self.rows, self.side, self.size)

    def write(self, y: jax.Array) -> jax.Array:
        """The outputs out of blocks: [..., columns, side, R] -> [..., O].

        Where the blocks are fewer than the outputs, they are repeated.
        """
        width = self.columns * self.side * self.size
        return features.tile(y.reshape(*y.shape[:-3], width), self.out_features)

    def write_transpose(self, dy: jax.Array) -> jax.Array:
        """[..., O] -> [..., columns, side, R]."""
        dy = features.add_blocks(dy, self.columns * self.side * self.size)
        return dy.reshape(*dy.shape[:-1], self.columns, self.side, self.size)

    def kernel(self, matrices: jax.Array) -> jax.Array:
        """[N, R, R] -> [I, O], each matrix in its place."""
        # Made before the pass, not in it: a matrix of each block is small, the padded one is not.
        matrices = lax.optimization_barrier(matrices)
        if not may_be_sharded():
            return self._place(matrices)
        # TPUs look up far too slowly; what placing costs them is communication.
        return lax.platform_dependent(matrices, tpu=self._place, default=self._look_up)

    def _place(self, matrices: jax.Array) -> jax.Array:
        # Padding and reshaping alone put them there: compilers fuse that into whatever pass over
        # a kernel follows, and read a matrix only where there is one. A row of width + R entries,
        # R of them filled, moves by R each time it is cut at `width`.
        width = self.side * self.size
        squares = matrices.reshape(-1, self.side, self.size, self.size)
        squares = jnp.pad(squares, ((0, 0), (0, 0), (0, 0), (0, width - self.size)))
        squares = squares.reshape(-1, self.side, self.size * width)
        squares = jnp.pad(squares, ((0, 0), (0, 0), (0, self.size))).reshape(squares.shape[0], -1)
        squares = squares[:, : width * width].reshape(self.rows, self.columns, width, width)
        kernel = squares.swapaxes(1, 2).reshape(self.rows * width, self.columns * width)
        kernel = features.tile(kernel, self.out_features)
        filled = self.input_blocks * self.size
        kernel = features.resize(kernel, filled, circular=False, axis=0)
        return features.fold(kernel, self.in_features, axis=0)

    def _look_up(self, matrices: jax.Array) -> jax.Array:
        # Each entry by its index, so that every device makes its own part of the kernel.
        width = self.side * self.size
        column = np.arange(self.out_features)[None] % (self.columns * width)
        total = jnp.zeros((), matrices.dtype)
        for start in range(0, filled := self.input_blocks * self.size, self.in_features):
            row = np.arange(self.in_features) + start
            live = row < min(filled, self.rows * width)
            row = np.where(live, row, 0)
            here = (row % width // self.size)[:, None] == jnp.asarray(column % width // self.size)
            here &= live[:, None]
            square = (row // width * self.columns)[:, None] + jnp.asarray(column // width)
            block = square * self.side + (row % width // self.size)[:, None]
            index = (jnp.where(here, block, 0), (row % self.size)[:, None], column % self.size)
            entry = matrices.at[index].get(mode="promise_in_bounds")
            total = total + jnp.where(here, entry, 0)
        return total

    def product(self, x: jax.Array, matrices: jax.Array) -> jax.Array:
        """`x @ kernel(matrices)` block by block, in the dtype of `x`: [T, I] -> [T, O]."""
        matrices = matrices.reshape(self.rows, self.columns, self.side, self.size, self.size)
        blocks, matrices = self.read(x), matrices.astype(x.dtype)
        return self.write(jnp.einsum("tiar,ijars->tjas", blocks, matrices))

    def product_transpose(self, dy: jax.Array, matrices: jax.Array) -> jax.Array:
        """[T, O] -> [T, I]: the transpose of `x -> product(x, matrices)`."""
        matrices = matrices.reshape(self.rows, self.columns, self.side, self.size, self.size)
        blocks = self.write_transpose(dy)
        x = jnp.einsum("tjas,ijars->tiar", blocks, matrices.astype(dy.dtype))
        x = x.reshape(dy.shape[0], self.rows * self.side * self.size)
        x = features.resize(x, self.input_blocks * self.size, circular=False)
        return features.fold(x, self.in_features)

    def gradient(self, x: jax.Array, dy: jax.Array) -> jax.Array:
        """Gradient of `sum(dy * product(x, matrices))` by the matrices: [P, N, R, R], not rounded.

        Where the features of one side are known to be split over P devices, each has the part that
        its own features make, and the gradient is their sum; elsewhere P is 1.
        """
        x = summable(x)
        dy = summable(dy).astype(x.dtype)
        inputs, outputs = feature_axes()
        if inputs and not outputs and self._fits_shards(self.in_features, inputs):
            filled = self.input_blocks * self.size - self.in_features
            blocks = self.write_transpose(dy)
            total = self._gradient_of_shards(x, blocks, inputs, self.rows, filled)
            total = total.reshape(-1, self.rows, self.side, self.columns, self.size, self.size)
            total = total.transpose(0, 1, 3, 2, 4, 5)
        elif outputs and not inputs and self._fits_shards(self.out_features, outputs):
            total = self._gradient_of_shards(dy, self.read(x), outputs, self.columns, None)
            total = total.reshape(-1, self.columns, self.side, self.rows, self.size, self.size)
            total = total.transpose(0, 3, 1, 2, 5, 4)
        else:
            wide = wide_dtype(x.dtype)
            blocks = self.read(x), self.write_transpose(dy)
            total = jnp.einsum("tiar,tjas->ijars", *blocks, preferred_element_type=wide)
        return total.reshape(-1, self.count, self.size, self.size)

    def _fits_shards(self, width: int, axes: MeshAxes) -> bool:
        parts = shards_of(axes)
        return width % parts == 0 and self.size <= width // parts and platform() != "tpu"

    def _gradient_of_shards(
        self, split: jax.Array, whole: jax.Array, axes: MeshAxes, squares: int, filled: int | None
    ) -> jax.Array:
        """[P, squares * side, M, R, R] of [T, F] split over P devices, and of [T, M, side, R].

        Squares of blocks along the split side. Blocks do not fill a shard: each device moves its
        features to where its first block begins, and takes the blocks of the other side that these
        meet. `filled`: how many features at the start fill the last block of inputs once more; None
        for outputs.
        """
        size, total = self.size, squares * self.side

        def local(split: jax.Array, whole: jax.Array) -> jax.Array:
            width = split.shape[-1]
            start = lax.axis_index(axes) * width
            count = -(-(width + size - 1) // size)
            room = jnp.zeros((len(split), count * size), split.dtype)
            blocks = lax.dynamic_update_slice_in_dim(room, split, start % size, 1)
            ids = start // size + jnp.arange(count)
            if filled is None:
                ids = ids % total  # outputs beyond the last block repeat the first ones
            elif filled:
                again = jnp.where(start == 0, split[:, :filled], 0)
                blocks = jnp.concatenate([blocks, jnp.pad(again, ((0, 0), (size - filled, 0)))], 1)
                ids = jnp.append(ids, self.input_blocks - 1)
            blocks = blocks.reshape(len(split), -1, size)
            met = jnp.take(whole, ids % self.side, axis=2, mode="clip")
            wide = wide_dtype(split.dtype)
            part = jnp.einsum("tkr,tmks->kmrs", blocks, met, preferred_element_type=wide)
            return jnp.zeros((total, *part.shape[1:]), wide).at[ids].add(part, mode="drop")[None]

        return jax.shard_map(
            local,
            in_specs=(PartitionSpec(None, axes), PartitionSpec()),
            out_specs=PartitionSpec(axes),
            axis_names=frozenset(axes),
        )(split, whole)
