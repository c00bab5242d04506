"""The arrays of a training run and where they lie on a mesh.

    state = TrainState(trainable, opt_state, frozen)

Nothing is ever whole on one device or host: random parameters are made by one jitted call whose
results lie where they belong, and of pretrained ones each process copies its own parts.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util


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


def place(tree: Any, shardings: Any) -> Any:
    """Arrays of the host on the mesh; each process copies the parts that its devices hold."""

    def put(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)
