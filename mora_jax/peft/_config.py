"""`adapter_config.json`: what PEFT, and the authors' fork of it, say of an adapter.

The fork writes PEFT's fields and two more, `use_mora` and `mora_type`. Fields that change what an
adapter computes are read or refused by name; those that do not are passed over.

Names of modules may be regular expressions: `_patterns.py`. A file may come from anyone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from mora_jax._schemes.base import Scheme
from mora_jax._schemes.low_rank import LowRank
from mora_jax._schemes.operators import check_rank
from mora_jax._schemes.registry import scheme_from_mora_type
from mora_jax._text.json_reader import read_json_file
from mora_jax.peft._patterns import ModulePatterns, Modules, check_used

T = TypeVar("T")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

#: Fields that say nothing of what an adapter computes, whatever stands in them.
_PASSED_OVER = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",  # how the numbers started
    "fan_in_fan_out",  # how the base stores its weights
    "inference_mode",
    "layers_pattern",  # of layers_to_transform
    "megatron_core",
    "merge_weights",  # of PEFT 0.2: when the base is merged, not with what
    "peft_version",
    "qalora_group_size",  # of use_qalora
    "revision",
    "runtime_config",
    "task_type",
}
#: Ways to start an adapter that leave its base as it is; others (PiSSA, OLoRA) change its weights.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_LARGEST_RANK = 2**24
#: Why a field with a value is refused; of other fields it is not known what they do.
_REFUSED = {
    "enable_lora": "it splits one fused projection into several",
    "layer_replication": "it copies layers of the base",
    "layers_to_transform": "it chooses layers by their numbers",
    "lora_bias": "the adapter has biases",
    "modules_to_save": "these modules are trained in full, and replace those of the base",
    "target_parameters": "it adapts parameters that are no modules",
    "trainable_token_indices": "rows of an embedding are trained in full",
    "use_dora": "magnitudes are absolute in PEFT, and relative to the base's here",
}


def tensor_name(module: str, side: str) -> str:
    """What a module's `lora_A` (side "A") or `lora_B` is called in the file."""
    return f"base_model.model.{module}.lora_{side}.weight"


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The part of `adapter_config.json` that says what an adapter computes.

    Attributes:
      mora_type: the authors' number of the scheme; None for LoRA.
      rank: `r`, that of modules without one of their own.
      ranks: `rank_pattern`.
      alpha: `lora_alpha`; the authors' fork does not use it for MoRA.
      alphas: `alpha_pattern`.
      targets: `target_modules`, a regular expression or ends of names.
      exclude: `exclude_modules`, likewise.
      dropout: `lora_dropout`.
      rank_stabilized: `use_rslora`: alpha over the root of the rank.
      base_model: `base_model_name_or_path`; written, and not used where it is read.
      file: where it was read, for errors.
    """

    mora_type: int | None
    rank: int
    alpha: float
    targets: Modules
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exclude: Modules = ()
    dropout: float = 0.0
    rank_stabilized: bool = False
    base_model: str | None = None
    file: str = CONFIG
    patterns: ModulePatterns = dataclasses.field(
        default_factory=ModulePatterns, repr=False, compare=False
    )

    def selects(self, module: str) -> bool:
        """Whether PEFT adapts the module of this name.

        Raises:
          ValueError: as `rank_of` and `scheme_of` do: for a pattern that takes too long, by name.
        """
        with_file = self._with_file
        return with_file(self.patterns.names, "target_modules", self.targets, module) and (
            not with_file(self.patterns.names, "exclude_modules", self.exclude, module)
        )

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        return self._value("rank_pattern", self.ranks, module, self.rank)

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of one module."""
        if self.mora_type is not None:
            return scheme_from_mora_type(self.mora_type)
        alpha = self._value("alpha_pattern", self.alphas, module, self.alpha)
        if self.rank_stabilized:
            alpha *= math.sqrt(self.rank_of(module))
        return LowRank(alpha)

    def check_used(self, modules: Collection[str]) -> None:
        """Raises ValueError for a pattern of ranks or alphas that matches no adapted module."""
        for key, values in (("rank_pattern", self.ranks), ("alpha_pattern", self.alphas)):
            self._with_file(check_used, self.patterns, key, values, modules)

    def _value(self, key: str, values: Mapping[str, Any], module: str, default: Any) -> Any:
        """The value of the first pattern that matches a module's name, as in PEFT."""
        found = self._with_file(self.patterns.key_of, key, values, module)
        return default if found is None else values[found]

    def _with_file(self, function: Callable[..., T], *args: Any) -> T:
        """What a function returns, its errors with the file's name."""
        try:
            return function(*args)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error

    def to_json(self) -> str:
        """The file's text, with the fields that every version of PEFT and the fork have."""
        fields: dict[str, Any] = {
            "alpha_pattern": dict(self.alphas),
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": dict(self.ranks),
            "target_modules": self.targets if isinstance(self.targets, str) else [*self.targets],
            "task_type": None,
        }
        if self.mora_type is not None:
            fields |= {"use_mora": True, "mora_type": self.mora_type}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def read_config(path: pathlib.Path) -> PeftConfig:
    """Reads `adapter_config.json`.

    Raises:
      ValueError: naming the file and the field, where it is not what PEFT or the fork writes, or
        says something that this library does not compute.
    """
    fields = read_json_file(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an object of fields.")
    try:
        return dataclasses.replace(_parse(fields), file=str(path))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(fields: dict[str, Any]) -> PeftConfig:
    take = fields.pop
    if (kind := take("peft_type", None)) != "LORA":
        raise ValueError(f"peft_type is {kind!r}, not 'LORA' (MoRA is a kind of it in the fork).")
    mora_type = None
    if _flag("use_mora", take("use_mora", False)):
        mora_type = take("mora_type", None)
        if isinstance(mora_type, bool) or not isinstance(mora_type, int):
            raise ValueError(f"mora_type is {mora_type!r}, not a number.")
        scheme_from_mora_type(mora_type)
    take("mora_type", None)  # the fork writes one for LoRA too
    if (start := take("init_lora_weights", True)) not in _STARTS:
        raise ValueError(f"init_lora_weights={start!r} changes the base's weights: not supported.")
    if (bias := take("bias", "none")) != "none":
        raise ValueError(f"bias={bias!r}: biases trained beside an adapter are not supported.")
    stabilized = _flag("use_rslora", take("use_rslora", False))
    alpha = take("lora_alpha", None if mora_type is None else 1)
    config = PeftConfig(
        mora_type,
        _rank("r", take("r", None)),
        _positive("lora_alpha", alpha),
        _modules("target_modules", take("target_modules", None)),
        _patterns("rank_pattern", take("rank_pattern", None), _rank),
        _patterns("alpha_pattern", take("alpha_pattern", None), _positive),
        _modules("exclude_modules", take("exclude_modules", None) or []),
        _dropout(take("lora_dropout", 0.0)),
        stabilized and mora_type is None,
    )
    if not config.targets:
        raise ValueError("target_modules is empty; it must name the adapted modules.")
    _check_rest(fields)
    _add_patterns(config)
    return config


def _check_rest(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for fields that are not read, unless they change nothing."""
    for name, value in fields.items():
        if name not in _PASSED_OVER and value not in (None, False, "", [], {}):
            why = f": {_REFUSED[name]}" if name in _REFUSED else ""
            raise ValueError(f"{name}={value!r:.200} is not supported{why}.")


def _add_patterns(config: PeftConfig) -> None:
    """Parses the patterns of every field, or raises ValueError."""
    for name, modules in (
        ("target_modules", config.targets),
        ("exclude_modules", config.exclude),
    ):
        if isinstance(modules, str):
            config.patterns.add(name, [modules])
    config.patterns.add("rank_pattern", config.ranks)
    config.patterns.add("alpha_pattern", config.alphas)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, neither true nor false.")
    return value


def _rank(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_RANK:
        raise ValueError(f"{name} is {value!r}, not a rank: a positive integer.")
    return check_rank(value)


def _positive(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} is {value!r}, not a positive number.")
    return value


def _dropout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"lora_dropout is {value!r}, not a rate in [0, 1).")
    return float(value)


def _modules(name: str, value: Any) -> Modules:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(module, str) for module in value):
        raise ValueError(f"{name} is {value!r:.200}, neither names of modules nor an expression.")
    return tuple(value)


def _patterns(name: str, value: Any, check: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.200}, not an object of patterns.")
    for pattern, item in value.items():
        check(f"{name}[{pattern!r:.200}]", item)
    return value
