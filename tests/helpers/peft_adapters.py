"""Adapters with random numbers on layers of a Llama's names, for the tests of PEFT's format."""

import json

import numpy as np

from mora_jax import AdapterSpec, KernelAxes, Plan
from mora_jax._arrays.paths import flatten, unflatten
from mora_jax._plans.layer import LayerConfig

SIZES = {"self_attn/q_proj": (10, 12), "mlp/up_proj": (10, 17), "mlp/down_proj": (17, 10)}


def stacked_base(layers=2, width=10):
    shapes = {path: [width if size == 10 else size for size in s] for path, s in SIZES.items()}
    shapes = {f"layers/{path}/kernel": (layers, *shape) for path, shape in shapes.items()}
    shapes["embed/embedding"] = (7, width)
    return unflatten({path: np.zeros(shape, np.float32) for path, shape in shapes.items()})


def planned(base, scheme, rank=2, dtype="float32", ranks=(), **config):
    """(plan, params with random adapters): every kernel of the base, last two axes a matrix."""
    layers = []
    for path, kernel in flatten(base).items():
        layer, _, name = path.rpartition("/")
        if name == "kernel":
            batch = tuple(range(kernel.ndim - 2))
            axes = KernelAxes((len(batch),), (len(batch) + 1,), batch)
            own = scheme(layer) if callable(scheme) else scheme
            chosen = LayerConfig(dict(ranks).get(layer, rank), own, dtype=dtype, **config)
            layers.append((layer, AdapterSpec(chosen, kernel.shape, axes, batch)))
    plan, rng = Plan(tuple(layers), base_parameters=0), np.random.default_rng(0)
    adapters = {
        path: rng.standard_normal(leaf.shape).astype(leaf.dtype)
        for path, leaf in plan.adapter_leaves().items()
    }
    return plan, unflatten(flatten(base) | adapters)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())
