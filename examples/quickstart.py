"""Adapts a small linen model, trains the adapters, and merges them.

    python3 run.py quickstart

The task stands for fine-tuning: learn the outputs that the pretrained model has with other kernels.
The scripts beside this one use the same task.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import mora_jax

CONFIG = mora_jax.MoRAConfig(rank=2, scheme="sharing")


class Model(nn.Module):
    """Two layers: [B, 32] -> [B, 32]. It knows nothing of adapters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies them."""
        return nn.Dense(32, name="down")(nn.relu(nn.Dense(64, name="up")(x)))


def make_task(seed: int = 0) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """(pretrained parameters, inputs [B, 32], targets [B, 32]); a seed has its own targets."""
    inputs = jax.random.normal(jax.random.key(0), (128, 32))
    init = lambda seed: Model().init(jax.random.key(seed), inputs)["params"]
    pretrained, other = init(1), init(2 + seed)
    wanted = jax.tree.map(lambda leaf, change: leaf + 0.3 * change, pretrained, other)
    return pretrained, inputs, Model().apply({"params": wanted}, inputs)  # pyright: ignore


def train(model: Any, params: Any, plan: mora_jax.Plan, inputs: Any, targets: Any) -> Any:
    """(parameters after 200 steps, the loss of each step)."""
    trainable, frozen = mora_jax.split(params, plan)  # only the first has gradients
    opt_state = (optimizer := optax.adam(3e-3)).init(trainable)

    @jax.jit
    def step(trainable, opt_state):
        def loss(trainable):
            outputs = model.apply({"params": mora_jax.join(trainable, frozen)}, inputs)
            return jnp.square(outputs - targets).mean()

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, opt_state = optimizer.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    losses = []
    for _ in range(200):
        trainable, opt_state, loss = step(trainable, opt_state)
        losses.append(float(loss))
    return mora_jax.join(trainable, frozen), losses


def main() -> None:
    """Prints the plan, the loss before and after, and how far merged outputs are off."""
    base_model, (pretrained, inputs, targets) = Model(), make_task()
    model = mora_jax.adapt(base_model, CONFIG)  # the same class, the same parameter paths
    plan = mora_jax.plan(model, inputs)  # which layers are adapted, and how
    print(plan)
    params = mora_jax.attach(plan, pretrained)  # a zero matrix beside each kernel
    params, losses = train(model, params, plan, inputs, targets)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    merged = mora_jax.merge(params, plan)  # parameters of the base model again
    apply = lambda model, params: model.apply({"params": params}, inputs)
    off = jnp.abs(apply(base_model, merged) - apply(model, params)).max()
    print(f"merged outputs differ by {off:.1e}")


if __name__ == "__main__":
    main()
