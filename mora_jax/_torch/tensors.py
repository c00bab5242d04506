"""A whole model as PyTorch has it: the tensor of every parameter, and how its axes lie there.

`names.py` says which modules the kernels are. A kernel is `x @ W`, its inputs first, and a
torch linear layer holds the transpose; stacked layers are one array here and one tensor each there.
All else, embeddings and norms and biases, is kept as it is; `TensorName` says what that is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mora_jax._product.axes import KernelAxes
from mora_jax._torch.names import LLAMA_KERNELS, KernelName, TorchKernel, torch_kernels


@dataclasses.dataclass(frozen=True)
class TensorName(KernelName):
    """Which PyTorch tensors the parameters at some paths are, where both keep them alike.

    Patterns are those of `KernelName`, but `module` is the whole name of the tensor, `.weight` or
    `.bias` included. A number that it alone has counts the parameter's first axis.

    >>> name = TensorName("layers/*/scale", "model.layers.{layer}.*.weight")
    >>> name.tensors("layers/norm/scale", (2, 8))
    ('model.layers.0.norm.weight', 'model.layers.1.norm.weight')
    """

    def modules(self, path: str, shape: Sequence[int]) -> TorchKernel:
        """Raises ValueError: it is no linear layer."""
        del shape
        raise ValueError(f"{path!r} is {self.module!r} in PyTorch, no kernel of a linear layer")

    def tensors(self, path: str, shape: Sequence[int]) -> tuple[str, ...]:
        """The names of its tensors, one for each element of its stack, in their order."""
        return KernelName(self.path, self.module, self.axes_of(shape)).modules(path, shape).modules

    def axes_of(self, shape: Sequence[int]) -> KernelAxes:
        """The axes of its stack, and all others as outputs."""
        count = len(self._stack())
        return KernelAxes((), tuple(range(count, len(shape))), tuple(range(count)))


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """One tensor in PyTorch, and the place in the parameters that it is.

    Attributes:
      name: its name in PyTorch.
      path: path of the parameter.
      index: its place on the parameter's batch axes.
      shape: the parameter's shape.
      axes: the parameter's axes; without inputs where it is kept as it is.
    """

    name: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    axes: KernelAxes

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The tensor's shape in PyTorch: [O, I] of a kernel."""
        if not self.axes.inputs:
            return tuple(self.shape[axis] for axis in self.axes.outputs)
        _, inputs, outputs = self.axes.sizes(self.shape)
        return outputs, inputs

    @property
    def order(self) -> tuple[int, ...]:
        """PyTorch's order of the axes, numbered without those of the batch."""
        left = [axis for axis in range(len(self.shape)) if axis not in self.axes.batch]
        return tuple(map(left.index, self.axes.outputs + self.axes.inputs))


def torch_tensors(
    shapes: Mapping[str, Sequence[int]], names: Iterable[KernelName]
) -> dict[str, TorchTensor]:
    """Name in PyTorch -> tensor, for every parameter of a model; its own inverse.

    Args:
      shapes: path -> shape of the parameters, adapters left out.
      names: what they are called; the first that matches counts.

    Raises:
      ValueError: where a parameter has no name, or two tensors have one.

    >>> shapes = {"layers/mlp/up_proj/kernel": (2, 8, 24), "norm/scale": (8,)}
    >>> for name, tensor in torch_tensors(shapes, LLAMA).items():
    ...     print(name, tensor.path, tensor.index, tensor.torch_shape)
    model.layers.0.mlp.up_proj.weight layers/mlp/up_proj/kernel (0,) (24, 8)
    model.layers.1.mlp.up_proj.weight layers/mlp/up_proj/kernel (1,) (24, 8)
    model.norm.weight norm/scale () (8,)
    """
    names, tensors = tuple(names), {}
    kernels, left = torch_kernels(shapes, names)
    for path, shape in shapes.items():
        shape = tuple(shape)
        if path in kernels:
            axes, modules = kernels[path]
            own = [f"{module}.weight" for module in modules]
        else:
            name = next((name for name in names if name.matches(path)), None)
            if not isinstance(name, TensorName):
                raise ValueError(
                    f"what is it called in PyTorch? {left[path]}. names=(TensorName(path, tensor), "
                    "*LLAMA) names a parameter, KernelName(path, module) a kernel."
                )
            axes, own = name.axes_of(shape), name.tensors(path, shape)
        for name, index in zip(own, np.ndindex(*axes.sizes(shape)[0]), strict=True):
            tensor = TorchTensor(name, path, index, shape, axes)
            if (other := tensors.setdefault(name, tensor)) is not tensor:
                raise ValueError(f"{other.path!r} and {path!r} are both named {name!r}.")
    return tensors


def _kept_of_llama() -> Iterator[TensorName]:
    for top in ("model/", ""):
        yield TensorName(f"{top}embed_tokens/embedding", "model.embed_tokens.weight")
        for weight in ("scale", "weight"):
            yield TensorName(f"{top}norm/{weight}", "model.norm.weight")
        for layer in ("layers/{layer}", "layers_{layer}", "layers"):
            for weight in ("scale", "weight"):
                yield TensorName(f"{top}{layer}/*/{weight}", "model.layers.{layer}.*.weight")
                yield TensorName(f"{top}{layer}/*/*/{weight}", "model.layers.{layer}.*.*.weight")
            yield TensorName(f"{top}{layer}/*/*/bias", "model.layers.{layer}.*.*.bias")


#: Llama and its relatives (Mistral, Qwen, SmolLM), every parameter of them.
LLAMA: tuple[KernelName, ...] = (*LLAMA_KERNELS, *_kept_of_llama())
