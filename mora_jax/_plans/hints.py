"""What MoRAConfig's arguments are called elsewhere, for those who type what they know."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

#: A name in PEFT's LoraConfig, or a frequent guess -> what to write.
_HINTS = {
    "alpha": "MoRA has no alpha; LoRA's is scheme=mora_jax.LowRank(alpha=...)",
    "exclude_modules": "exclude=",
    "init_lora_weights": "new adapters are zero in MoRA; mora_jax.attach makes them",
    "layers_to_transform": "targets=, a pattern over paths, such as r'layers/[0-3]/.*'",
    "lora_alpha": "MoRA has no alpha; LoRA's is scheme=mora_jax.LowRank(alpha=...)",
    "lora_dropout": "dropout=",
    "lora_rank": "rank=",
    "modules_to_save": "also_train=, a pattern over parameters, such as r'lm_head/.*'",
    "mora_type": "scheme=mora_jax.scheme_from_mora_type(...)",
    "r": "rank=",
    "rank_pattern": "ranks=",
    "target_modules": "targets=",
    "target_patterns": "targets=",
    "trainable": "also_train=",
    "use_dora": "dora=",
    "use_mora": "mora_jax.adapt(model, config) uses it always",
    "wrap": "scheme=mora_jax.Rotation(wrap=True)",
}


def hint_at_names(cls: T) -> T:
    """Makes a dataclass say what to write for an argument that it does not have."""
    init: Any = cls.__init__

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        for name in kwargs:
            if name in _HINTS and name not in cls.__annotations__:
                raise TypeError(f"{cls.__name__} has no argument {name!r}; write {_HINTS[name]}.")
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls
