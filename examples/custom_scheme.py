"""A scheme of your own in one file: two linear maps; the library derives all else from them."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mora_jax.checkpoint


@mora_jax.register_scheme
class RandomGroups(mora_jax.Scheme):
    """Features that were put into one group at random share a row or a column of the matrix."""

    kind = "random_groups"
    draw: int = 0

    def _order(self, features, side):
        return np.random.default_rng((self.draw, side, features)).permutation(features)

    def compress(self, x, size, *, out_features=None):
        """[..., I] -> [..., R]: sharing's sums, of the features in a random order."""
        return mora_jax.compress(x[..., self._order(x.shape[-1], 0)], size, mora_jax.Sharing())

    def decompress(self, z, out_features):
        """[..., R] -> [..., O]: sharing's copies, in another random order."""
        copies = mora_jax.decompress(z, out_features, mora_jax.Sharing())
        return copies[..., self._order(out_features, 1)]

    def successor(self, cycle, in_features, out_features, size):
        """Other groups after a merge."""
        return RandomGroups(self.draw + 1)


def main():
    """Trains with three restarts; saves the adapters and prints the plan that it loads."""
    layer, x = lambda params, x: x @ params["layer"]["kernel"], jnp.eye(24)
    loss_of = lambda params, plan: ((mora_jax.adapt(layer, plan)(params, x) - x[::-1]) ** 2).mean()
    params, config = {"layer": {"kernel": 0 * x}}, mora_jax.MoRAConfig(2, scheme="random_groups")
    plan = mora_jax.plan(mora_jax.adapt(layer, config), params, x)
    params, optimizer = mora_jax.attach(plan, params), mora_jax.freeze_base(optax.adam(0.01), plan)
    state = optimizer.init(params)
    for step in range(1, 121):
        loss, gradients = jax.value_and_grad(loss_of)(params, plan)
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        if step % 40 == 0:
            print(f"step {step}, {plan['layer'].scheme}: loss {loss:.4f}")
            params, state, plan, _ = mora_jax.merge_and_reset(params, state, plan)
    with tempfile.TemporaryDirectory() as folder:
        mora_jax.checkpoint.save_adapters(f"{folder}/a", params, plan)
        print(mora_jax.checkpoint.load_adapters(f"{folder}/a", mora_jax.merge(params, plan))[1])


if __name__ == "__main__":
    main()
