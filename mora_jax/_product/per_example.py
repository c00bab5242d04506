"""Adapters by example: each example of a batch with an adapter of its own, out of a bank.

A bank holds the adapters of one layer one below the other, so that a leaf keeps its number of axes
and stacks of layers keep theirs wherever they have them:

    up/mora/matrix_sharing    [R, R]      one adapter
    up/mora/matrix_sharing    [A R, R]    a bank of A adapters

Shape letters: A adapters, E examples, T rows of one example, I input features, O output features, R
the square size, B batch axes (experts, stacked layers).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mora_jax._schemes.base import Adapter, Scheme

_LARGEST_ID = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class ExampleIds:
    """Which adapter each example of a layer's inputs has.

    Attributes:
      ids: [E] int; -1 for none.
      path: the layer's, for errors.
    """

    ids: jax.Array
    path: str

    def check(self, shape: Sequence[int], dimension_numbers: Any) -> None:
        """Raises ValueError unless the first axis of a layer's inputs is as long as E examples.

        That it is the examples' cannot be seen here: tokens without their batch, [T, I], are the
        same array as examples of one row, [E, I], where there happen to be as many of them.

        Args:
          shape: of the inputs.
          dimension_numbers: of the product, inputs first.
        """
        check_ids(self.ids)
        (inputs, _), (batch, _) = dimension_numbers
        free = len(shape) > 0 and 0 not in (*inputs, *batch)
        if not free or shape[0] != len(self.ids):
            have = f"{shape[0]} elements" if free else "features, or experts"
            raise ValueError(
                f"adapter_ids name an adapter for each of {len(self.ids)} examples, which must be "
                f"the first axis of a layer's inputs; those of {self.path!r} have shape "
                f"{tuple(shape)}, the first axis {have}. Does the layer see tokens without their "
                "batch, or positions? Leave it out with MoRAConfig.exclude: with as many of them "
                "as examples, nothing tells the two apart."
            )

    def refuse(self, use: str) -> ValueError:
        """What is raised where a layer's kernel is used otherwise than in a product."""
        return ValueError(
            f"adapter_ids: the kernel of the layer {self.path!r} enters {use}, and examples "
            "have adapters of their own in products with their inputs alone. Leave the layer out "
            "with MoRAConfig.exclude, or select one adapter for all examples."
        )


def check_ids(ids: Any) -> None:
    """Raises TypeError or ValueError unless these are integers along one axis."""
    if not hasattr(ids, "dtype") or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"adapter_ids must be an array of integers, got {getattr(ids, 'dtype', type(ids))}; "
            "AdapterBank.adapter_ids makes it of names."
        )
    if ids.ndim != 1:
        raise ValueError(f"adapter_ids must have one axis, the examples', got {ids.shape}.")


def ids_as_int32(ids: jax.Array) -> jax.Array:
    """Adapter ids of any integers as int32, which has -1; what it lacks becomes -2, no adapter.

    >>> ids_as_int32(np.array([1, -1, 2**32 + 1]))
    Array([ 1, -1, -2], dtype=int32)
    """
    known = jnp.iinfo(ids.dtype)
    if known.max <= _LARGEST_ID:
        return ids.astype(np.int32)
    # In the ids' own dtype: a cast would wrap them around to another adapter.
    beyond = ids > ids.dtype.type(_LARGEST_ID)
    if known.min < 0:
        beyond = beyond | (ids < -1)
    return jnp.where(beyond, np.int32(-2), ids.astype(np.int32))


def delta_by_example(
    x: jax.Array, adapter: Adapter, ids: jax.Array, out_features: int, scheme: Scheme
) -> jax.Array:
    """`delta` with a matrix for each example: one gather, and a batched product.

    Compression and decompression are the same for all adapters of a bank.

    Args:
      x: [E T, I], the rows of example 0 first.
      adapter: leaves [A, rows, columns].
      ids: [E] int: the adapter of each example; -1 for none, a delta of zero. Other numbers beyond
        the bank give NaN.
      out_features: O.
      scheme: the scheme.

    Returns:
      [E T, O], the dtype of `x`.

    >>> from mora_jax import Sharing
    >>> bank = {"matrix": jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])}
    >>> delta_by_example(jnp.ones((3, 2)), bank, jnp.array([1, -1, 0]), 2, Sharing())
    Array([[2., 2.],
           [0., 0.],
           [1., 1.]], dtype=float32)
    """
    if ids.size == 0:
        return jnp.zeros((len(x), out_features), x.dtype)

    # The gather needs no inputs, so a scheduler would make that of all layers first: a copy of the
    # bank.
    x, ids = lax.optimization_barrier((x, ids_as_int32(ids)))

    def choose(leaf: jax.Array) -> jax.Array:
        # A negative index would count from the end.
        index = jnp.where(ids < -1, len(leaf), jnp.maximum(ids, 0))
        chosen = leaf.at[index].get(mode="fill", fill_value=jnp.nan)
        return jnp.where((ids == -1)[:, None, None], 0, chosen)

    chosen = {name: choose(leaf) for name, leaf in adapter.items()}
    one = functools.partial(scheme.delta, out_features=out_features)
    y = jax.vmap(one)(x.reshape(len(ids), -1, x.shape[-1]), chosen)
    return y.reshape(-1, out_features)


def unstack_bank(
    leaves: Mapping[str, Any], rows: Mapping[str, int], path: str
) -> dict[str, jax.Array]:
    """The adapters of a bank apart: leaves [B..., A rows, columns] -> [B..., A, rows, columns].

    Args:
      leaves: one layer's, by name.
      rows: of one adapter, by name.
      path: the layer's, for errors.

    Raises:
      ValueError: where they are no whole number of adapters.
    """
    if bad := {name: a.shape for name, a in leaves.items() if a.shape[-2] % rows[name]}:
        raise ValueError(
            f"the adapters of the layer {path!r} have shapes {bad}, and one adapter of a bank has "
            f"{dict(rows)} rows. Was the bank made for another rank?"
        )
    return {
        name: leaf.reshape(*leaf.shape[:-2], -1, rows[name], leaf.shape[-1])
        for name, leaf in leaves.items()
    }


def bank_size(leaves: Mapping[str, Any], rows: Mapping[str, int], axis: int = -2) -> int:
    """How many adapters a layer holds one below the other; 1 where shapes do not say."""
    counts = {divmod(leaf.shape[axis], rows[name]) for name, leaf in leaves.items()}
    count, rest = counts.pop() if len(counts) == 1 else (1, 0)
    return 1 if rest else max(count, 1)


def holds_bank(count: int, where: str) -> ValueError:
    """What is raised where parameters hold a bank and nothing says whose turn it is."""
    return ValueError(
        f"{where} hold a bank of {count} adapters, and one was to be used. Say which one each "
        "example has (adapter_ids), or select one: AdapterBank.select(name)."
    )
