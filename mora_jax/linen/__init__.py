"""MoRA for Flax linen: `adapt` for whole models, and a layer.

`adapt` puts adapters into the chosen layers while the model runs, by `nn.intercept_methods`, so
that the model is not edited and the base parameters keep their paths:

    q_proj/kernel         [I, O]    the pretrained kernel, as before
    q_proj/mora/matrix_sharing    [R, R]    the adapter, R the square size

Where the adapters are those of a bank, the model's collection `mora` says which one each example
has: `model.apply({"params": params, "mora": {"adapter_ids": ids}}, *inputs)`.
"""

from mora_jax.linen._adapt import AdaptedModule, adapt
from mora_jax.linen._dense import MoRADense
from mora_jax.linen._layers import MoRA

__all__ = ["AdaptedModule", "MoRA", "MoRADense", "adapt"]
