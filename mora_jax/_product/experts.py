"""The delta of experts whose rows stand group after group, as `jax.lax.ragged_dot` has them.

Shape letters: T rows, G groups (experts), I input features, O output features, R the square size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax._arrays.dtypes import summable
from mora_jax._schemes.base import LowRank, Scheme
from mora_jax._schemes.operators import Adapter, compress, decompress, lora_scale


def ragged_delta(
    x: jax.Array, adapter: Adapter, group_sizes: jax.Array, out_features: int, scheme: Scheme
) -> jax.Array:
    """`delta` with a matrix for each group of rows.

    Compression and decompression are the same for all experts, so one ragged product is all there
    is between them. No gradient of a kernel is formed.

    Args:
      x: [T, I], the rows of group 0 first.
      adapter: leaves [G, rows, columns].
      group_sizes: [G] int, rows of each group; rows after the last group give zero.
      out_features: O.
      scheme: the scheme.

    Returns:
      [T, O], the dtype of `x`.

    >>> from mora_jax import Sharing
    >>> adapter = {"matrix": jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])}
    >>> ragged_delta(jnp.ones((3, 2)), adapter, jnp.array([1, 2]), 2, Sharing())
    Array([[1., 1.],
           [2., 2.],
           [2., 2.]], dtype=float32)
    """
    wide = summable(x)
    if isinstance(scheme, LowRank):
        hidden = lora_scale(adapter, scheme) * _product(wide, adapter["a"], group_sizes)
        return _product(hidden.astype(wide.dtype), adapter["b"], group_sizes).astype(x.dtype)
    size = adapter["matrix"].shape[-1]
    z = compress(wide, size, scheme, out_features=out_features)
    # A row of several blocks is as many rows of its group.
    blocks = z.size // (len(x) * size) if len(x) else 1
    y = _product(z.reshape(-1, size), adapter["matrix"], group_sizes * blocks)
    return decompress(y.reshape(z.shape).astype(z.dtype), out_features, scheme).astype(x.dtype)


def _product(rows: jax.Array, matrices: jax.Array, group_sizes: jax.Array) -> jax.Array:
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return lax.ragged_dot(
        rows, matrices.astype(rows.dtype), group_sizes, preferred_element_type=wide
    )
