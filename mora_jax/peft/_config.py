"""`adapter_config.json`: what PEFT, and the authors' fork of it, say of an adapter.

The fork writes PEFT's fields and two more, `use_mora` and `mora_type`. Fields that change what an
adapter computes are read or refused by name; those that do not are passed over.

Names of modules may be regular expressions, and a file may come from anyone: `re` would search for
ever through some. The package regex finds the same and can be told when to give up; braces that it
alone gives a meaning are refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import regex

from mora_jax._schemes.base import Scheme
from mora_jax._schemes.low_rank import LowRank
from mora_jax._schemes.operators import check_rank
from mora_jax._schemes.registry import scheme_from_mora_type

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

#: Fields that say nothing of what an adapter computes, whatever stands in them.
_PASSED_OVER = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",  # how the base stores its weights
    "inference_mode",
    "layers_pattern",  # of layers_to_transform
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # of use_qalora
    "revision",
    "runtime_config",
    "task_type",
}
#: Ways to start an adapter that leave its base as it is; others (PiSSA, OLoRA) change its weights.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_LARGEST_RANK = 2**24
#: What regex takes for a count of errors, and `re` as it stands.
_FUZZY = re.compile(r"\{[^\d,}]")
#: Seconds that a pattern may take for one name; those of real adapters take microseconds.
_PATTERN_TIMEOUT_SECONDS = 0.1

Modules = str | tuple[str, ...]


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

    def selects(self, module: str) -> bool:
        """Whether PEFT adapts the module of this name.

        Raises:
          ValueError: as `rank_of` and `scheme_of` do: for a pattern that takes too long, by name.
        """
        return self._names("target_modules", self.targets, module) and not self._names(
            "exclude_modules", self.exclude, module
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

    def _names(self, key: str, modules: Modules, module: str) -> bool:
        if isinstance(modules, str):
            return bool(modules) and self._matches(key, modules, module)
        return ends_as(modules, module)

    def _value(self, key: str, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        """The value of the first pattern that matches a module's name, as in PEFT."""
        for pattern, value in patterns.items():
            if self._matches(key, pattern_of(pattern).pattern, module):
                return value
        return patterns.get(module, default)

    def _matches(self, key: str, pattern: str, module: str) -> bool:
        try:
            return regex.fullmatch(pattern, module, timeout=_PATTERN_TIMEOUT_SECONDS) is not None
        except TimeoutError as error:
            raise ValueError(
                f"{self.file}: {key} has the pattern {pattern!r:.200}, which takes longer than "
                f"{_PATTERN_TIMEOUT_SECONDS} s for the name {module!r}: given up. Adapters name "
                "modules by patterns that take microseconds; is the file from someone you trust?"
            ) from error

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
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an object of fields.")
    try:
        return dataclasses.replace(_parse(fields), file=str(path))
    except (ValueError, TypeError, re.error, regex.error, OverflowError, RecursionError) as error:
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
    for name, value in fields.items():
        if name not in _PASSED_OVER and value not in (None, False, "", [], {}):
            raise ValueError(f"{name}={value!r} is not supported.")
    return config


def ends_as(names: tuple[str, ...], module: str) -> bool:
    """Whether a list of `target_modules` names a module: by the end of its name."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def pattern_of(pattern: str) -> re.Pattern[str]:
    """What a key of `rank_pattern` matches: the end of a module's name."""
    return re.compile(rf"(.*\.)?({pattern})$")


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
        _check_pattern(value)
        return value
    if not isinstance(value, list) or not all(isinstance(module, str) for module in value):
        raise ValueError(f"{name} is {value!r}, neither names of modules nor an expression.")
    return tuple(value)


def _check_pattern(pattern: str) -> None:
    re.compile(pattern)  # what PEFT refuses
    if _FUZZY.search(pattern):
        raise ValueError(f"the pattern {pattern!r:.200} has braces that hold no number of times.")
    regex.compile(pattern)


def _patterns(name: str, value: Any, check: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}, not an object of patterns.")
    for pattern, item in value.items():
        _check_pattern(pattern_of(pattern).pattern)
        check(f"{name}[{pattern!r}]", item)
    return value
