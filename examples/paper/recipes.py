"""The ways to pretrain that are compared, and random groups, which the library has no scheme for.

Random groups are the bound that a regrouping can hope for: after every merge each feature of a
layer is put into a group at random. The library's own delta does it between permuted features,

    effective kernel = (stored kernel + delta)[inputs][:, outputs]

where `inputs` and `outputs` are permutations. It costs two gathers of every kernel, and is here to
be measured against.

Shape letters: L stacked layers, I input features, O output features.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import mora_jax
from mora_jax import LowRank, Rotation, Sharing, scheme_from_mora_type

#: Path of a kernel -> (permutation of I, permutation of O).
Groups = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to pretrain.

    Attributes:
      scheme: of the adapters; None: every parameter is trained, without adapters.
      cycle: as in `MoRAConfig`.
      merges: whether adapters are merged and restarted on the way.
      random: whether features are put into random groups, other ones after each merge.
    """

    scheme: mora_jax.Scheme | None
    cycle: Any = None
    merges: bool = True
    random: bool = False


RECIPES = {
    "full rank": Recipe(None, merges=False),
    "LoRA": Recipe(LowRank(), merges=False),
    "ReLoRA": Recipe(LowRank()),
    "MoRA": Recipe(Sharing(), merges=False),
    "one grouping": Recipe(Sharing()),
    "two groupings": Recipe(Sharing(), (Sharing(), scheme_from_mora_type(2))),
    "four groupings": Recipe(Sharing(), "groupings"),
    "shifts": Recipe(Sharing(), "shifts"),
    "signs": Recipe(Sharing(), "signs"),
    "random groups": Recipe(Sharing(), random=True),
    "rotation": Recipe(Rotation()),
    "cycled rotation": Recipe(Rotation(cycle=True)),
}


def draw_groups(plan: mora_jax.Plan, seed: int, merges: int) -> Groups:
    """Random groups for every kernel: a function of the seed and of how many merges there were."""
    rng = np.random.default_rng((seed, merges))
    return {
        kernel: (rng.permutation(spec.features[0]), rng.permutation(spec.features[1]))
        for kernel, spec in zip(plan.kernel_paths(), plan.values(), strict=True)
    }


def permuted(params: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """Kernels [L, I, O] with their features permuted; everything else as it is."""
    leaves: dict[str, Any] = {**traverse_util.flatten_dict(params, sep="/")}
    for path, (inputs, outputs) in groups.items():
        leaves[path] = jnp.take(jnp.take(leaves[path], inputs, axis=1), outputs, axis=2)
    return traverse_util.unflatten_dict(leaves, sep="/")


def inverse(groups: Groups) -> Groups:
    """The groups that undo a permutation."""
    return {path: (np.argsort(i), np.argsort(o)) for path, (i, o) in groups.items()}
