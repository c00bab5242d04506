"""Adapters over a base whose kernels are 8-bit integers (qwix); the adapters stay float32.

    python3 run.py quantised

Three things differ: the placement "activation", `quantize` before the training, and a model whose
calls dequantise each kernel where it is used.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import mora_jax
from mora_jax import quantized
from quickstart import CONFIG, Model, make_task, train


class Dequantising:
    """A model whose `apply` takes quantised kernels."""

    def __init__(self, model: Any):
        self.apply = quantized.dequantize_within(model.apply)


def main() -> None:
    """Prints bytes of the kernels, the loss before and after, and what a merge loses."""
    pretrained, inputs, targets = make_task()
    # The delta is added to a layer's outputs: there is no floating kernel to add it to.
    model = mora_jax.adapt(Model(), dataclasses.replace(CONFIG, placement="activation"))
    plan = mora_jax.plan(model, inputs)
    params = quantized.quantize(mora_jax.attach(plan, pretrained), plan, "int8")
    for name, layer in params.items():
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(layer["kernel"]))
        print(f"{name}: {pretrained[name]['kernel'].nbytes} bytes -> {size}")
    params, losses = train(Dequantising(model), params, plan, inputs, targets)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    merged, lost = quantized.merge(params, plan)  # quantises the sum again, which rounds it
    for path, loss in lost.items():
        print(f"{path}: {loss.kept:.1%} of the update kept by a merge into int8")
    outputs = Dequantising(Model()).apply({"params": merged}, inputs)
    print(f"loss of the merged model {jnp.square(outputs - targets).mean():.4f}")


if __name__ == "__main__":
    main()
