"""Names of PyTorch modules for kernels in a tree of parameters, as data.

A `KernelName` is a pair of patterns. Of a Llama whose layers stand side by side, and of one whose
layers are stacked (the stack is the kernel's first axis, each element is a module of its own):

    model/layers/{layer}/*/*/kernel    model.layers.{layer}.*.*
    layers/*/*/kernel                  model.layers.{layer}.*.*
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mora_jax._product.axes import KernelAxes

_FIELD = re.compile(r"(\*|\{\w+\})")


@dataclasses.dataclass(frozen=True)
class KernelName:
    """Which PyTorch modules the kernels at some paths are.

    In both patterns `{word}` stands for a number and `*` for a part of the path between slashes
    (dots in the module's name); what stands for `*` goes over in its order, for `{word}` by its
    name. A `{word}` of the module alone counts the elements of the kernel's stack; several count
    its several batch axes, in their order.

    Args:
      path: pattern of a whole path, that of the kernel itself.
      module: pattern of the module's name, as `named_modules()` of the PyTorch model has it.
      axes: which axes of the kernel are inputs, outputs and batch. None for `[..., I, O]`, with as
        many batch axes as the module has numbers of its own.

    >>> KernelName("layers/*/*/kernel", "model.layers.{layer}.*.*").modules(
    ...     "layers/mlp/up_proj/kernel", (2, 64, 172)).modules
    ('model.layers.0.mlp.up_proj', 'model.layers.1.mlp.up_proj')
    """

    path: str
    module: str
    axes: KernelAxes | None = None

    def __post_init__(self):
        here, there = _FIELD.findall(self.path), _FIELD.findall(self.module)
        if here.count("*") != there.count("*"):
            raise ValueError(f"{self}: both patterns must have as many '*'.")
        numbers = [field for field in here if field != "*"]
        if unknown := set(numbers) - set(there):
            raise ValueError(f"{self}: the module's name has no {sorted(unknown)}.")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{self}: a number stands twice in the path.")
        if self.axes is not None and len(self.axes.batch) != len(self._stack()):
            raise ValueError(
                f"{self}: {len(self.axes.batch)} batch axes, but the module's name counts "
                f"{self._stack() or 'none'}."
            )

    def matches(self, path: str) -> bool:
        """Whether a kernel's path is one of these."""
        return self._match(path) is not None

    def modules(self, path: str, shape: Sequence[int]) -> TorchKernel:
        """The modules that the kernel at `path` is, and its axes.

        Raises:
          ValueError: where the path is none of these, or the kernel has other axes.
        """
        if (match := self._match(path)) is None:
            raise ValueError(f"{path!r} does not match {self.path!r}.")
        stack, axes = self._stack(), self.axes
        if axes is None:
            batch = tuple(range(len(stack)))
            axes = KernelAxes((len(stack),), (len(stack) + 1,), batch)
        if sorted(axes.batch + axes.inputs + axes.outputs) != list(range(len(shape))):
            said = f"{self.axes}" if self.axes else f"{len(stack)} stacked axes, inputs, outputs"
            raise ValueError(
                f"{path!r} has shape {tuple(shape)}, but {self.module!r} is for a kernel of "
                f"{said}. State its axes: "
                f"KernelName({self.path!r}, {self.module!r}, KernelAxes(...))."
            )
        counts = [range(size) for size in axes.sizes(shape)[0]]
        numbers = (dict(zip(stack, index, strict=True)) for index in itertools.product(*counts))
        return TorchKernel(axes, tuple(self._write(match, number) for number in numbers))

    def _stack(self) -> tuple[str, ...]:
        """The numbers that the module's name alone has, in their order."""
        here = _FIELD.findall(self.path)
        fields = (field for field in _FIELD.findall(self.module) if field not in ("*", *here))
        return tuple(dict.fromkeys(fields))

    def _match(self, path: str) -> dict[str, list[str]] | None:
        parts = _FIELD.split(self.path)
        fields = parts[1::2]
        for index, part in enumerate(parts):
            if index % 2 == 0:
                parts[index] = re.escape(part)
            else:
                parts[index] = r"([^/.]+)" if part == "*" else r"(\d+)"
        if (match := re.fullmatch("".join(parts), path, re.ASCII)) is None:
            return None
        found: dict[str, list[str]] = {}
        for field, text in zip(fields, match.groups(), strict=True):
            found.setdefault(field, []).append(text)
        return found

    def _write(self, match: Mapping[str, list[str]], numbers: Mapping[str, int]) -> str:
        words = iter(match.get("*", ()))

        def fill(field):
            if field == "*":
                return next(words)
            return str(numbers[field]) if field in numbers else match[field][0]

        parts = _FIELD.split(self.module)
        return "".join(fill(p) if index % 2 else p for index, p in enumerate(parts))


class TorchKernel(NamedTuple):
    """A kernel as PyTorch has it.

    Attributes:
      axes: the kernel's axes.
      modules: names of its modules, one for every element of the stack, in its order.
    """

    axes: KernelAxes
    modules: tuple[str, ...]


#: Kernels of Llama and its relatives: layers side by side, or stacked for a scan.
LLAMA_KERNELS = (
    KernelName("lm_head/kernel", "lm_head"),
    KernelName("model/layers/{layer}/*/*/kernel", "model.layers.{layer}.*.*"),
    KernelName("model/layers_{layer}/*/*/kernel", "model.layers.{layer}.*.*"),
    KernelName("model/layers/*/*/kernel", "model.layers.{layer}.*.*"),
    KernelName("layers/{layer}/*/*/kernel", "model.layers.{layer}.*.*"),
    KernelName("layers_{layer}/*/*/kernel", "model.layers.{layer}.*.*"),
    KernelName("layers/*/*/kernel", "model.layers.{layer}.*.*"),
)


def torch_kernels(
    shapes: Mapping[str, Sequence[int]], names: Iterable[KernelName]
) -> tuple[dict[str, TorchKernel], dict[str, str]]:
    """(path -> modules of a kernel, path -> why it is none); the first name that matches counts.

    Raises:
      ValueError: where two kernels have one name.
    """
    names, found, left = tuple(names), {}, {}
    owners: dict[str, str] = {}
    for path, shape in shapes.items():
        name = next((name for name in names if name.matches(path)), None)
        if name is None:
            left[path] = f"{path!r} matches no name"
            continue
        try:
            found[path] = name.modules(path, shape)
        except ValueError as error:
            left[path] = str(error)
            continue
        for module in found[path].modules:
            if (other := owners.setdefault(module, path)) != path:
                raise ValueError(f"names give {other!r} and {path!r} one module, {module!r}.")
    return found, left
