"""MoRA for Flax NNX: `adapt` for models, a layer, and the types of its parameters."""

from mora_jax._arrays.boxes import AdapterIds, AlsoTrained, MoRAParam
from mora_jax.nnx._adapt import adapt, merge, merge_and_reset, plan, set_adapter_ids, unmerge
from mora_jax.nnx._layers import MoRA, MoRALinear

__all__ = [
    "AdapterIds",
    "AlsoTrained",
    "MoRA",
    "MoRALinear",
    "MoRAParam",
    "adapt",
    "merge",
    "merge_and_reset",
    "plan",
    "set_adapter_ids",
    "unmerge",
]
