"""The delta of experts whose rows stand group after group, as `jax.lax.ragged_dot` has them.

Shape letters: T rows, G groups (experts), I input features, O output features, R the square size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mora_jax._schemes.base import Adapter, Scheme


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

    def multiply(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        # A row of several blocks is as many rows of its group.
        width = rows.shape[-1]
        blocks = rows.size // (len(x) * width) if len(x) else 1
        wide = jnp.promote_types(rows.dtype, jnp.float32)
        y = lax.ragged_dot(
            rows.reshape(-1, width),
            matrices.astype(rows.dtype),
            group_sizes * blocks,
            preferred_element_type=wide,
        )
        return y.reshape(*rows.shape[:-1], matrices.shape[-1])

    return scheme.delta_by(multiply, x, adapter, out_features)
