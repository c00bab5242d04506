"""ReMoRA: merges the adapters every 100 steps and restarts them with the next grouping.

    python3 run.py remora

A restart gives a new plan, and the model is adapted with it again. The step takes the model as a
static argument: it compiles once for each grouping, and cannot go on with the old model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mora_jax
from quickstart import CONFIG, Model, make_task

STEPS, MERGE_EVERY = 400, 100


@functools.partial(jax.jit, static_argnames=("model", "optimizer"))
def train_step(model, optimizer, params, opt_state, inputs, targets):
    """(params, opt_state, loss); the optimizer leaves the base as it is."""
    loss = lambda params: jnp.square(model.apply({"params": params}, inputs) - targets).mean()
    value, gradients = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def main() -> None:
    """Prints the loss between merges, and the rank of what was added to a kernel after each."""
    base_model = Model()
    pretrained, inputs, targets = make_task()
    model = mora_jax.adapt(base_model, CONFIG)
    plan = mora_jax.plan(model, inputs)
    params = mora_jax.attach(plan, pretrained)
    schedule = mora_jax.jagged_cosine_schedule(3e-3, STEPS, MERGE_EVERY)
    optimizer = mora_jax.freeze_base(optax.adam(schedule), plan)
    opt_state = optimizer.init(params)
    for step in range(1, STEPS + 1):
        params, opt_state, loss = train_step(model, optimizer, params, opt_state, inputs, targets)
        if step % MERGE_EVERY == 0:
            params, opt_state, plan, report = mora_jax.merge_and_reset(params, opt_state, plan)
            model = mora_jax.adapt(base_model, plan)
            added = np.asarray(params["up"]["kernel"] - pretrained["up"]["kernel"])
            rank = np.linalg.matrix_rank(added, tol=1e-4)
            print(f"step {step}: loss {loss:.6f}, added rank {rank}, {report}")


if __name__ == "__main__":
    main()
