"""The paper's equations as pure functions: compress, decompress, and the delta between them.

    h = W0 x + f_decomp(M f_comp(x))        equation (2) of arXiv 2405.12130

Each asks the scheme, which is where it is written (`base.py`).

Shape letters: I input features, O output features, R the square size, N blocks of R features;
`...` any leading axes. The matrix is a JAX kernel, `z @ M`; files of the authors' PyTorch code
hold its transpose.
"""

from __future__ import annotations

import jax
import numpy as np

from mora_jax._arrays.dtypes import widen_for
from mora_jax._schemes.base import Adapter, Scheme


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
      out_features: O; needed where `scheme.wrap` is set, since the number of blocks depends on it.

    Returns:
      [..., R] for `Sharing` and `Truncation`, [..., N, R] for `Rotation` and `Decoupling`; the
      dtype of `x`.

    Raises:
      TypeError: for `LowRank`.
      ValueError: if a scheme that wraps comes without `out_features`.

    >>> import jax.numpy as jnp
    >>> from mora_jax import Sharing
    >>> compress(jnp.arange(5.0), 2, Sharing())  # (0 + 2 + 4, 1 + 3 + the first again)
    Array([6., 4.], dtype=float32)
    """
    return scheme.compress(x, size, out_features=out_features)


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

    >>> import jax.numpy as jnp
    >>> from mora_jax import Sharing
    >>> decompress(jnp.array([1.0, 2.0]), 5, Sharing("stride", "contiguous"))
    Array([1., 1., 1., 2., 2.], dtype=float32)
    """
    return scheme.decompress(z, out_features)


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

    >>> import jax.numpy as jnp
    >>> from mora_jax import Sharing
    >>> delta(jnp.arange(5.0), {"matrix": jnp.eye(2)}, 3, Sharing())
    Array([6., 4., 6.], dtype=float32)
    """
    scheme.check(adapter, x.shape[-1], out_features)
    return scheme.delta(x, adapter, out_features)


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
      [I, O], float32, or float64 of a float64 adapter: a narrower one is widened first, so that
      nothing is rounded or leaves float16's range on the way.

    Raises:
      ValueError: where the adapter's names or shapes are not the scheme's.

    >>> import jax.numpy as jnp
    >>> from mora_jax import Decoupling
    >>> delta_kernel({"matrix": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, 3, 3, Decoupling())
    Array([[1., 2., 3.],
           [3., 4., 0.],
           [0., 0., 1.]], dtype=float32)
    """
    scheme.check(adapter, in_features, out_features)
    return scheme.delta_kernel(widen_for(np.float32, adapter), in_features, out_features)


def check_rank(rank: int) -> int:
    """Returns `rank`, or raises ValueError unless it is a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}.")
    return rank


def check_multiple(multiple: int) -> int:
    """Returns `multiple`, or raises ValueError unless it is a positive integer."""
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"size_multiple must be a positive integer, got {multiple!r}.")
    return multiple


def square_rank(
    in_features: int, out_features: int, rank: int, scheme: Scheme, *, multiple: int = 1
) -> int:
    """The side R of the square matrix with as many entries as LoRA has at `rank`.

    `R = int(sqrt((I + O) rank) + 0.5)`, made even by subtraction for `Rotation`, as in the
    authors' code (the paper rounds down). For `LowRank` it is `rank` itself.

    With a `multiple`, R becomes the nearest one (of those that are even, for `Rotation`): about as
    many entries, in a size that suits the machine. Rounding makes no dead entries: up to a side of
    the layer, or to R where that is longer. Where no multiple is as small, R stays as it is.

    >>> from mora_jax import Rotation, Sharing
    >>> square_rank(4096, 4096, 8, Sharing())
    256
    >>> square_rank(4096, 14336, 8, Rotation())
    384
    >>> square_rank(4096, 1024, 8, Sharing()), square_rank(4096, 1024, 8, Sharing(), multiple=64)
    (202, 192)

    Raises:
      ValueError: where a size, the rank or the multiple is not a positive integer.
    """
    check_rank(rank)
    check_multiple(multiple)
    if in_features < 1 or out_features < 1:
        raise ValueError(f"features must be positive, got {in_features} -> {out_features}.")
    return scheme.size(in_features, out_features, rank, multiple)
