"""Where NNX models have kernels, and which of their axes are inputs and outputs.

Layers of Flax say it themselves; for others the config does (`MoRAConfig.kernels`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax import nnx

from mora_jax._arrays.paths import escape, join_path, list_paths
from mora_jax._plans.config import MoRAConfig, check_matches
from mora_jax._plans.layer import AdapterSpec, LayerConfig
from mora_jax._plans.plan import Plan
from mora_jax._product.axes import KernelAxes, einsum_axes
from mora_jax.nnx._hints import hints, reason_of
from mora_jax.nnx._stacks import Stacked, full_axes, known_parameters, stack_axes


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel in its layer.

    Attributes:
      layer: the layer.
      name: its name there.
      axes: as the layer sees it.
      shape: as the layer sees it.
      stacks: axes of the full kernel that its layer does not see.
    """

    layer: Any
    name: str
    axes: KernelAxes
    shape: tuple[int, ...]
    stacks: tuple[int, ...] = ()

    @property
    def variable(self) -> nnx.Variable:
        """The variable that holds it."""
        return vars(self.layer)[self.name]

    def spec(self, config: LayerConfig) -> AdapterSpec:
        """Its full layout, the axes of stacked layers included."""
        full = tuple(self.variable.shape)
        # A stack has one axis for all its parameters; the kernel's own batch axes come first
        # among the others.
        ndim = 2 + len(self.stacks) + len(self.axes.batch)
        # An adapter has fewer axes than some kernels: then the stack's is counted from the back.
        stacks = tuple(axis if axis < ndim else axis - len(full) + ndim for axis in self.stacks)
        free = (axis for axis in itertools.count() if axis not in stacks)
        adapter_axes = stacks + tuple(itertools.islice(free, len(self.axes.batch)))
        axes = full_axes(self.axes, self.stacks, len(full))
        return AdapterSpec(config, full, axes, adapter_axes, self.name)


def with_stacks(
    path: str, kernel: Kernel, chooser: MoRAConfig | Plan, parameters: list[Stacked]
) -> Kernel:
    """The kernel of the layer at `path`, with the axes along which it is stacked.

    Args:
      path: the layer's.
      kernel: its kernel.
      chooser: the config or plan, which may state the axes.
      parameters: what `known_parameters` gives.

    Raises:
      ValueError: if nothing tells the axes.
    """
    this = Stacked(path, tuple(kernel.variable.shape), kernel.shape)
    if isinstance(chooser, MoRAConfig):
        stated = chooser.kernel_axes(join_path(path, kernel.name))
    else:
        stated = chooser[path].kernel_axes if path in chooser else None
    declared = None if stated is None else stated.batch[: this.count]
    stacks = stack_axes(kernel.name, this, kernel.axes, parameters, declared)
    return dataclasses.replace(kernel, stacks=stacks)


def find_kernels(
    model: Any, chooser: MoRAConfig | Plan, parameters: Iterable[str]
) -> dict[str, Kernel]:
    """Path of a layer -> its kernel, for every layer that can have an adapter.

    Args:
      model: the model.
      chooser: the config or plan.
      parameters: paths of the model's parameters.

    Raises:
      ValueError: if a layer has several kernels, or if the config or the plan does not fit.
    """
    found: dict[str, Kernel] = {}
    for path, kernel in _kernels(model, chooser):
        if path in found:
            raise ValueError(
                f"layer {path!r} has several kernels, {found[path].name!r} and {kernel.name!r}, "
                "and can have one adapter: narrow the patterns of MoRAConfig.kernels."
            )
        found[path] = kernel
    if isinstance(chooser, MoRAConfig):
        try:
            check_matches(chooser, found, parameters)
        except ValueError as error:
            raise ValueError(" ".join([str(error), *hints(_modules(model))])) from error
    elif missing := chooser.keys() - found.keys():
        raise ValueError(
            f"the plan has layers at {list_paths(missing)}, where the model has none; "
            f"its linear layers: {list_paths(found)}. Was the plan made for another model?"
        )
    return found


