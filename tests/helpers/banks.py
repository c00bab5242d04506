"""Banks of adapters with random numbers, for tests."""

import mora_jax
from helpers.arrays import perturb

WORDS = ["french", "maths", "cooking"]


def make_bank(plan, params, capacity=None):
    """(bank of three adapters, base parameters, the adapters)."""
    trainable, base = mora_jax.split(params, plan)
    adapters = {name: perturb(trainable, seed=i) for i, name in enumerate(WORDS)}
    pairs = {name: (adapter, plan) for name, adapter in adapters.items()}
    return mora_jax.stack_adapters(pairs, capacity=capacity), base, adapters
