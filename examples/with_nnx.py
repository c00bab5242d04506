"""The same for a Flax NNX model: `adapt` gives a new model, which holds its adapters.

python3 run.py with_nnx
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mora_jax
from mora_jax.nnx import MoRAParam, merge
from quickstart import CONFIG, make_task


class Model(nnx.Module):
    """The two layers of quickstart.py: [B, 32] -> [B, 32]."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies them."""
        return self.down(nnx.relu(self.up(x)))


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, inputs: jax.Array, targets: jax.Array):
    """Updates the model and the optimizer in place, and gives the loss."""
    loss_of = lambda model: jnp.square(model(inputs) - targets).mean()
    adapters = nnx.DiffState(0, MoRAParam)  # the gradients of these alone
    loss, gradients = nnx.value_and_grad(loss_of, argnums=adapters)(model)
    optimizer.update(model, gradients)
    return loss


def main() -> None:
    """Prints the plan, the loss before and after, and how far merged outputs are off."""
    pretrained, inputs, targets = make_task()
    base_model = Model(nnx.Rngs(0))
    nnx.update(base_model, pretrained)
    model = mora_jax.adapt(base_model, CONFIG)
    print(mora_jax.plan(model))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=MoRAParam)
    losses = [float(step(model, optimizer, inputs, targets)) for _ in range(200)]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    merged = merge(model)  # a model of the base model's classes
    print(f"merged outputs differ by {jnp.abs(merged(inputs) - model(inputs)).max():.1e}")


if __name__ == "__main__":
    main()
