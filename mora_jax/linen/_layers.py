"""linen layers with adapters: a `dot_general` module, and layers as functions of their kernel.

`Dense` and `DenseGeneral` take a `dot_general_cls`: `MoRA` is one, a module that makes its adapter
beside the kernel it is called with. `Einsum`, `Conv` and `Embed` have no such field, and run as
functions of their kernel (`_tracing/interpreter.py`).
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mora_jax._arrays.boxes import box_like
from mora_jax._arrays.paths import ADAPTER, join_path
from mora_jax._params.checks import no_adapter, other_adapter
from mora_jax._plans.config import MoRAConfig
from mora_jax._plans.layer import LayerConfig
from mora_jax._product.axes import KernelAxes, einsum_axes, kernel_axes
from mora_jax._product.dot import dropout, mora_dot_general
from mora_jax._product.per_example import ExampleIds, bank_size, holds_bank, unstack_bank
from mora_jax._tracing.interpreter import trace
from mora_jax._tracing.kernel_views import AdaptedView

#: The layers that "all-linear" means: those that take a `dot_general_cls`, and einsums.
LINEAR = (nn.Dense, nn.DenseGeneral, nn.Einsum)

#: Layers that are adapted where a pattern names them; with einsums, those that run as functions.
ADAPTED_WHEN_NAMED = (nn.Conv, nn.Embed)

#: Names of what the recorder leaves beside an adapter, see `_recorder.py`.
PROBES = ("kernel", "adapter")

#: Set while a layer runs as a function of its kernel, so that it is not adapted once more.
RUNNING_AS_FUNCTION: contextvars.ContextVar[bool] = contextvars.ContextVar("WITHIN", default=False)


#: Which adapter of a bank each example has, within a call of an adapted model. Layers see it at
#: whatever depth: a lifted transformation hands on the collections that it was told of, no others.
IDS_OF_EXAMPLES: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar(
    "IDS_OF_EXAMPLES", default=None
)


#: Paths of the layers that have used their adapter, where a call notes them.
USED_LAYERS: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar(
    "USED_LAYERS", default=None
)


class _Uncaptured(nn.Module):
    """A module of which `capture_intermediates` stores nothing: the base model does not have it."""

    @nn.nowrap
    def sow(self, *args: Any, **kwargs: Any) -> bool:
        """Stores nothing."""
        del args, kwargs
        return False


class MoRA(_Uncaptured):
    """A `dot_general` with an adapter of its own, for a layer's `dot_general_cls`.

    Parameters: `matrix` [B..., R, R] zeros, or for `LowRank` `a` [B..., I, rank] and `b`
    [B..., rank, O]; with DoRA `magnitude` [B..., 1, O] ones; B the batch axes of the product. The
    kernel it is called with is taken as frozen, unless `config.train_kernel`: its gradient is zero
    and never formed.

    Attributes:
      config: rank, scheme, placement, dropout, dtype.
      dot_general: the base product.

    >>> from mora_jax import Sharing
    >>> config = LayerConfig(rank=1, scheme=Sharing())
    >>> layer = nn.Dense(6, dot_general_cls=functools.partial(MoRA, config, name="mora"))
    >>> params = layer.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix_sharing': (3, 3)}}
    """

    config: LayerConfig
    dot_general: Callable[..., jax.Array] = lax.dot_general

    @nn.compact
    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        """Like `jax.lax.dot_general`, with the delta added."""
        config = self.config
        adapter, examples = _leaves(self, rhs, kernel_axes(rhs, dimension_numbers))
        if examples is not None:
            examples.check(lhs.shape, dimension_numbers)
        dropped = None
        if config.dropout and self.has_rng(ADAPTER):
            dropped = dropout(lhs, config.dropout, self.make_rng(ADAPTER))
        return mora_dot_general(
            lhs,
            rhs,
            dimension_numbers,
            adapter,
            config.scheme,
            placement=config.placement,
            precision=precision,
            preferred_element_type=preferred_element_type,
            adapter_lhs=dropped,
            adapter_ids=None if examples is None else examples.ids,
            frozen=not config.train_kernel,
            feature_sharding=config.feature_sharding,
            keep_sums=config.keep_sums,
            dot_general=self.dot_general,
        )


class Leaves(_Uncaptured):
    """The adapter of a layer that runs as a function of its kernel.

    Attributes:
      config: rank, scheme and options.
      kernel_name: the layer's name for its kernel.
    """

    config: LayerConfig
    kernel_name: str = "kernel"

    @nn.compact
    def __call__(
        self, kernel: jax.Array, axes: KernelAxes, key: jax.Array | None = None
    ) -> AdaptedView:
        """The kernel with its adapter; `key` drops inputs of the adapter."""
        adapter, examples = _leaves(self, kernel, axes, self.kernel_name)
        return AdaptedView.of(kernel, adapter, axes, self.config, key, examples)


def _leaves(
    module: Any, kernel: jax.Array, axes: KernelAxes, name: str = "kernel"
) -> tuple[dict[str, Any], ExampleIds | None]:
    """The adapter of a layer, made where there is none, or the bank that it holds."""
    layer, ids = join_path(*module.path[:-1]), IDS_OF_EXAMPLES.get()
    _, in_features, out_features = axes.sizes(kernel.shape)
    shapes = module.config.shapes(in_features, out_features)
    rows = {name: shape[0] for name, shape in shapes.items()}
    if (used := USED_LAYERS.get()) is not None:
        used.add(layer)
    names = {name: module.config.stored_name(name) for name in rows}
    _check_stored(module, layer, set(names.values()))
    found = {name: module.get_variable("params", stored) for name, stored in names.items()}
    stored = {name: nn.unbox(leaf) for name, leaf in found.items() if leaf is not None}
    if stored and ids is not None:
        return unstack_bank(stored, rows, layer), ExampleIds(ids, layer)
    if (count := bank_size(stored, rows)) > 1:
        raise holds_bank(count, f"the parameters of the layer {layer!r}")
    return _make_leaves(module, kernel, axes, name), None


def _check_stored(module: Any, layer: str, wanted: set[str]) -> None:
    """Raises ValueError where the parameters have no adapter for a layer, or another scheme."""
    there = set(module.variables.get("params", {})) - set(PROBES)
    if there - wanted:
        raise other_adapter(layer, there, wanted, module.config.scheme)
    if wanted - there and not module.is_mutable_collection("params"):
        raise no_adapter(layer)


def _make_leaves(module: Any, kernel: jax.Array, axes: KernelAxes, name: str) -> dict[str, Any]:
    config, leaves = module.config, {}
    batch, in_features, out_features = axes.sizes(kernel.shape)
    # As it is stored, in its box where it is partitioned.
    layer = module.scope.parent
    stored = None if layer is None else layer.get_variable("params", name)
    common = dict(enumerate(axes.batch))

    def boxed(key, shape, dtype, start):
        return box_like(stored, start(key, shape, dtype), common, name)

    for name, leaf in config.leaves(in_features, out_features).items():
        make, shape = functools.partial(boxed, start=leaf.start), (*batch, *leaf.shape)
        stored_name = config.stored_name(name)
        leaves[name] = module.param(stored_name, make, shape, jnp.dtype(config.dtype))
    return leaves


def is_adaptable(layer: nn.Module, method: str, chooser: Any) -> bool:
    """Whether a call is one of a layer that adapters can be asked for."""
    if RUNNING_AS_FUNCTION.get():
        return False
    asked = not isinstance(chooser, MoRAConfig) or chooser.targets != "all-linear"
    if isinstance(layer, ADAPTED_WHEN_NAMED) and asked:
        return method == "__call__" or (method == "attend" and isinstance(layer, nn.Embed))
    return isinstance(layer, LINEAR) and method == "__call__"


def kernel_name(layer: nn.Module) -> str:
    """The layer's name for its kernel."""
    return "embedding" if isinstance(layer, nn.Embed) else "kernel"


