"""MoRA for Flax linen: `adapt` for whole models, and a layer."""

from mora_jax.linen._adapt import AdaptedModule, MoRADense, adapt
from mora_jax.linen._layers import MoRA

__all__ = ["AdaptedModule", "MoRA", "MoRADense", "adapt"]
