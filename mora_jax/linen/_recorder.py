"""What one trace of a linen model tells of its layers.

The model's `init` runs on shapes, and an interceptor notes the layers that it meets. Probes, which
are parameters of sizes found nowhere else, show where the axes of stacked layers lie.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.paths import ADAPTER, flatten, join_path
from mora_jax._plans.layer import AdapterSpec, LayerConfig
from mora_jax._product.axes import KernelAxes, kernel_axes
from mora_jax.linen._adapt import TRACE, mark_scope
from mora_jax.linen._layers import PROBES, Leaves, MoRA, is_adaptable

#: The axes of a probe have sizes from here on; no model stacks as many layers.
_PROBE_SIZE = 1_000_003


#: A number for every trace, so that `nn.jit` takes none of them, probes included, for another.
_TRACES = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Noted:
    """An adapted layer as the layer itself sees it, without the axes of stacked layers."""

    axes: KernelAxes
    config: LayerConfig
    kernel_name: str = "kernel"

    def spec(self, path: str, params: Mapping[str, Any]) -> AdapterSpec:
        """Its full layout, read off the probes.

        Args:
          path: the layer's.
          params: path -> array or shape, probes included.
        """
        stacks, axes = _axes_of(params[join_path(path, ADAPTER, "kernel")].shape)
        adapter_stacks, adapter_axes = _axes_of(params[join_path(path, ADAPTER, "adapter")].shape)
        batch = range(len(self.axes.batch))
        return AdapterSpec(
            config=self.config,
            kernel_shape=params[join_path(path, self.kernel_name)].shape,
            kernel_name=self.kernel_name,
            kernel_axes=KernelAxes(
                inputs=tuple(axes[axis] for axis in self.axes.inputs),
                outputs=tuple(axes[axis] for axis in self.axes.outputs),
                batch=stacks + tuple(axes[axis] for axis in self.axes.batch),
            ),
            adapter_batch_axes=adapter_stacks + tuple(adapter_axes[axis] for axis in batch),
        )


class Recorder:
    """Notes the layers that a model runs through.

    Attributes:
      linear: paths of the layers that can have an adapter, in the model's order.
      adapted: path -> layer, of those that have one.
      without_stream: paths of layers that ask for dropout and get no random numbers.
    """

    def __init__(self, chooser: Any):
        self._chooser = chooser
        self._number = next(_TRACES)
        self.linear: dict[str, None] = {}
        self.adapted: dict[str, Noted] = {}
        self.without_stream: set[str] = set()

    def trace(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        rngs: Any,
        method: Any,
    ) -> dict[str, Any]:
        """Runs the model's `init` on shapes; gives path -> shape of its parameters and probes."""

        def init(inputs, kwargs):
            # Nothing is drawn from these keys: only shapes come out.
            streams = rngs if isinstance(rngs, Mapping) else {"params": jax.random.key(0)}
            streams = {ADAPTER: jax.random.key(0), **streams}
            token = TRACE.set(self._number)
            try:
                with nn.intercept_methods(self._note):
                    return model.init(streams, *inputs, method=method, **kwargs)
            finally:
                TRACE.reset(token)

        shapes = flatten(_eval_shape(init, inputs, kwargs).get("params", {}))
        return {path: unbox(leaf) for path, leaf in shapes.items()}

    def _note(self, next_fun, args, kwargs, context):
        """The interceptor."""
        module = context.module
        mark_scope(module, mora_plan=self._number)
        if is_adaptable(module, context.method_name, self._chooser):
            self.linear[join_path(*module.path)] = None
        if context.method_name == "__call__" and isinstance(module, Leaves):
            kernel, axes = args
            self._note_adapter(module, kernel, Noted(axes, module.config, module.kernel_name))
        if context.method_name == "__call__" and isinstance(module, MoRA):
            _, kernel, dimension_numbers = args[:3]
            noted = Noted(kernel_axes(kernel, dimension_numbers), module.config)
            path = self._note_adapter(module, kernel, noted)
            if module.config.dropout and not module.has_rng(ADAPTER):
                self.without_stream.add(path)
        return next_fun(*args, **kwargs)

    def _note_adapter(self, module: Any, kernel: Any, noted: Noted) -> str:
        path = join_path(*module.path[:-1])
        self.adapted[path] = noted
        for name, ndim in zip(PROBES, (kernel.ndim, len(noted.axes.batch) + 2), strict=True):
            _leave_probe(module, name, ndim)
        return path


def _leave_probe(module: nn.Module, name: str, ndim: int) -> None:
    """Makes a parameter whose sizes are found nowhere else beside the adapter.

    Where nn.scan and nn.vmap put the axes of stacked layers shows in its full shape; in the shapes
    of real parameters two axes may be equally long, and a guess would be needed.
    """
    if not module.has_variable("params", name):
        shape = tuple(_PROBE_SIZE + axis for axis in range(ndim))
        module.param(name, lambda key: jnp.zeros(shape, jnp.int8))


def _axes_of(probe_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(axes of stacked layers, the layer's own axes in their order) of a probe's full shape.

    >>> _axes_of((24, _PROBE_SIZE, _PROBE_SIZE + 1))
    ((0,), (1, 2))
    """
    own = tuple(axis for axis, size in enumerate(probe_shape) if size >= _PROBE_SIZE)
    sizes = [probe_shape[axis] for axis in own]
    if sizes != sorted(sizes):
        raise ValueError(
            "a layer's parameters are stored in another order of axes than the layer uses "
            "(nn.map_variables?); such a layer cannot be merged. Leave it out with `exclude`."
        )
    return tuple(axis for axis in range(len(probe_shape)) if axis not in own), own


def _eval_shape(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """`jax.eval_shape` that leaves alone what is no array, such as `deterministic=True`."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    abstract = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def call(arrays):
        arrays = iter(arrays)
        merged = (
            next(arrays) if is_array else leaf
            for leaf, is_array in zip(leaves, abstract, strict=True)
        )
        return function(*structure.unflatten(merged))

    return jax.eval_shape(
        call, [leaf for leaf, is_array in zip(leaves, abstract, strict=True) if is_array]
    )
