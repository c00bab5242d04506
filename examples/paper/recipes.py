"""The ways to train that are compared, and random groups, which the library has no scheme for.

Random groups are the bound that a regrouping can hope for: after every merge each feature of a
layer is put into a group at random. The library's own delta does it between permuted features,

    effective kernel = (stored kernel + delta)[inputs][:, outputs]

where `inputs` and `outputs` are permutations. It costs two gathers of every kernel, and is here to
be measured against.

Shape letters: I input features, O output features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import mora_jax
from mora_jax import Decoupling, LowRank, Rotation, Sharing, Truncation, scheme_from_mora_type

#: Path of a kernel -> (permutation of I, permutation of O).
Groups = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
      scheme: of the adapters; None: every parameter is trained, without adapters.
      rank: LoRA's, whose number of parameters the adapters have; None: what the flags say.
      rate: the learning rate that the search for it begins with.
      cycle: as in `MoRAConfig`.
      merges: whether adapters are merged and restarted on the way; a number n: at every n-th of
        the times at which the others are.
      random: whether features are put into random groups, other ones after each merge.
      dora: as in `MoRAConfig`.
      schemes: as in `MoRAConfig`.
    """

    scheme: mora_jax.Scheme | None
    rank: int | None = None
    rate: float = dataclasses.field(default=4e-3, repr=False)  # no result depends on it
    cycle: Any = None
    merges: bool | int = False
    random: bool = False
    dora: bool = False
    schemes: Any = ()


#: Each kind of layer has other groups, or what a group ties together would be tied in all of them.
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STAGGERED = tuple((rf".*{kind}", Sharing(shift=shift)) for shift, kind in enumerate(KINDS))

#: From scratch.
RECIPES = {
    "full rank": Recipe(None, rate=2e-3),
    "LoRA": Recipe(LowRank()),
    "ReLoRA": Recipe(LowRank(), merges=True),
    "MoRA": Recipe(Sharing()),
    "one grouping": Recipe(Sharing(), merges=True),
    "two groupings": Recipe(Sharing(), cycle=(Sharing(), scheme_from_mora_type(2)), merges=True),
    "four groupings": Recipe(Sharing(), cycle="groupings", merges=True),
    "shifts": Recipe(Sharing(), cycle="shifts", merges=True),
    "signs": Recipe(Sharing(), cycle="signs", merges=True),
    "signs every 2nd": Recipe(Sharing(), cycle="signs", merges=2),
    "signs every 4th": Recipe(Sharing(), cycle="signs", merges=4),
    "staggered MoRA": Recipe(Sharing(), schemes=STAGGERED),
    "staggered shifts": Recipe(Sharing(), cycle="shifts", merges=True, schemes=STAGGERED),
    "random groups": Recipe(Sharing(), merges=True, random=True),
    "rotation": Recipe(Rotation(), merges=True),
    "cycled rotation": Recipe(Rotation(wrap=True), merges=True),
}

#: MoRA's schemes, and at what multiple of sharing's rate the search for theirs begins.
SCHEMES = {
    "sharing": (Sharing(), 1),
    "rotation": (Rotation(), 2),
    "cycled rotation": (Rotation(wrap=True), 2),
    "decoupling": (Decoupling(), 2),
    "truncation": (Truncation(), 2),
}


def adapters(rank: int, rate: float, lora_rate: float) -> dict[str, Recipe]:
    """Adapters of a pretrained model that have as many parameters as LoRA of this rank."""
    return {f"LoRA {rank}": Recipe(LowRank(), rank, lora_rate)} | {
        f"{name} {rank}": Recipe(scheme, rank, multiple * rate)
        for name, (scheme, multiple) in SCHEMES.items()
    }


#: Of a pretrained model, on text.
FINETUNING = {
    "all parameters": Recipe(None, rate=1e-4),
    **adapters(8, 5e-4, 2e-3),
    "contiguous sharing 8": Recipe(scheme_from_mora_type(2), 8, 5e-4),
    "ReLoRA 8": Recipe(LowRank(), 8, 4e-3, merges=True),
    "ReMoRA 8": Recipe(Sharing(), 8, 5e-4, merges=True),
    "DoRA 8": Recipe(LowRank(), 8, 2e-3, dora=True),
    "DoRA on sharing 8": Recipe(Sharing(), 8, 5e-4, dora=True),
    **adapters(128, 2.5e-4, 1e-3),
}


def draw_groups(plan: mora_jax.Plan, seed: int, merges: int) -> Groups:
    """Random groups for every kernel: a function of the seed and of how many merges there were."""
    rng = np.random.default_rng((seed, merges))
    return {
        kernel: (rng.permutation(spec.features[0]), rng.permutation(spec.features[1]))
        for kernel, spec in zip(plan.kernel_paths(), plan.values(), strict=True)
    }


def permuted(params: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """Kernels [..., I, O] with their features permuted; everything else as it is."""
    leaves: dict[str, Any] = {**traverse_util.flatten_dict(params, sep="/")}
    for path, (inputs, outputs) in groups.items():
        leaves[path] = jnp.take(jnp.take(leaves[path], inputs, axis=-2), outputs, axis=-1)
    return traverse_util.unflatten_dict(leaves, sep="/")


def inverse(groups: Groups) -> Groups:
    """The groups that undo a permutation."""
    return {path: (np.argsort(i), np.argsort(o)) for path, (i, o) in groups.items()}
