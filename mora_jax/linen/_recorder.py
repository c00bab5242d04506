"""What one trace of a linen model tells of its layers.

The model's `init` runs on shapes, and an interceptor notes the layers that it meets. Probes, which
are parameters of sizes found nowhere else, show where the axes of stacked layers lie.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import core
from flax import linen as nn

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.paths import ADAPTER, flatten, join_path
from mora_jax._plans.layer import AdapterSpec, LayerConfig
from mora_jax._product.axes import KernelAxes, kernel_axes
from mora_jax.linen._adapt import entered
from mora_jax.linen._kernel_uses import AS_INIT, check_kernel_uses, mark_kernels
from mora_jax.linen._layers import PROBES, Leaves, MoRA, is_adaptable
from mora_jax.linen._scopes import Marks

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
      kinds: path -> name of its class, of every module.
      nested: paths of layers that run under an `apply` of their own, on parameters that the model
        hands them.
      without_stream: paths of layers that ask for dropout and get no random numbers.
    """

    def __init__(self, chooser: Any):
        self._chooser = chooser
        self._running: list[str] = []
        self.linear: dict[str, None] = {}
        self.adapted: dict[str, Noted] = {}
        self.kinds: dict[str, str] = {}
        self.nested: dict[str, None] = {}
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
        """Runs the model's `init` on shapes; gives path -> shape of its parameters and probes.

        Raises:
          ValueError: for adapted layers whose kernel is not the stored one, or read elsewhere.
        """
        # Nothing is drawn from these keys: only shapes come out.
        streams = rngs if isinstance(rngs, Mapping) else {"params": jax.random.key(0)}
        streams = {ADAPTER: jax.random.key(0), **streams}
        arrays, restore = _arrays_of((inputs, kwargs))

        method = entered(model, method)

        def run(interceptor, variables, arrays, mutable, flags):
            (inputs, kwargs), number = restore(arrays), next(_TRACES)
            # Every module has traces of its own in the model's own `nn.jit`.
            marks = Marks("mora_plan", lambda path: (number, path))

            def marked(scope, *inputs, **kwargs):
                marks.put_on(scope)
                return method(scope, *inputs, **kwargs)

            with nn.intercept_methods(functools.partial(interceptor, marks)):
                call = core.apply(marked, mutable, flags)
                return call(variables, *inputs, rngs=streams, **kwargs)

        def init(arrays):
            return run(self._note, {}, arrays, *AS_INIT)[1]

        variables = jax.eval_shape(init, arrays)
        kernels = {join_path(path, layer.kernel_name): path for path, layer in self.adapted.items()}
        if kernels:
            check_kernel_uses(functools.partial(run, mark_kernels), variables, arrays, kernels)
        shapes = flatten(variables.get("params", {}))
        return {path: unbox(leaf) for path, leaf in shapes.items()}

    def _note(self, marks: Marks, next_fun, args, kwargs, context):
        """The interceptor."""
        module, method = context.module, context.method_name
        if not marks.are_on(module):
            self._note_nested(module, method)
            return next_fun(*args, **kwargs)
        marks.enter(module)
        path = join_path(*module.path)
        self.kinds[path] = type(module).__name__
        if is_adaptable(module, method, self._chooser):
            self.linear[path] = None
        if method == "__call__" and isinstance(module, Leaves):
            kernel, axes = args[:2]
            self._note_adapter(module, kernel, Noted(axes, module.config, module.kernel_name))
        if method == "__call__" and isinstance(module, MoRA):
            _, kernel, dimension_numbers = args[:3]
            noted = Noted(kernel_axes(kernel, dimension_numbers), module.config)
            layer = self._note_adapter(module, kernel, noted)
            if module.config.dropout and not module.has_rng(ADAPTER):
                self.without_stream.add(layer)
        self._running.append(path)
        try:
            return next_fun(*args, **kwargs)
        finally:
            self._running.pop()

    def _note_nested(self, module: nn.Module, method: str) -> None:
        """Notes a layer that is not of the model's tree, by the module that runs it."""
        if module.scope is None or not is_adaptable(module, method, self._chooser):
            return
        own = module.path or (module.name or type(module).__name__,)
        self.nested[join_path(*self._running[-1:], *own)] = None

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


def _arrays_of(tree: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """The arrays of a tree, or their shapes, and the tree with others in their place.

    What is no array stays, such as `deterministic=True`.
    """
    leaves, structure = jax.tree.flatten(tree)
    abstract = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def restore(arrays):
        arrays = iter(arrays)
        pairs = zip(leaves, abstract, strict=True)
        return structure.unflatten(next(arrays) if array else leaf for leaf, array in pairs)

    return [leaf for leaf, array in zip(leaves, abstract, strict=True) if array], restore
