"""The paper's equations as pure functions: compress, decompress, and the delta between them.

    h = W0 x + f_decomp(M f_comp(x))        equation (2) of arXiv 2405.12130

`compress` is f_comp and `decompress` is f_decomp: fixed linear maps. They define a scheme; the
delta, its kernel and the gradient of the matrix follow from them, written out where that is faster
and held to them by the tests, so that forward pass, merge and training agree.

Shape letters: I input features, O output features, R the square size, N blocks of R features;
`...` any leading axes. The matrix is a JAX kernel, `z @ M`; files of the authors' PyTorch code
hold its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._arrays import blockwise as features
from mora_jax._arrays.mesh import feature_axes
from mora_jax._schemes.base import (
    Decoupling,
    LowRank,
    Rotation,
    Scheme,
    Sharing,
    Truncation,
    adapter_shapes,
)
from mora_jax._schemes.block_grid import BlockGrid, block_matrices, block_matrices_transpose
from mora_jax._schemes.groups import Groups

Adapter = Mapping[str, jax.Array]


def compress(
    x: jax.Array, size: int, scheme: Scheme, *, out_features: int | None = None
) -> jax.Array:
    """f_comp: brings the features of `x` to the square size.

    Features that do not fill the last block are followed by the first ones, around the end, as in
    the authors' code.

    Args:
      x: [..., I], floating.
      size: R.
      scheme: any but `LowRank`, whose compression is learned.
      out_features: O; needed where `scheme.cycle` is set, since the number of blocks depends on it.

    Returns:
      [..., R] for `Sharing` and `Truncation`, [..., N, R] for `Rotation` and `Decoupling`; the
      dtype of `x`.

    Raises:
      TypeError: for `LowRank`.
      ValueError: for a cycled scheme without `out_features`.

    >>> compress(jnp.arange(5.0), 2, Sharing())  # (0 + 2 + 4, 1 + 3 + the first again)
    Array([6., 4.], dtype=float32)
    """
    match scheme:
        case Sharing():
            return _input_groups(x.shape[-1], size, scheme).sum(x)
        case Truncation():
            return features.resize(x, size, circular=False)
        case Rotation() | Decoupling():
            count = -(-x.shape[-1] // size)
            if scheme.cycle:
                if out_features is None:
                    raise ValueError(f"{scheme} needs out_features to know its number of blocks.")
                # Whole blocks first, so that the further ones repeat them and not the features.
                x = features.resize(x, count * size, circular=True)
                count = max(count, -(-out_features // size))
            blocks = features.split_blocks(x, size, count)
            return features.rotate(blocks) if isinstance(scheme, Rotation) else blocks
    raise TypeError(f"{scheme} has no fixed compression; use `delta`.")


def decompress(z: jax.Array, out_features: int, scheme: Scheme) -> jax.Array:
    """f_decomp: brings the square size back to the features of the output.

    Args:
      z: [..., R] or [..., N, R], as `compress` gives it.
      out_features: O.
      scheme: any but `LowRank`.

    Returns:
      [..., O], the dtype of `z`.

    Raises:
      TypeError: for `LowRank`.

    >>> decompress(jnp.array([1.0, 2.0]), 5, Sharing("stride", "contiguous"))
    Array([1., 1., 1., 2., 2.], dtype=float32)
    """
    size = z.shape[-1]
    match scheme:
        case Sharing():
            return _output_groups(out_features, size, scheme).spread(z)
        case Truncation():
            return features.resize(z, out_features, circular=False)
        case Rotation(cycle=True) | Decoupling(cycle=True):
            count = -(-out_features // size)
            return features.merge_blocks(features.fold_blocks(z, count), out_features)
        case Rotation() | Decoupling():
            return features.merge_blocks(z, out_features)
    raise TypeError(f"{scheme} has no fixed decompression; use `delta`.")


def compress_transpose(z: jax.Array, in_features: int, scheme: Scheme) -> jax.Array:
    """The transpose of `compress` for schemes without blocks: [..., R] -> [..., I]."""
    match scheme:
        case Sharing():
            return _input_groups(in_features, z.shape[-1], scheme).spread(z)
        case Truncation():
            return features.resize(z, in_features, circular=False)
    raise TypeError(f"{scheme} has no compression to a single block.")


def decompress_transpose(y: jax.Array, size: int, scheme: Scheme) -> jax.Array:
    """The transpose of `decompress` for schemes without blocks: [..., O] -> [..., R]."""
    match scheme:
        case Sharing():
            return _output_groups(y.shape[-1], size, scheme).sum(y)
        case Truncation():
            return features.resize(y, size, circular=False)
    raise TypeError(f"{scheme} has no decompression from a single block.")


def delta(x: jax.Array, adapter: Adapter, out_features: int, scheme: Scheme) -> jax.Array:
    """What the adapter adds to the layer's output: `f_decomp(M f_comp(x))`, equation (2).

    Equivalent to the authors' `_apply_mora` (without the base layer), and for `LowRank` to the
    LoRA branch of PEFT.

    Args:
      x: [..., I], floating.
      adapter: `{"matrix": [R, R]}`, or `{"a": [I, rank], "b": [rank, O]}` for `LowRank`.
      out_features: O.
      scheme: the scheme.

    Returns:
      [..., O], the dtype of `x`; products are accumulated in float32 or better.

    Raises:
      ValueError: where the adapter's names or shapes are not the scheme's.

    >>> delta(jnp.arange(5.0), {"matrix": jnp.eye(2)}, 3, Sharing())
    Array([6., 4., 6.], dtype=float32)
    """
    in_features, rows = x.shape[-1], math.prod(x.shape[:-1])
    check_adapter(adapter, in_features, out_features, scheme)
    if isinstance(scheme, LowRank):
        wide = features.summable(x)
        hidden = (lora_scale(adapter, scheme) * _product(wide, adapter["a"])).astype(wide.dtype)
        return (hidden @ adapter["b"].astype(wide.dtype)).astype(x.dtype)
    matrix = adapter["matrix"]
    size = matrix.shape[0]
    many = not isinstance(rows, int) or rows > size  # rows of a function to export are a symbol
    if isinstance(scheme, Rotation | Decoupling) and many:
        # One matrix a block is then less than the blocks of all rows.
        grid = BlockGrid(in_features, out_features, size, scheme.cycle)
        matrices = block_matrices(matrix, grid.count, scheme)
        y = grid.product(features.summable(x).reshape(rows, -1), matrices)
        return y.reshape(*x.shape[:-1], out_features).astype(x.dtype)
    z = compress(features.summable(x), size, scheme, out_features=out_features)
    z = _product(z, matrix).astype(z.dtype)
    return decompress(z, out_features, scheme).astype(x.dtype)


def delta_kernel(
    adapter: Adapter, in_features: int, out_features: int, scheme: Scheme
) -> jax.Array:
    """The kernel of the delta: `x @ delta_kernel == delta(x)`, equation (3).

    It is `delta` of the identity, `C^T M D` for the linear maps C of `compress` and D of
    `decompress`. But for `LowRank` no product is made: entries of M are put in their places.

    Args:
      adapter: as for `delta`.
      in_features: I.
      out_features: O.
      scheme: the scheme.

    Returns:
      [I, O], the adapter's dtype.

    Raises:
      ValueError: where the adapter's names or shapes are not the scheme's.

    >>> delta_kernel({"matrix": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, 3, 3, Decoupling())
    Array([[1., 2., 3.],
           [3., 4., 0.],
           [0., 0., 1.]], dtype=float32)
    """
    check_adapter(adapter, in_features, out_features, scheme)
    if isinstance(scheme, LowRank):
        return lora_scale(adapter, scheme) * (adapter["a"] @ adapter["b"])
    matrix = adapter["matrix"]
    size = matrix.shape[0]
    if isinstance(scheme, Rotation | Decoupling):
        grid = BlockGrid(in_features, out_features, size, scheme.cycle)
        return grid.kernel(block_matrices(matrix, grid.count, scheme))
    rows = compress_transpose(matrix.T, in_features, scheme).T
    return decompress(rows, out_features, scheme)


def to_compressed(x: jax.Array, adapter: Adapter, scheme: Scheme) -> jax.Array:
    """All of `x` that the adapter's gradient needs: [P, T, R] where one block is, else `x` itself.

    P parts that add up to `compress(x)`, one on each of the devices that the features of `x` are
    known to be split over.
    """
    if not isinstance(scheme, Sharing | Truncation):
        return x
    size = adapter["matrix"].shape[0]
    if isinstance(scheme, Truncation):
        return compress(features.summable(x), size, scheme)[None]
    return _input_groups(x.shape[-1], size, scheme).partial_sums(features.summable(x))


def adapter_gradient(
    z: jax.Array, dy: jax.Array, adapter: Adapter, in_features: int, scheme: Scheme
) -> dict[str, jax.Array]:
    """Gradient of `sum(dy * delta)` by the adapter: the linear transpose of `M -> delta(x, M)`.

    `dM = f_comp(x)^T D^T(dy)` with D^T the transpose of `decompress`: no product is larger than
    the adapter's own, no `[I, O]` gradient is ever formed.

    Args:
      z: `to_compressed(x)`: [P, T, R], or [T, I].
      dy: [T, O].
      adapter: as for `delta`.
      in_features: I.
      scheme: the scheme.

    Returns:
      A dict like `adapter`, in its dtypes, accumulated in float32 or better.
    """
    if isinstance(scheme, LowRank):
        scale, z, dy = lora_scale(adapter, scheme), features.summable(z), features.summable(dy)
        hidden, dhidden = _product(z, adapter["a"]), _product(dy, adapter["b"].T)
        hidden, dhidden = (scale * hidden).astype(dy.dtype), (scale * dhidden).astype(z.dtype)
        gradient = {"a": _product(z.T, dhidden), "b": _product(hidden.T, dy)}
    elif isinstance(scheme, Rotation | Decoupling):
        size = adapter["matrix"].shape[0]
        grid = BlockGrid(in_features, dy.shape[-1], size, scheme.cycle)
        gradient = {"matrix": block_matrices_transpose(grid.gradient(z, dy), scheme)}
    else:
        dz = _parts_of_output_gradient(features.summable(dy), z.shape[-1], scheme)
        # Parts and rows are contracted at once, so that one sum over devices does for both: what is
        # sent has the size of the matrix, not of the activations. Of two that have parts, one sums.
        z = z.sum(0, keepdims=True) if len(z) > 1 and len(dz) > 1 else z
        parts = max(len(z), len(dz))
        z, dz = (jnp.broadcast_to(part, (parts, *part.shape[1:])) for part in (z, dz))
        wide = features.wide_dtype(z.dtype)
        dot = jax.lax.dot_general
        dims = (((0, 1), (0, 1)), ((), ()))
        gradient = {"matrix": dot(z, dz.astype(z.dtype), dims, preferred_element_type=wide)}
    return {name: value.astype(adapter[name].dtype) for name, value in gradient.items()}


def delta_transpose(dy: jax.Array, adapter: Adapter, in_features: int, scheme: Scheme) -> jax.Array:
    """What the adapter adds to the inputs' gradient: the linear transpose of `x -> delta(x)`.

    Args:
      dy: [T, O].
      adapter: as for `delta`.
      in_features: I.
      scheme: the scheme.

    Returns:
      [T, I], the dtype of `dy`.
    """
    if isinstance(scheme, LowRank):
        wide = features.summable(dy)
        hidden = (lora_scale(adapter, scheme) * _product(wide, adapter["b"].T)).astype(wide.dtype)
        return (hidden @ adapter["a"].T.astype(wide.dtype)).astype(dy.dtype)
    matrix = adapter["matrix"]
    if isinstance(scheme, Rotation | Decoupling):
        grid = BlockGrid(in_features, dy.shape[-1], matrix.shape[0], scheme.cycle)
        matrices = block_matrices(matrix, grid.count, scheme)
        wide = features.summable(dy)
        return grid.product_transpose(wide, matrices).astype(dy.dtype)
    dz = decompress_transpose(features.summable(dy), matrix.shape[0], scheme)
    dz = _product(dz, matrix.T).astype(dz.dtype)
    return compress_transpose(dz, in_features, scheme).astype(dy.dtype)


def check_adapter(
    adapter: Mapping[str, Any], in_features: int, out_features: int, scheme: Scheme
) -> None:
    """Raises ValueError unless the adapter has the names and shapes of its scheme."""
    got = {name: tuple(value.shape) for name, value in adapter.items()}
    if isinstance(scheme, LowRank):
        rank = got.get("a", (0, 0))[-1]
        wanted = adapter_shapes(in_features, out_features, max(rank, 1), scheme)
    else:
        # Any square size is a legal matrix; the plan says which one the rank asks for.
        size = got.get("matrix", (0,))[0]
        wanted = {"matrix": (size, size)}
        if isinstance(scheme, Rotation) and size % 2:
            raise ValueError(f"{scheme} pairs features, so its matrix must be even, got {got}.")
    if got != wanted:
        raise ValueError(
            f"adapter of {scheme} on {in_features} -> {out_features} features must have shapes "
            f"{wanted}, got {got}."
        )


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in a's dtype, accumulated and returned in at least float32."""
    wide = features.wide_dtype(a.dtype)
    return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=wide)


def lora_scale(adapter: Adapter, scheme: LowRank) -> float:
    """What LoRA multiplies its product by: alpha over the rank."""
    return 1.0 if scheme.alpha is None else scheme.alpha / adapter["a"].shape[-1]


def _parts_of_output_gradient(dy: jax.Array, size: int, scheme: Scheme) -> jax.Array:
    """[T, O] -> [P, T, R], which add up to `decompress_transpose(dy)`."""
    if isinstance(scheme, Sharing):
        return _output_groups(dy.shape[-1], size, scheme).partial_sums(dy)
    return decompress_transpose(dy, size, scheme)[None]


def _input_groups(in_features: int, size: int, scheme: Sharing) -> Groups:
    axes, _ = feature_axes()
    return Groups(in_features, size, scheme.input, scheme.signs, scheme.shift, True, axes)


def _output_groups(out_features: int, size: int, scheme: Sharing) -> Groups:
    _, axes = feature_axes()
    return Groups(out_features, size, scheme.output, scheme.signs, scheme.shift, False, axes)
