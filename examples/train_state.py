"""The arrays of a training run and where they lie on a mesh.

    state = TrainState(trainable, opt_state, frozen)

Nothing is ever whole on one device or host: random parameters are made by one jitted call whose
results lie where they belong, and of pretrained ones each process copies its own parts.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mora_jax


class TrainState(NamedTuple):
    """The arrays of a run.

    Attributes:
      trainable: nested dicts, float32.
      opt_state: the optimizer's state over them.
      frozen: the rest of the parameters.
    """

    trainable: Any
    opt_state: Any
    frozen: Any


def part(tree: Mapping[str, Any], trains: Callable[[str], bool]) -> tuple[Any, Any]:
    """(trained, frozen): nested dicts parted by the paths of their leaves.

    Like `mora_jax.split`, for any leaves and without a plan.

    >>> part({"norm": {"scale": 1}, "dense": {"kernel": 2}}, lambda path: path == "norm/scale")
    ({'norm': {'scale': 1}}, {'dense': {'kernel': 2}})
    """
    flat = traverse_util.flatten_dict(tree, sep="/")
    trained = {path: leaf for path, leaf in flat.items() if trains(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    unflatten = traverse_util.unflatten_dict
    return unflatten(trained, sep="/"), unflatten(frozen, sep="/")


def param_shardings(plan: mora_jax.Plan, base_shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Where parameters with adapters lie: the base's as given, every adapter on all devices."""
    mesh = jax.tree.leaves(base_shardings)[0].mesh
    adapters = {path: NamedSharding(mesh, P()) for path in plan.adapter_leaves()}
    return mora_jax.join(base_shardings, traverse_util.unflatten_dict(adapters, sep="/"))


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any
) -> Any:
    """Where an optimizer's state lies: moments beside their parameters, counts on all devices.

    A moment stands in optax's state at its parameter's own path. (`optax.tree_map_params` says so
    too, but not of `optax.partition` with labels that are computed, which `freeze_base` has.)

    Args:
      optimizer: the optimizer.
      params: what it trains; shapes and dtypes are enough.
      shardings: where that lies, in a tree like `params`.
    """
    places = traverse_util.flatten_dict(shardings)
    everywhere = NamedSharding(next(iter(places.values())).mesh, P())

    def place(keys, _):
        path = []
        for key in reversed(keys):
            if not isinstance(key, jax.tree_util.DictKey):
                break
            path.insert(0, key.key)
        return places.get(tuple(path), everywhere)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def place(tree: Any, shardings: Any) -> Any:
    """Arrays of the host on the mesh; each process copies the parts that its devices hold."""

    def put(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)
