"""Many adapters over one base: switched, combined, and mixed in one batch.

    python3 run.py adapter_bank

Which adapter acts is a number in an array, so that nothing is compiled again for another one.
"""

import jax
import jax.numpy as jnp

import mora_jax
from quickstart import CONFIG, Model, make_task, train


def main() -> None:
    """Prints how well each adapter does its task, and how far a mixed batch is off."""
    model = mora_jax.adapt(Model(), CONFIG)
    pretrained, inputs, _ = make_task()
    plan = mora_jax.plan(model, inputs)
    run = jax.jit(lambda params, x: model.apply({"params": params}, x))
    untrained = mora_jax.attach(plan, pretrained)
    _, base = mora_jax.split(untrained, plan)

    targets = {name: make_task(seed)[2] for seed, name in enumerate(("poems", "maths"))}
    trained = {}
    for name, wanted in targets.items():
        params, _ = train(model, untrained, plan, inputs, wanted)
        trained[name] = (params, plan)
    bank = mora_jax.stack_adapters(trained, capacity=8)

    for name in bank.names:  # switching: one compiled program serves both
        outputs = run(mora_jax.join(bank.select(name), base), inputs)
        errors = {task: jnp.square(outputs - wanted).mean() for task, wanted in targets.items()}
        print(f"{name}:", ", ".join(f"loss on {task} {loss:.4f}" for task, loss in errors.items()))

    half = bank.combine({"poems": 0.5, "maths": 0.5})  # exact: a delta is linear in its matrix
    both = [trained[name][0]["up"]["mora"]["matrix_sharing"] for name in bank.names]
    off = jnp.abs(half["up"]["mora"]["matrix_sharing"] - (both[0] + both[1]) / 2).max()
    print(f"the combined matrix differs from the mean by {off:.1e}")

    @jax.jit
    def run_mixed(adapters, ids, x):
        variables = {"params": mora_jax.join(adapters, base), "mora": {"adapter_ids": ids}}
        return model.apply(variables, x)

    names = ["maths", None, "poems"]  # None: the base alone
    mixed = run_mixed(bank.adapters, bank.adapter_ids(names), inputs[:3])
    alone = []
    for row, name in enumerate(names):
        params = mora_jax.join(bank.select(name), base) if name else untrained
        alone.append(run(params, inputs[row : row + 1])[0])
    off = jnp.abs(mixed - jnp.stack(alone)).max()
    print(f"a mixed batch differs from its examples alone by {off:.1e}")


if __name__ == "__main__":
    main()
