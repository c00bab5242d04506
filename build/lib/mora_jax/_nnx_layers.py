"""NNX layers with adapters: subclasses of the layers' own classes.

`Linear`, `LinearGeneral` and `Einsum` take a product of ours by a field of their own. Any other
layer that holds a kernel runs as a function of it (`_rewrite.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mora_jax._config import LayerConfig, Placement
from mora_jax._dot import mora_dot_general
from mora_jax._initialize import draws_numbers, initialize
from mora_jax._layout import KernelAxes
from mora_jax._plan import AdapterSpec
from mora_jax._rewrite import trace
from mora_jax._schemes import LowRank, Scheme, as_scheme
from mora_jax._views import Adapted


class MoRAParam(nnx.LoRAParam):
    """A trained number of an adapter; trainers that look for `nnx.LoRAParam` find it."""


class MoRA(nnx.Module):
    """The adapter of one kernel: `matrix`, or `a` and `b`.

    Attributes:
      config: rank, scheme and options.
      kernel_name: the layer's name for the kernel.
      kernel_axes: as the layer sees it, without the axes of stacked layers.
      kernel_shape: likewise.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        kernel_axes: KernelAxes,
        kernel_shape: tuple[int, ...],
        *,
        key: jax.Array | None = None,
    ):
        """New adapters of zero delta; `key` is needed where the scheme draws numbers."""
        self.config, self.kernel_name = spec.config, spec.kernel_name
        self.kernel_axes, self.kernel_shape = kernel_axes, kernel_shape
        for index, (name, shape) in enumerate(spec.shapes.items()):
            own = None if key is None else jax.random.fold_in(key, index)
            fan_in = spec.features[0]
            leaf = initialize(own, shape, spec.config.dtype, name=name, fan_in=fan_in)
            setattr(self, name, MoRAParam(leaf))

    def adapter(self) -> dict[str, jax.Array]:
        """The leaves by name; within a scan over stacked layers, those of one layer."""
        names = ("a", "b") if isinstance(self.config.scheme, LowRank) else ("matrix",)
        return {name: getattr(self, name)[...] for name in names}

    def kernel(self, value: jax.Array) -> jax.Array:
        """The kernel, a constant unless it is trained beside the adapter."""
        return value if self.config.train_kernel else lax.stop_gradient(value)


class AdaptedLayer(nnx.Module):
    """What layers of an adapted class have in common.

    Attributes:
      mora: the adapter.
      mora_base: the layer's own class.
    """

    mora: MoRA
    mora_base: type = nnx.Linear


def _dot_general(layer: Any, base: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    config = layer.mora.config

    def dot_general(lhs, rhs, dimension_numbers, precision=None, out_sharding=None, **options):
        product = base
        if out_sharding is not None:
            product = functools.partial(base, out_sharding=out_sharding)
        return mora_dot_general(
            lhs,
            layer.mora.kernel(rhs),
            dimension_numbers,
            layer.mora.adapter(),
            config.scheme,
            placement=config.placement,
            precision=precision,
            dot_general=product,
            **options,
        )

    return dot_general


class _WithDotGeneral(AdaptedLayer):
    """Takes the place of a layer's field `dot_general`, and keeps what it held."""

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

    @property
    def dot_general_cls(self):
        return None

    @dot_general_cls.setter
    def dot_general_cls(self, value):
        vars(self)["dot_general_cls"] = value


class _WithEinsum(AdaptedLayer):
    """Takes the place of a layer's field `einsum_op`."""

    @property
    def einsum_op(self):
        base = vars(self)["einsum_op"]

        def einsum(equation, inputs, kernel, **options):
            def call(kernel, inputs):
                return base(equation, inputs, kernel, **options)

            return _run(call, self.mora, kernel, inputs)

        return einsum

    @einsum_op.setter
    def einsum_op(self, value):
        vars(self)["einsum_op"] = value


class _Rewritten(AdaptedLayer):
    """Runs its methods as functions of its kernel."""

    def __call__(self, *args, **kwargs):
        return _call_as_function(self, "__call__", args, kwargs)


class _RewrittenEmbed(_Rewritten):
    """An embedding, whose transpose may be a head."""

    def attend(self, *args, **kwargs):
        return _call_as_function(self, "attend", args, kwargs)


def _call_as_function(layer: Any, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    mora, base = layer.mora, type(layer).mora_base
    graph, state = nnx.split(layer)

    def call(kernel, args, kwargs):
        copy: Any = nnx.merge(graph, fresh(state))
        getattr(copy, mora.kernel_name)[...] = kernel
        outputs = getattr(base, method)(copy, *args, **kwargs)
        return outputs, nnx.to_pure_dict(nnx.state(copy, nnx.Not(nnx.Param)))

    outputs, rest = _run(call, mora, getattr(layer, mora.kernel_name)[...], args, kwargs)
    if rest:
        nnx.update(layer, rest)
    return outputs


def _run(function: Callable[..., Any], mora: MoRA, kernel: jax.Array, *args: Any) -> Any:
    traced = trace(function, kernel, *args)
    value, *others = traced.arrays
    order = tuple(range(value.ndim))
    view = Adapted(
        mora.kernel(value), order, value.dtype, mora.adapter(), mora.kernel_axes, mora.config
    )
    return traced.run([view, *others])


class MoRALinear(_WithDotGeneral, nnx.Linear):
    """`nnx.Linear` with an adapter: the same arguments and parameters, and `mora` beside them.

    >>> layer = MoRALinear(3, 6, rank=1, scheme="sharing", rngs=nnx.Rngs(0))
    >>> layer.mora.matrix.shape, layer(jnp.ones((2, 3))).shape
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
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """As `nnx.Linear`; `rank`, `scheme`, `placement` and the adapter's dtype beside it."""
        super().__init__(in_features, out_features, rngs=rngs, **options)
        config = LayerConfig(
            rank=rank,
            scheme=as_scheme(scheme, rank),
            placement=placement,
            dtype=jnp.dtype(adapter_dtype).name,
        )
        axes, shape = KernelAxes((0,), (1,)), (in_features, out_features)
        key = rngs.params() if draws_numbers(config.scheme) else None
        self.mora = MoRA(AdapterSpec(config, shape, axes), axes, shape, key=key)


_MIXINS: dict[type, type] = {
    nnx.Linear: _WithDotGeneral,
    nnx.LinearGeneral: _WithDotGeneralClass,
    nnx.Einsum: _WithEinsum,
    nnx.Embed: _RewrittenEmbed,
}


@functools.cache
def adapted_class(cls: type) -> type:
    """The subclass of an adapted layer, one for each class, so that graphs compare equal."""
    mixin = next((mixin for kind, mixin in _MIXINS.items() if issubclass(cls, kind)), _Rewritten)
    namespace = {"__doc__": cls.__doc__, "__module__": cls.__module__, "mora_base": cls}
    return type(cls.__name__, (mixin, cls), namespace)


def fresh(state: Any) -> Any:
    """The same arrays in variables of their own."""
    return jax.tree.map(lambda leaf: leaf, state)