def check_adaptable(
    path: str, kernel: Kernel, config: LayerConfig, tied: list[str], wrapper: str | None = None
) -> None:
    """Raises ValueError if the layer at `path` cannot have the adapter that the config wants.

    Args:
      path: the layer's.
      kernel: its kernel.
      config: what it is to get.
      tied: paths of the kernel, more than one if layers share it.
      wrapper: the wrapper that normalises the kernel in the forward pass, if one does.
    """
    if wrapper is not None:
        raise ValueError(
            f"layer {path!r} stands in {wrapper}, which writes other numbers into its kernel in "
            "every forward pass; a merge would add the delta to numbers that no layer multiplies "
            "by. Leave it out with MoRAConfig.exclude, or adapt the model as a function of its "
            "parameters, mora_jax.adapt(function, config)."
        )
    if len(tied) > 1:
        raise ValueError(
            f"{list_paths(tied)} are one tied weight; an adapter in one of these layers would not "
            "be seen by the other. Leave them out with MoRAConfig.exclude, or adapt the model "
            "as a function of its parameters."
        )
    if config.dropout and isinstance(kernel.layer, nnx.Conv | nnx.Embed):
        raise ValueError(
            f"dropout={config.dropout} for layer {path!r}, a {type(kernel.layer).__name__}: "
            "convolutions and embeddings have none."
        )


def wrappers_of(model: Any) -> dict[int, str]:
    """Identity of a variable that `WeightNorm` or `SpectralNorm` overwrites -> that wrapper."""
    found = {}
    for names, module in nnx.iter_modules(model):
        if not isinstance(module, nnx.WeightNorm | nnx.SpectralNorm):
            continue
        wrapper = f"the {type(module).__name__} at {path_of(names)!r}"
        for name, variable in nnx.to_flat_state(nnx.state(module.layer_instance, nnx.Param)):
            if isinstance(module, nnx.SpectralNorm) or module.variable_filter(name, variable):
                found[id(variable)] = wrapper
    return found


def _kernels(model: Any, chooser: MoRAConfig | Plan) -> Iterator[tuple[str, Kernel]]:
    """Every kernel that can be adapted, by its layer's path."""
    for names, layer in nnx.iter_modules(model):
        path = path_of(names)
        kind = next((kind for kind in _LAYOUTS if isinstance(layer, kind)), None)
        if kind is None:
            yield from _declared_kernels(path, layer, chooser)
            continue
        asked = isinstance(chooser, Plan) or chooser.targets != "all-linear"
        if (layout := _LAYOUTS[kind](layer)) and (kind in _LINEAR or asked):
            yield path, Kernel(layer, *layout)


def _declared_kernels(
    path: str, layer: Any, chooser: MoRAConfig | Plan
) -> Iterator[tuple[str, Kernel]]:
    """Kernels of layers of other kinds: the config, the plan or an equation states their axes."""
    params = {name: value for name, value in vars(layer).items() if isinstance(value, nnx.Param)}
    equation = getattr(layer, "einsum_str", None)
    for name, value in params.items():
        if isinstance(chooser, MoRAConfig):
            axes = chooser.kernel_axes(join_path(path, name))
            if axes is None and len(params) == 1 and isinstance(equation, str):
                axes = einsum_axes(equation)
        else:
            known = path in chooser and chooser[path].kernel_name == name
            axes = chooser[path].kernel_axes if known else None
        if axes is not None:
            yield path, Kernel(layer, name, axes, tuple(value.shape))


def parameters_with_shapes(model: Any) -> list[Stacked]:
    """The model's parameters of which their layers say the shape."""
    return known_parameters(_modules(model))


def reasons(model: Any, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(path, why it has no adapter) of the parameters at these paths."""
    modules = dict(_modules(model))
    for path in paths:
        owner = path.rpartition("/")[0]
        while owner not in modules:  # The root, "", is a module.
            owner = owner.rpartition("/")[0]
        yield path, reason_of(modules[owner])


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    return ((path_of(names), module) for names, module in nnx.iter_modules(model))


def path_of(names: tuple[Any, ...]) -> str:
    """The path of a module or a variable."""
    return join_path(*(escape(str(name)) for name in names))


def _linear(layer):
    return "kernel", KernelAxes((0,), (1,)), (layer.in_features, layer.out_features)


def _linear_general(layer):
    sizes = (tuple(layer.batch_axis.values()), layer.in_features, layer.out_features)
    axes = iter(range(sum(map(len, sizes))))
    batch, inputs, outputs = (tuple(itertools.islice(axes, len(part))) for part in sizes)
    return "kernel", KernelAxes(inputs, outputs, batch), sum(sizes, ())


def _einsum(layer):
    axes = layer.einsum_str and einsum_axes(layer.einsum_str)  # else it comes with every call
    return axes and ("kernel", axes, tuple(layer.kernel_shape))


def _conv(layer):
    shape = tuple(layer.kernel_shape)
    return "kernel", KernelAxes(tuple(range(len(shape) - 1)), (len(shape) - 1,)), shape


def _embed(layer):
    return "embedding", KernelAxes((0,), (1,)), (layer.num_embeddings, layer.features)


_LAYOUTS: dict[type, Callable[[Any], Any]] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Conv: _conv,
    nnx.Embed: _embed,
}

#: Those that "all-linear" means.
_LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
