"""The ways to train that are compared: what is adapted, by which scheme, and when it merges."""

import dataclasses
from typing import Any

import mora_jax
from custom_scheme import RandomGroups
from mora_jax import Decoupling, LowRank, Rotation, Sharing, Truncation, scheme_from_mora_type


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
      dora: as in `MoRAConfig`.
      schemes: as in `MoRAConfig`.
    """

    scheme: mora_jax.Scheme | None
    rank: int | None = None
    rate: float = dataclasses.field(default=4e-3, repr=False)  # no result depends on it
    cycle: Any = None
    merges: bool | int = False
    dora: bool = False
    schemes: Any = ()


#: Each kind of layer has other groups, or what a group ties together would be tied in all of them.
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STAGGERED = tuple((rf".*{kind}", Sharing(shift=shift)) for shift, kind in enumerate(KINDS))

#: Random groups are the bound that a regrouping can hope for. Each kind of layer draws its own, and
#: others after every merge.
DRAWN = tuple((rf".*{kind}", RandomGroups(1000 * number)) for number, kind in enumerate(KINDS))

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
    "random groups": Recipe(RandomGroups(), cycle="auto", merges=True, schemes=DRAWN),
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
