"""A program for eight devices: counts what a layer sends between them, and checks its numbers.

Run by test_collectives.py in a process of its own, which has as many devices as it starts with.
Prints, as JSON, the collectives of {baseline, adapted} x {forward pass, whole step} for each case.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mora_jax
from helpers.devices import collectives
from mora_jax._product import call as _dot_call

LAYOUTS = {
    "tokens": (P("d", None), P(None, None)),
    "column": (P(None, None), P(None, "d")),
    "row": (P(None, "d"), P("d", None)),
    "fsdp": (P("d", None), P("d", None)),
}
SCHEMES = {
    "sharing": mora_jax.Sharing(),
    "shift": mora_jax.Sharing(shift=1, signs=2),
    "contiguous": mora_jax.Sharing("contiguous", "stride"),
    "rotation": mora_jax.Rotation(),
    "cycled": mora_jax.Rotation(wrap=True),
}
MATMUL = (((1,), (0,)), ((), ()))


def measure(mesh, in_features, out_features, rank, scheme, layout, check):
    x_spec, kernel_spec = LAYOUTS[layout]
    y_spec = P(x_spec[0], kernel_spec[1])
    place = lambda spec: NamedSharding(mesh, spec)
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, dy = array(32, in_features), array(32, out_features)
    kernel = array(in_features, out_features)
    adapter = {}
    if scheme is not None:
        size = scheme.size(in_features, out_features, rank)
        leaves = scheme.leaves(in_features, out_features, size)
        adapter = {name: array(*leaf.shape) for name, leaf in leaves.items()}

    def product(x, kernel, adapter):
        if scheme is None:
            return x @ kernel
        return mora_jax.mora_dot_general(x, kernel, MATMUL, adapter, scheme, placement="kernel")

    def forward(x, kernel, adapter, dy):
        # As training runs it: the transpose holds what is kept for the backward pass.
        return jax.vjp(lambda x, adapter: product(x, kernel, adapter), x, adapter)

    def step(x, kernel, adapter, dy):
        y, transpose = jax.vjp(lambda x, adapter: product(x, kernel, adapter), x, adapter)
        return y, *transpose(dy)

    inputs = (place(x_spec), place(kernel_spec), place(P()), place(y_spec))
    outputs = (place(y_spec), place(x_spec), place(P()))
    with jax.set_mesh(mesh):
        run = jax.jit(step, in_shardings=inputs, out_shardings=outputs)
        compiled = run.lower(x, kernel, adapter, dy).compile()
        alone = jax.jit(forward, in_shardings=inputs, out_shardings=(outputs[0], None))
        counts = collectives(alone.lower(x, kernel, adapter, dy).compile()), collectives(compiled)
        if check:
            sharded = jax.device_put((x, kernel, adapter, dy), inputs)
            many = jax.device_get(compiled(*sharded))
    if check:
        # In a manual region arrays are local: the other spelling, a part of the tokens on each.
        local = jax.shard_map(
            step, mesh=mesh, in_specs=(P("d"), P(), P(), P("d")), out_specs=(P("d"), P("d"), P())
        )
        alone = jax.device_get(jax.jit(local)(x, kernel, adapter, dy))
        for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    return counts


def main():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    found = {}
    # R is 39 and 64: what divides no shard, and what divides every one.
    for in_features, out_features, rank in ((512, 1024, 1), (512, 512, 4)):
        for layout in LAYOUTS:
            baseline = measure(mesh, in_features, out_features, rank, None, layout, False)
            # Where tokens are sharded all features are at hand; the backward's place is one matter.
            places = ("kernel", "activation") if layout in ("row", "column") else ("kernel",)
            # Where sizes divide, only blocks have a case of their own.
            names = ("rotation", "cycled") if rank > 1 else SCHEMES
            if len(places) == 1:
                names = ("rotation",) if rank > 1 else ("sharing", "rotation")
            chosen = {name: SCHEMES[name] for name in names}
            for (name, scheme), place in itertools.product(chosen.items(), places):
                _dot_call.cheapest_placements = lambda *_, backward=place: ("kernel", backward)
                check = place == "kernel"
                counts = measure(mesh, in_features, out_features, rank, scheme, layout, check)
                case = f"{in_features}x{out_features} {layout} {name}, backward in the {place}"
                found[case] = (baseline, counts)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
