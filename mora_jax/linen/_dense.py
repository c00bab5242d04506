"""`nn.Dense` with an adapter, for models that are written with it."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mora_jax._arrays.paths import ADAPTER
from mora_jax._plans.layer import LayerConfig
from mora_jax._product.cost import Placement
from mora_jax._schemes.base import Scheme
from mora_jax._schemes.registry import as_scheme
from mora_jax.linen._layers import MoRA, uses_mora


class MoRADense(nn.Dense):
    """`nn.Dense` with an adapter: the same fields and parameters, and an adapter `mora`.

    Its scheme is a field, so ReMoRA keeps it (no cycle); `adapt` on a plain `nn.Dense` walks on.

    Attributes:
      rank: the LoRA rank whose number of parameters the adapter has.
      scheme: a `Scheme` or its name.
      placement: "kernel", "activation" or "auto", see `mora_dot_general`.
      dropout: rate at which the adapter's input is dropped where an rng stream `mora` is given.
      adapter_dtype: dtype of the adapter.
      dora: train a magnitude for each output feature too, see `MoRAConfig`.

    >>> import jax
    >>> layer = MoRADense(6, rank=1, scheme="sharing")
    >>> params = layer.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix_sharing': (3, 3)}}
    """

    rank: int = 8
    scheme: Scheme | str = "auto"
    placement: Placement = "auto"
    dropout: float = 0.0
    adapter_dtype: Any = "float32"
    dora: bool = False

    def __post_init__(self):
        if self.dot_general_cls is not None and not uses_mora(self):
            raise ValueError("MoRADense takes a `dot_general`, but no `dot_general_cls`.")
        config = LayerConfig(
            rank=self.rank,
            scheme=as_scheme(self.scheme, self.rank),
            cycle=None,
            placement=self.placement,
            dropout=self.dropout,
            dtype=jnp.dtype(self.adapter_dtype).name,
            dora=self.dora,
        )
        base_dot = self.dot_general or lax.dot_general
        self.dot_general_cls = functools.partial(MoRA, config, base_dot, name=ADAPTER)
        super().__post_init__()
