"""MoRA for Flax linen: a `dot_general` module, a layer, and `adapt` for whole models.

linen's `Dense` and `DenseGeneral` (attention included) take a `dot_general_cls`. `MoRA` is one: a
module that makes its adapter beside the kernel it is called with. `adapt` puts it into every
chosen layer while the model runs, by `nn.intercept_methods`, so that the model is not edited and
the base parameters keep their paths:

    q_proj/kernel         [I, O]    the pretrained kernel, as before
    q_proj/mora/matrix    [R, R]    the adapter, R the square size
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import freeze
from jax import lax

from mora_jax._config import LayerConfig, Placement
from mora_jax._dot import mora_dot_general
from mora_jax._initialize import initialize
from mora_jax._layout import kernel_axes
from mora_jax._schemes import Scheme, adapter_shapes, as_scheme
from mora_jax._tree import ADAPTER, join_path

#: The layers that `adapt` reaches: those that take a `dot_general_cls`.
LINEAR = (nn.Dense, nn.DenseGeneral)

#: The number of the trace that a plan is being made by; 0 where none is.
TRACE: contextvars.ContextVar[int] = contextvars.ContextVar("TRACE", default=0)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class MoRA(nn.Module):
    """A `dot_general` with an adapter of its own, for a layer's `dot_general_cls`.

    Parameters: `matrix` [B..., R, R] zeros, or for `LowRank` `a` [B..., I, rank] and `b`
    [B..., rank, O]; B the batch axes of the product. The kernel it is called with is taken as
    frozen, unless `config.train_kernel`: its gradient is zero and never formed.

    Attributes:
      config: rank, scheme, placement, dropout, dtype.
      dot_general: the base product.

    >>> config = LayerConfig(rank=1, scheme=as_scheme("sharing", 1))
    >>> layer = nn.Dense(6, dot_general_cls=functools.partial(MoRA, config, name="mora"))
    >>> params = layer.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix': (3, 3)}}
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
        batch, in_features, out_features = kernel_axes(rhs, dimension_numbers).sizes(rhs.shape)
        adapter = {}
        shapes = adapter_shapes(in_features, out_features, config.rank, config.scheme)
        for name, shape in shapes.items():
            start = functools.partial(initialize, name=name, fan_in=in_features)
            adapter[name] = self.param(name, start, (*batch, *shape), jnp.dtype(config.dtype))
        dropped = None
        if config.dropout and self.has_rng(ADAPTER):
            keep = jax.random.bernoulli(self.make_rng(ADAPTER), 1 - config.dropout, lhs.shape)
            dropped = jnp.where(keep, lhs / (1 - config.dropout), 0).astype(lhs.dtype)
        return mora_dot_general(
            lhs,
            rhs if config.train_kernel else lax.stop_gradient(rhs),
            dimension_numbers,
            adapter,
            config.scheme,
            placement=config.placement,
            precision=precision,
            preferred_element_type=preferred_element_type,
            adapter_lhs=dropped,
            dot_general=self.dot_general,
        )


class MoRADense(nn.Dense):
    """`nn.Dense` with an adapter: the same fields and parameters, and `mora/matrix` beside them.

    Its scheme is a field, so ReMoRA keeps it (no cycle); `adapt` on a plain `nn.Dense` walks on.

    Attributes:
      rank: the LoRA rank whose number of parameters the adapter has.
      scheme: a `Scheme` or its name.
      placement: "kernel", "activation" or "auto", see `mora_dot_general`.
      dropout: rate at which the adapter's input is dropped where an rng stream `mora` is given.
      adapter_dtype: dtype of the adapter.

    >>> layer = MoRADense(6, rank=1, scheme="sharing")
    >>> params = layer.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (6,), 'kernel': (3, 6), 'mora': {'matrix': (3, 3)}}
    """

    rank: int = 8
    scheme: Scheme | str = "auto"
    placement: Placement = "auto"
    dropout: float = 0.0
    adapter_dtype: Any = "float32"

    def __post_init__(self):
        if self.dot_general_cls is not None and not _uses_mora(self.dot_general_cls):
            raise ValueError("MoRADense takes a `dot_general`, but no `dot_general_cls`.")
        config = LayerConfig(
            rank=self.rank,
            scheme=as_scheme(self.scheme, self.rank),
            cycle=None,
            placement=self.placement,
            dropout=self.dropout,
            dtype=jnp.dtype(self.adapter_dtype).name,
        )
        base_dot = self.dot_general or lax.dot_general
        self.dot_general_cls = functools.partial(MoRA, config, base_dot, name=ADAPTER)
        super().__post_init__()


class Chooser(Protocol):
    """What `adapt` asks about each layer; a `MoRAConfig` or a `Plan` answers."""

    def choose(self, path: str) -> LayerConfig | None:
        """The config of the layer at `path`, or None where it is left alone."""
        ...


