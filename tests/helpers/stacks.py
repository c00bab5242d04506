"""Adapters of one stack of layers, and their deltas as matrices."""

import jax.numpy as jnp
import numpy as np

import mora_jax
from helpers.arrays import random_adapter
from mora_jax._plans.layer import LayerConfig

STACK, INPUTS, OUTPUTS, RANK = 2, 20, 12, 2
# The square size is 8, or LoRA's rank of 2: it divides neither side.


def stacked(scheme, seed=0):
    """(plan, params) of one stack of layers, [O, B, I]: its axes are in an order of their own."""
    axes = mora_jax.KernelAxes((2,), (0,), (1,))
    config = LayerConfig(RANK, scheme)
    spec = mora_jax.AdapterSpec(config, (OUTPUTS, STACK, INPUTS), axes, (1,))
    plan = mora_jax.Plan((("layers", spec),))
    adapter = random_adapter(INPUTS, OUTPUTS, RANK, scheme, seed, batch=(STACK,))
    adapter = {config.stored_name(k): jnp.moveaxis(leaf, 0, 1) for k, leaf in adapter.items()}
    return plan, {"layers": {"kernel": jnp.zeros(spec.kernel_shape), "mora": adapter}}


def deltas(params, plan):
    """[B, I, O] in float64."""
    delta = plan["layers"].delta(params["layers"]["mora"])
    return np.asarray(delta, np.float64).transpose(1, 2, 0)
