"""NNX layers with adapters: subclasses of the layers' own classes.

`Linear`, `LinearGeneral` and `Einsum` take a product of ours by a field of their own. Any other
layer that holds a kernel, and a subclass of these with a `__call__` of its own, which may ignore
the field, runs as a function of its kernel (`_tracing/interpreter.py`).
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mora_jax._plans.layer import AdapterSpec, LayerConfig
from mora_jax._product.axes import KernelAxes
from mora_jax._product.cost import Placement
from mora_jax._product.dot import dropout, mora_dot_general
from mora_jax._schemes.base import Scheme
from mora_jax._schemes.registry import as_scheme
from mora_jax._tracing.interpreter import trace
from mora_jax._tracing.kernel_views import AdaptedView
from mora_jax.nnx._guard import AdaptedLayer, code_of, kernel_path, refuse_writing
from mora_jax.nnx._mora import MoRA
from mora_jax.nnx._trace_check import note_use


def _dot_general(layer: Any, base: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    mora = layer.mora
    config = mora.config

    def dot_general(lhs, rhs, dimension_numbers, precision=None, out_sharding=None, **options):
        key = mora.dropout_key()
        adapter, examples = mora.adapter()
        if examples is not None:
            examples.check(lhs.shape, dimension_numbers)
        return mora_dot_general(
            lhs,
            note_use(mora, rhs),
            dimension_numbers,
            adapter,
            config.scheme,
            placement=config.placement,
            precision=precision,
            frozen=not config.train_kernel,
            feature_sharding=config.feature_sharding,
            keep_sums=config.keep_sums,
            out_sharding=out_sharding,
            dot_general=base,
            adapter_lhs=None if key is None else dropout(lhs, config.dropout, key),
            adapter_ids=None if examples is None else examples.ids,
            **options,
        )

    return dot_general


class _WithDotGeneral(AdaptedLayer):
    """Takes the place of a layer's field `dot_general`, and keeps what it held."""

    mora_reader = code_of(nnx.Linear.__call__)

    @property
    def dot_general(self):
        made = vars(self).get("dot_general_cls")
        base = made() if made is not None else vars(self)["dot_general"]
        return _dot_general(self, base or lax.dot_general)

    @dot_general.setter
    def dot_general(self, value):
        vars(self)["dot_general"] = value


class _WithDotGeneralClass(_WithDotGeneral):
    """`LinearGeneral` asks its `dot_general_cls` first."""

    mora_reader = code_of(nnx.LinearGeneral.__call__)

    @property
    def dot_general_cls(self):
        return None

    @dot_general_cls.setter
    def dot_general_cls(self, value):
        vars(self)["dot_general_cls"] = value


class _WithEinsum(AdaptedLayer):
    """Takes the place of a layer's field `einsum_op`."""

    mora_reader = code_of(nnx.Einsum.__call__)

    @property
    def einsum_op(self):
        base = vars(self)["einsum_op"]

        def einsum(equation, inputs, kernel, **options):
            def call(kernel, inputs):
                return base(equation, inputs, kernel, **options)

            return _run(call, self.mora, self.mora.dropout_key(), kernel, inputs)

        return einsum

    @einsum_op.setter
    def einsum_op(self, value):
        vars(self)["einsum_op"] = value


def _as_functions(cls: type, kind: type = nnx.Module) -> dict[str, Callable[..., Any]]:
    """The methods of a layer's class, an embedding's `attend` among them, as functions.

    Those of `kind` stay as they are.
    """
    methods = {}
    for owner in reversed([owner for owner in cls.__mro__ if owner not in kind.__mro__]):
        for name, value in vars(owner).items():
            public = name == "__call__" or not name.startswith("_")
            # Settings stay what they are: what a copy is told is lost.
            if inspect.isfunction(value) and public and not name.startswith("set_"):
                methods[name] = _as_function(value)
    return methods


