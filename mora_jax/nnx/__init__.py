"""MoRA for Flax NNX: `adapt` for models, a layer, and the type of its parameters.

An adapted layer is an object of a subclass of its own class, so that the graph and the paths of the
base model stay as they are, with its adapter beside the kernel:

    q_proj.kernel         [I, O]    Param, the pretrained kernel, as before
    q_proj.mora.matrix_sharing    [R, R]    MoRAParam, the adapter, R the square size

Training is NNX's own, `nnx.Optimizer(model, tx, wrt=MoRAParam)`. What `MoRAConfig.also_train` names
is of the type `AlsoTrained`, a `MoRAParam` too, and so is trained with the adapters.
"""

from mora_jax._arrays.boxes import AdapterIds, AlsoTrained, MoRAParam
from mora_jax.nnx._adapt import adapt, plan, set_adapter_ids
from mora_jax.nnx._layers import MoRA, MoRALinear
from mora_jax.nnx._merge import merge, merge_and_reset, unmerge

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