def as_function(
    layer: Any,
    method: str,
    next_fun: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    config: LayerConfig,
) -> Any:
    """Runs a layer as a function of its kernel, whose products are then adapted."""
    name = kernel_name(layer)
    if not layer.has_variable("params", name):
        next_fun(*args, **kwargs)  # makes the layer's own parameters
    params = {k: v for k, v in nn.unbox(layer.variables["params"]).items() if k != ADAPTER}
    axes = _axes_of(layer, params[name], args)
    if config.dropout and isinstance(layer, ADAPTED_WHEN_NAMED):
        raise ValueError(
            f"dropout={config.dropout} for {join_path(*layer.path)!r}, a {type(layer).__name__}: "
            "convolutions and embeddings have none."
        )
    key = layer.make_rng(ADAPTER) if config.dropout and layer.has_rng(ADAPTER) else None
    scope: Any = layer.scope
    leaves = Leaves(config, name, parent=scope.push(ADAPTER, reuse=True))
    view = leaves(params[name], axes, key)
    alone = layer.clone(parent=None, name=None)

    def call(kernel, args, kwargs):
        return alone.apply({"params": params | {name: kernel}}, *args, method=method, **kwargs)

    token = RUNNING_AS_FUNCTION.set(True)
    try:
        traced = trace(call, params[name], args, kwargs)
    finally:
        RUNNING_AS_FUNCTION.reset(token)
    return traced.run([view, *traced.arrays[1:]])


def _axes_of(layer: Any, kernel: jax.Array, args: tuple) -> KernelAxes:
    if isinstance(layer, nn.Einsum):
        equation = layer.einsum_str or args[1]
        if (axes := einsum_axes(equation)) is None:
            raise ValueError(
                f"einsum {equation!r} at {join_path(*layer.path)!r} contracts no axis of its "
                "kernel, or leaves none; leave the layer out with MoRAConfig.exclude."
            )
        return axes
    return KernelAxes(tuple(range(kernel.ndim - 1)), (kernel.ndim - 1,))


def uses_mora(layer: Any) -> bool:
    dot_general_cls = getattr(layer, "dot_general_cls", None)
    return isinstance(dot_general_cls, functools.partial) and dot_general_cls.func is MoRA