def _as_function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs as a function of the layer's kernel."""

    @functools.wraps(method)
    def run(layer, *args, **kwargs):
        mora = layer.mora
        # Before the layer is copied, whose state comes back.
        key = mora.dropout_key()
        graph, state = nnx.split(layer)

        def call(kernel, args, kwargs):
            copy: Any = nnx.merge(graph, copy_variables(state))
            # As the base class, so that methods which call each other are adapted once.
            object.__setattr__(copy, "__class__", type(layer).mora_base)
            # Not by `[...] =`, which would write into the old array, and no product see the kernel.
            getattr(copy, mora.kernel_name).set_value(kernel)
            before = _numbers_of(copy)
            outputs = method(copy, *args, **kwargs)
            if any(a is not b for a, b in zip(before, _numbers_of(copy), strict=True)):
                refuse_writing(kernel_path(layer))
            return outputs, nnx.to_pure_dict(nnx.state(copy, nnx.Not(nnx.Param)))

        kernel = vars(layer)[mora.kernel_name][...]
        outputs, rest = _run(call, mora, key, kernel, args, kwargs)
        if rest:
            nnx.update(layer, rest)
        return outputs

    return run


def _numbers_of(layer: Any) -> list[Any]:
    """The arrays of a layer's parameters, which a copy of it must leave as they are."""
    return jax.tree.leaves(nnx.state(layer, nnx.Param))


def _run(function: Callable[..., Any], mora: MoRA, key: Any, kernel: jax.Array, *args: Any) -> Any:
    traced = trace(function, note_use(mora, kernel), *args)
    value, *others = traced.arrays
    adapter, examples = mora.adapter()
    view = AdaptedView.of(value, adapter, mora.kernel_axes, mora.config, key, examples)
    return traced.run([view, *others])


class MoRALinear(_WithDotGeneral, nnx.Linear):
    """`nnx.Linear` with an adapter: the same arguments and parameters, and `mora` beside them.

    >>> layer = MoRALinear(3, 6, rank=1, scheme="sharing", rngs=nnx.Rngs(0))
    >>> layer.mora.matrix_sharing.shape, layer(jnp.ones((2, 3))).shape
    ((3, 3), (2, 6))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 8,
        scheme: Scheme | str = "auto",
        placement: Placement = "auto",
        adapter_dtype: Any = "float32",
        dora: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """As `nnx.Linear`; beside it what `MoRAConfig` has by the same names."""
        super().__init__(in_features, out_features, rngs=rngs, **options)
        config = LayerConfig(
            rank=rank,
            scheme=as_scheme(scheme, rank),
            placement=placement,
            dtype=jnp.dtype(adapter_dtype).name,
            dora=dora,
        )
        axes, shape = KernelAxes((0,), (1,)), (in_features, out_features)
        spec = AdapterSpec(config, shape, axes)
        self.mora = MoRA(spec, axes, shape, key=rngs.params() if spec.draws else None)


_MIXINS: dict[type, type] = {
    nnx.Linear: _WithDotGeneral,
    nnx.LinearGeneral: _WithDotGeneralClass,
    nnx.Einsum: _WithEinsum,
}


_LOCK = threading.Lock()


def adapted_class(cls: type) -> type:
    """The subclass of an adapted layer, one for each class, so that graphs compare equal."""
    with _LOCK:
        return _make_class(cls)


@functools.cache
def _make_class(cls: type) -> type:
    namespace: dict[str, Any] = {"__doc__": cls.__doc__, "__module__": cls.__module__}
    mixin, by_hook = AdaptedLayer, nnx.Module
    for kind, own in _MIXINS.items():
        if issubclass(cls, kind) and cls.__call__ is kind.__call__:
            mixin, by_hook = own, kind
    namespace |= _as_functions(cls, by_hook)
    fields = {"mora_base": cls, "__reduce__": _reduce}
    return type(cls.__name__, (mixin, cls), namespace | fields)


def _reduce(layer: Any) -> tuple[Any, ...]:
    """For pickle: no module has an adapted class by its name, so the class is made again."""
    return _empty_layer, (layer.mora_base,), layer.__getstate__()


def _empty_layer(cls: type) -> Any:
    return object.__new__(adapted_class(cls))


def copy_variables(state: Any) -> Any:
    """The same arrays in variables of their own."""
    return jax.tree.map(lambda leaf: leaf, state)