class AdaptedModule(nn.Module):
    """The kind of module that `adapt` makes: `isinstance` tells it from a base model."""

    # Long names, because the model's own fields and submodules share the namespace.
    mora_base: ClassVar[nn.Module]
    mora_chooser: ClassVar[Chooser]


def adapt(model: ModuleT, chooser: Chooser) -> ModuleT:
    """A model like `model` in which the chosen layers have adapters. See `mora_jax.adapt`.

    The result is an instance of a subclass of the model's own class, with the same fields, whose
    methods only enter the interception. It hashes by the model's identity and the chooser, and
    the same pair gives the same object for as long as that lives, so that jitted functions which
    take the model as a static argument find their compiled code again.
    """
    if isinstance(model, AdaptedModule):
        raise TypeError("the model is adapted already; adapt the base model instead.")
    if model.scope is not None:
        raise ValueError("the model is bound to variables; adapt it before binding.")
    key = (id(model), chooser)
    adapted = _ADAPTED.get(key)
    if adapted is None:
        adapted = _ADAPTED[key] = _make_adapted(model, chooser)
    return adapted  # pyright: ignore[reportReturnType]


# The value holds its base model, so the id in the key cannot be given to another while it lives.
_ADAPTED: weakref.WeakValueDictionary[tuple[int, Chooser], nn.Module] = (
    weakref.WeakValueDictionary()
)


def _make_adapted(model: nn.Module, chooser: Chooser) -> nn.Module:
    cls = type(model)
    namespace = {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__hash__": lambda self: hash(type(self)),
        "__eq__": _same_fields,
    }
    adapted = type(cls.__name__, (cls, AdaptedModule), namespace)  # pyright: ignore
    # Set afterwards: flax would take a module in the namespace, being callable, for a method.
    adapted.mora_base, adapted.mora_chooser = model, chooser
    # A name bound before flax's own `apply` and `init` enters the interception for functions given
    # as `method=`; the wrapped methods enter it for bound models and for use as a submodule.
    for name in _method_names(cls):
        setattr(adapted, name, _intercepted(getattr(cls, name), chooser))
    return adapted(**_fields(model))


def _method_names(cls: type[nn.Module]) -> list[str]:
    """The methods by which a model is entered: its own, and flax's `apply` and `init`."""
    names = {"apply", "init_with_output"}
    for owner in set(cls.__mro__) - set(nn.Module.__mro__):
        for name, value in vars(owner).items():
            own = name == "__call__" or not name.startswith("__")
            if inspect.isfunction(value) and own and name != "setup":
                names.add(name)
    return sorted(names)


def _intercepted(method: Callable[..., Any], chooser: Chooser) -> Callable[..., Any]:
    mark = hash(chooser)

    @functools.wraps(method)
    def enter(self, *args, **kwargs):
        root = self.path if self.scope is not None else ()
        intercept = functools.partial(_use_adapter, chooser, len(root))
        mark_scope(self, mora_adapt=mark, mora_plan=TRACE.get())
        with nn.intercept_methods(intercept):
            return method(self, *args, **kwargs)

    return enter


def _use_adapter(chooser, depth, next_fun, args, kwargs, context):
    """Runs a chosen layer as a copy of itself, on the same scope, whose product is `MoRA`."""
    layer = context.module
    if (
        context.method_name != "__call__"
        or not isinstance(layer, LINEAR)
        or _uses_mora(layer.dot_general_cls)
    ):
        return next_fun(*args, **kwargs)
    config = chooser.choose(join_path(*layer.path[depth:]))
    if config is None:
        return next_fun(*args, **kwargs)
    base_dot = layer.dot_general or lax.dot_general
    if layer.dot_general_cls is not None:
        base_dot = layer.dot_general_cls()
    product = functools.partial(MoRA, config, base_dot, name=ADAPTER)
    return layer.clone(parent=layer.scope, dot_general_cls=product)(*args, **kwargs)


def mark_scope(module: nn.Module, **marks: int) -> None:
    """Keeps apart, in the trace cache of `nn.jit`, what differs by interception alone.

    That cache knows nothing of interceptors, but a scope's flags are part of its keys, by hash.
    Scopes made below this one inherit them.
    """
    if module.scope is not None:
        module.scope.flags = freeze({**module.scope.flags, **marks})


def _uses_mora(dot_general_cls: Any) -> bool:
    return isinstance(dot_general_cls, functools.partial) and dot_general_cls.func is MoRA


def _fields(model: nn.Module) -> dict[str, Any]:
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.init and field.name not in ("parent", "name")
    }


def _same_fields(self: nn.Module, other: object) -> bool:
    """Equality by class and fields: a clone with another dtype is another model."""
    if self is other:
        return True
    return type(self) is type(other) and _fields(self) == _fields(other)  # pyright: ignore
