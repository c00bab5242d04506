"""The same for a function of parameters: no module, no layers, only `jax.numpy`.

    python3 run.py any_function

The function is traced, and every product that a parameter enters as a matrix is adapted. So it
works for Equinox, Haiku, and layers of your own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import mora_jax
from quickstart import CONFIG, make_task


def forward(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The two layers of quickstart.py: [B, 32] -> [B, 32]."""
    hidden = jax.nn.relu(jnp.einsum("bi,io->bo", x, params["up"]["kernel"]) + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def main() -> None:
    """Prints the plan, the loss before and after, and how far merged outputs are off."""
    pretrained, inputs, targets = make_task()
    adapted = mora_jax.adapt(forward, CONFIG)
    plan = mora_jax.plan(adapted, pretrained, inputs)  # the arguments of a call
    print(plan)
    trainable, frozen = mora_jax.split(mora_jax.attach(plan, pretrained), plan)
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(trainable)

    @jax.jit
    def step(trainable, opt_state):
        def loss(trainable):
            outputs = adapted(mora_jax.join(trainable, frozen), inputs)
            return jnp.square(outputs - targets).mean()

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, opt_state = optimizer.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    losses = []
    for _ in range(200):
        trainable, opt_state, loss = step(trainable, opt_state)
        losses.append(float(loss))
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    params = mora_jax.join(trainable, frozen)
    merged = mora_jax.merge(params, plan)
    off = jnp.abs(forward(merged, inputs) - adapted(params, inputs)).max()
    print(f"merged outputs differ by {off:.1e}")


if __name__ == "__main__":
    main()
