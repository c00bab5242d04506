"""The block schemes: R features at a time through one matrix, rotated or not.

`Decoupling` and `Rotation` cut the inputs and the outputs into blocks of R features and send block
i to block i. Rotating the inputs of block i is rotating the rows of its matrix, `(x R_i) M =
x (R_i M)`, so both schemes are a product with N matrices, one a block (`BlockGrid`). N matrices of
R x R entries are far less than the inputs of a training step.

Shape letters: I input features, O output features, R features a block, N blocks, T rows, P parts.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._arrays import blockwise as features
from mora_jax._arrays.dtypes import summable, wide_dtype, widen
from mora_jax._compat.renamed import renamed_argument
from mora_jax._schemes.base import Adapter, Scheme, Work
from mora_jax._schemes.block_grid import BlockGrid


@dataclasses.dataclass(frozen=True, repr=False)
class BlockScheme(Scheme, abc.ABC):
    """What the two have in common: each block has a matrix that is made of the one.

    Args:
      wrap: see `Rotation`.
    """

    renamed_fields: ClassVar[Mapping[str, str]] = {"cycle": "wrap"}
    wrap: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.wrap, bool):
            raise ValueError(f"{type(self).__name__}: wrap must be a bool, got {self.wrap!r}.")

    @abc.abstractmethod
    def block_matrices(self, matrix: jax.Array, count: int) -> jax.Array:
        """The matrix of each block: [R, R] -> [N, R, R]."""

    @abc.abstractmethod
    def block_matrices_transpose(self, gradients: jax.Array) -> jax.Array:
        """[P, N, R, R] -> [R, R]; the sum over P is the last one, and the smallest."""

    def compress(self, x: jax.Array, size: int, *, out_features: int | None = None) -> jax.Array:
        """[..., I] -> [..., N, R]."""
        count = -(-x.shape[-1] // size)
        if self.wrap:
            if out_features is None:
                raise ValueError(f"{self} needs out_features to know its number of blocks.")
            # Whole blocks first, so that the further ones repeat them and not the features.
            x = features.resize(x, count * size, circular=True)
            count = max(count, -(-out_features // size))
        return features.split_blocks(x, size, count)

    def decompress(self, z: jax.Array, out_features: int) -> jax.Array:
        """[..., N, R] -> [..., O]."""
        if self.wrap:
            z = features.fold_blocks(z, -(-out_features // z.shape[-1]))
        return features.merge_blocks(z, out_features)

    def delta(self, x: jax.Array, adapter: Adapter, out_features: int) -> jax.Array:
        rows, matrix = math.prod(x.shape[:-1]), adapter["matrix"]
        # Rows of a function to export are a symbol.
        if isinstance(rows, int) and rows <= matrix.shape[0]:
            return super().delta(x, adapter, out_features)
        # One matrix a block is less than the blocks of all rows.
        grid = self._grid(x.shape[-1], out_features, matrix.shape[0])
        matrices = self.block_matrices(matrix, grid.count)
        y = grid.product(summable(x).reshape(rows, -1), matrices)
        return y.reshape(*x.shape[:-1], out_features).astype(x.dtype)

    def delta_kernel(self, adapter: Adapter, in_features: int, out_features: int) -> jax.Array:
        matrix = adapter["matrix"]
        grid = self._grid(in_features, out_features, matrix.shape[0])
        return grid.kernel(self.block_matrices(matrix, grid.count))

    def delta_transpose(self, dy: jax.Array, adapter: Adapter, in_features: int) -> jax.Array:
        matrix = adapter["matrix"]
        grid = self._grid(in_features, dy.shape[-1], matrix.shape[0])
        matrices = self.block_matrices(matrix, grid.count)
        return grid.product_transpose(summable(dy), matrices).astype(dy.dtype)

    def gradient_residual(self, x: jax.Array, adapter: Adapter, out_features: int) -> jax.Array:
        """`x` itself, which is no larger than its blocks."""
        del adapter, out_features
        return x

    def gradient(
        self, z: jax.Array, dy: jax.Array, adapter: Adapter, in_features: int
    ) -> dict[str, jax.Array]:
        matrix = adapter["matrix"]
        grid = self._grid(in_features, dy.shape[-1], matrix.shape[0])
        gradient = self.block_matrices_transpose(grid.gradient(z, dy))
        return {"matrix": gradient.astype(matrix.dtype)}

    def work(self, in_features: int, out_features: int, size: int) -> Work:
        grid = self._grid(in_features, out_features, size)
        entries = grid.count * size * size
        # A matrix for each block is written and read, in float32; the blocks of the result are
        # moved before they are added.
        return Work(entries, kernel_moves=4 * entries, row_moves=2 * grid.side * size)

    def dead_entries(self, in_features: int, out_features: int, size: int) -> int:
        """Columns beyond the outputs; the first features fill every row, around the end."""
        del in_features
        return size**2 - min(size, out_features) * size

    def _grid(self, in_features: int, out_features: int, size: int) -> BlockGrid:
        return BlockGrid(in_features, out_features, size, self.wrap)


@renamed_argument("cycle", "wrap")
@dataclasses.dataclass(frozen=True, repr=False)
class Rotation(BlockScheme):
    """Blocks of R features share the matrix, block i rotated by the angles `i theta_j`: (9)-(11).

    Type 6 of the authors' code, which writes as many output blocks as there are input blocks and
    then cuts or tiles them to O. On a rectangular layer some inputs are then never updated, or
    some outputs are copies.

    Args:
      wrap: mends it: with `n = max(n_in, n_out)` blocks, block i reads input block `i mod n_in`,
        writes output block `i mod n_out`, and they sum where they meet.
    """

    kind: ClassVar[str] = "rotation"
    # It pairs feature j with j + R/2.
    size_step: ClassVar[int] = 2

    def compress(self, x: jax.Array, size: int, *, out_features: int | None = None) -> jax.Array:
        return rotate(super().compress(x, size, out_features=out_features))

    def block_matrices(self, matrix: jax.Array, count: int) -> jax.Array:
        return rotate_rows(matrix, count)

    def block_matrices_transpose(self, gradients: jax.Array) -> jax.Array:
        return jax.vmap(rotate_rows_transpose)(gradients).sum(0)


@renamed_argument("cycle", "wrap")
@dataclasses.dataclass(frozen=True, repr=False)
class Decoupling(BlockScheme):
    """Blocks of R features share the matrix, unrotated: equation (8).

    Args:
      wrap: see `Rotation`.
    """

    kind: ClassVar[str] = "decoupling"

    def block_matrices(self, matrix: jax.Array, count: int) -> jax.Array:
        return jnp.broadcast_to(matrix, (count, *matrix.shape))

    def block_matrices_transpose(self, gradients: jax.Array) -> jax.Array:
        return gradients.sum(1).sum(0)


def rotate(blocks: jax.Array) -> jax.Array:
    """Rotates block i of [..., N, R] by the angles `i theta_j`, equations (9) to (11).

    Feature j is paired with j + R/2 (the paper pairs neighbours), `theta_j = 10000^(-2 j / R)`,
    and block 0 stays as it is. Angles are computed in float64 and applied in at least float32.
    """
    tables = _rotation(*blocks.shape[-2:])
    first, second = jnp.split(blocks.astype(wide_dtype(blocks.dtype)), 2, axis=-1)
    cos, sin = (features.expand(table, first) for table in tables)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(blocks.dtype)


def rotate_rows(matrix: jax.Array, count: int) -> jax.Array:
    """[R, C] -> [N, R, C]: the matrices for which `rotate(x)[i] @ matrix == x[i] @ rows[i]`."""
    size = matrix.shape[0]
    tables = _rotation(count, size)
    first, second = (half.astype(wide_dtype(matrix.dtype))[None] for half in jnp.split(matrix, 2))
    cos, sin = (features.expand(table[..., None], first) for table in tables)
    rotated = [first * cos + second * sin, second * cos - first * sin]
    return jnp.concatenate(rotated, axis=1).astype(matrix.dtype)


def rotate_rows_transpose(rows: jax.Array) -> jax.Array:
    """[N, R, C] -> [R, C]: the transpose of `rotate_rows`.

    Written on whole rows, not on halves: tables of the same shape as there would be shared with the
    forward's by the compiler, and then have a layout that suits only one of the two.
    """
    cos, sin = _rotation(*rows.shape[:2])
    cos, sin = np.concatenate([cos, cos], axis=1), np.concatenate([-sin, sin], axis=1)
    wide = widen(rows)
    turned = jnp.roll(wide, rows.shape[1] // 2, axis=1)
    cos, sin = (features.expand(table[..., None], wide) for table in (cos, sin))
    return (wide * cos + turned * sin).sum(0).astype(rows.dtype)


def _rotation(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of `i theta_j`: [N, R/2] each."""
    if size % 2:
        raise ValueError(f"a rotation pairs features, so its size must be even, got {size}.")
    theta = 10000.0 ** (-2.0 * np.arange(size // 2) / size)
    angles = np.arange(count)[:, None] * theta
    return np.cos(angles), np.sin(angles)
