"""What every real model must do with adapters, unedited."""

import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mora_jax

#: A line for every model that passed, printed at the end.
TABLE: list[str] = []


def of_function(function, params, *inputs):
    return function(params, *inputs)


def check(name, base, params, inputs, layers, *, run=of_function, rate=1e-2, **config):
    """Adapts `base`, plans, trains, merges and restarts it.

    Args:
      name: as printed.
      base: what `adapt` takes.
      params: its parameters.
      inputs: its inputs.
      layers: pattern with a star for every number -> how many layers must be planned so.
      run: `(model, params, *inputs) -> array`; by default the model is a function of these.
      rate: learning rate of 20 steps of Adam.
      **config: of the MoRAConfig.
    """
    start = time.perf_counter()
    config = mora_jax.MoRAConfig(**{"rank": 1, "scheme": "sharing"} | config)
    model = mora_jax.adapt(base, config)
    plan = mora_jax.plan(model, *((params, *inputs) if run is of_function else inputs))
    assert counted(plan) == layers

    def outputs(model, params):
        return jax.jit(functools.partial(run, model))(params, *inputs)

    adapted = mora_jax.attach(plan, params)
    plain = outputs(base, params)
    np.testing.assert_array_equal(outputs(model, adapted), plain)

    optimizer = mora_jax.freeze_base(optax.adam(rate), plan)
    state, losses = optimizer.init(adapted), []
    target = jnp.std(plain) * jax.random.normal(jax.random.key(0), plain.shape)

    @jax.jit
    def step(params, state):
        def loss(params):
            y = run(model, params, *inputs).astype(jnp.float32)
            return jnp.square(y - target).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(20):
        adapted, state, loss = step(adapted, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0], losses
    _, frozen = mora_jax.split(adapted, plan)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, frozen, dict(params))))

    y = outputs(model, adapted)
    scale = float(jnp.abs(y).max())
    merged = outputs(base, mora_jax.merge(adapted, plan))
    np.testing.assert_allclose(merged, y, atol=1e-5 * scale)
    adapted, state, plan, _ = mora_jax.merge_and_reset(adapted, state, plan, donate=False)
    restarted = outputs(mora_jax.adapt(base, plan), adapted)
    np.testing.assert_allclose(restarted, y, atol=1e-5 * scale)
    TABLE.append(
        f"| {name} | {len(plan)} | {losses[0]:.3f} -> {losses[-1]:.3f} | "
        f"{float(jnp.abs(merged - y).max()) / scale:.0e} | {time.perf_counter() - start:.0f} s |"
    )


def counted(plan):
    """Layers by pattern: numbers in their paths replaced by stars."""
    found = {}
    for path in plan:
        pattern = re.sub(r"(?<![a-z])\d+(?![a-z])", "*", path)
        found[pattern] = found.get(pattern, 0) + 1
    return found
