"""Adapters in a whole linen model, put into the chosen layers while it runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from flax import linen as nn
from jax import lax

from mora_jax._arrays.paths import ADAPTER, IDS, escape, join_path, list_paths
from mora_jax._plans.plan import Plan
from mora_jax.linen._layers import (
    ADAPTED_WHEN_NAMED,
    IDS_OF_EXAMPLES,
    USED_LAYERS,
    MoRA,
    as_function,
    is_adaptable,
    kernel_name,
    uses_mora,
)
from mora_jax.linen._scopes import Chooser, Marks, marks_of

#: A number for every call in which examples have adapters of their own.
_CALLS_WITH_IDS = itertools.count(1)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class AdaptedModule(nn.Module):
    """The kind of module that `adapt` makes: `isinstance` tells it from a base model."""

    # Long names, because the model's own fields and submodules share the namespace.
    mora_base: ClassVar[nn.Module]
    mora_chooser: ClassVar[Chooser]
    mora_marks: ClassVar[Marks]

    # Its class cannot be looked up by name, so another process adapts the base anew.
    @nn.nowrap
    def __reduce_ex__(self, protocol: Any) -> Any:
        """What `pickle` and its like rebuild the model from: base, config or plan, and fields."""
        if self.scope is not None:  # bound to variables: as any module
            return super().__reduce_ex__(protocol)
        base = self.mora_base
        changed = {k: v for k, v in _fields(self).items() if v is not getattr(base, k)}
        return _rebuild, (base, self.mora_chooser, changed)

    @nn.nowrap
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the same class, which equals this model."""
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


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
    # The same model whatever the merges, so that jit finds its code again; the last plan counts.
    as_new = chooser.before_merges() if isinstance(chooser, Plan) else chooser
    key = (id(model), as_new)
    adapted = _ADAPTED.get(key)
    if adapted is None:
        adapted = _ADAPTED[key] = _make_adapted(model, as_new)
    type(adapted).mora_chooser = chooser
    return adapted  # pyright: ignore[reportReturnType]


# The value holds its base model, so the id in the key cannot be given to another while it lives.
_ADAPTED: weakref.WeakValueDictionary[tuple[int, Chooser], AdaptedModule] = (
    weakref.WeakValueDictionary()
)


def _make_adapted(model: nn.Module, chooser: Chooser) -> AdaptedModule:
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
    adapted.mora_marks = marks = marks_of(chooser)
    # A name bound before flax's own `apply` and `init` enters the interception for functions given
    # as `method=`; the wrapped methods enter it for bound models and for use as a submodule.
    for name in _method_names(cls):
        setattr(adapted, name, _intercepted(getattr(cls, name), chooser, marks))
    setattr(adapted, "__post_init__", _marked_when_bound(cls.__post_init__, marks))  # noqa: B010
    return adapted(**_fields(model))


def _marked_when_bound(
    post_init: Callable[[nn.Module], None], marks: Marks
) -> Callable[[nn.Module], None]:
    """Flax binds a module, and the modules in its fields, when it is made."""

    @functools.wraps(post_init)
    def run(self):
        post_init(self)
        if self.scope is not None:
            dataclasses.replace(marks, depth=len(self.path)).put_on_all(self)

    return run


def _rebuild(base: nn.Module, chooser: Chooser, changed: dict[str, Any]) -> nn.Module:
    """An adapted model from what it was adapted from, and the fields that differ from that."""
    model = adapt(base, chooser)
    return model.clone(**changed) if changed else model


def _method_names(cls: type[nn.Module]) -> list[str]:
    """The methods by which a model is entered: its own, and flax's `apply` and `init`."""
    names = {"apply", "init_with_output"}
    for owner in set(cls.__mro__) - set(nn.Module.__mro__):
        for name, value in vars(owner).items():
            own = name == "__call__" or not name.startswith("__")
            if inspect.isfunction(value) and own and name != "setup":
                names.add(name)
    return sorted(names)


def entered(model: nn.Module, method: Any) -> Callable[..., Any]:
    """A function (scope, *inputs) that runs a method of a model, adapted or not.

    `flax.core.init` and `flax.core.apply` take it. They pass by an `init` or an `apply` that the
    model has of its own.

    Args:
      model: the model, unbound.
      method: as for `Module.init`.
    """
    function = _as_function_of_module("__call__" if method is None else method)
    if isinstance(model, AdaptedModule):
        function = _intercepted(function, model.mora_chooser, model.mora_marks)

    def run(scope, *args, **kwargs):
        return function(model.clone(parent=scope, _deep_clone=True), *args, **kwargs)

    return run


def _as_function_of_module(method: Any) -> Callable[..., Any]:
    """A function of a bound module and inputs, of what flax takes for a `method`."""
    if inspect.ismethod(method) and isinstance(method.__self__, nn.Module):
        method = method.__name__
    if not isinstance(method, str):
        return method
    return lambda module, *args, **kwargs: getattr(module, method)(*args, **kwargs)


def _intercepted(method: Callable[..., Any], chooser: Chooser, marks: Marks) -> Callable[..., Any]:
    @functools.wraps(method)
    def enter(self, *args, **kwargs):
        root = self.path if self.scope is not None else ()
        ids = _adapter_ids(self, args, kwargs)
        # Ids are constants of what the model's own `nn.jit` traces, so each call has traces of its.
        call = 0 if ids is None else next(_CALLS_WITH_IDS)
        own = dataclasses.replace(marks, others=(("mora_ids", call),), depth=len(root))
        if self.scope is not None:
            own.put_on(self.scope)
        intercept = functools.partial(_use_adapter, chooser, own)
        token = IDS_OF_EXAMPLES.set(ids)
        try:
            with nn.intercept_methods(intercept), _all_used(self, chooser, args, kwargs):
                return method(self, *args, **kwargs)
        finally:
            IDS_OF_EXAMPLES.reset(token)

    return enter


@contextlib.contextmanager
def _all_used(
    model: nn.Module, chooser: Chooser, args: tuple, kwargs: dict[str, Any]
) -> Iterator[None]:
    """Raises ValueError after a call on parameters with adapters in layers that it leaves alone."""
    variables = args[0] if args else kwargs.get("variables")
    params = None
    if model.scope is None and isinstance(variables, Mapping):
        params = variables.get("params")
    layers = _layers_with_adapters(params)
    unchosen = {layer for layer in layers if chooser.choose(layer) is None}
    if not unchosen:
        yield
        return
    token = USED_LAYERS.set(used := set())
    try:
        yield
    finally:
        USED_LAYERS.reset(token)
    # A MoRADense uses its own, whatever the model was adapted with.
    if unused := unchosen - used:
        raise ValueError(
            f"the parameters have adapters in layers that the model leaves alone: "
            f"{list_paths(unused)}. Adapt the base model with the plan that made the parameters: "
            "model = mora_jax.adapt(base_model, plan)."
        )


def _adapter_ids(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Which adapter of a bank each example has: `adapter_ids` in the model's collection `mora`."""
    if model.scope is None:  # its `apply`, or its `init`, which takes keys instead
        variables = args[0] if args else kwargs.get("variables")
        own = variables.get(ADAPTER) if isinstance(variables, Mapping) else None
        return own.get(IDS) if isinstance(own, Mapping) else None
    if model.scope.has_variable(ADAPTER, IDS):
        return model.scope.get_variable(ADAPTER, IDS)
    # A method of the model that another one calls, inside of a lifted transformation perhaps.
    return IDS_OF_EXAMPLES.get()


def _layers_with_adapters(params: Any, prefix: str = "") -> Iterator[str]:
    """Paths of the layers that have an adapter in a tree of parameters."""
    for name, value in params.items() if isinstance(params, Mapping) else ():
        if name == ADAPTER:
            yield prefix
        else:
            yield from _layers_with_adapters(value, join_path(prefix, escape(str(name))))


def _use_adapter(chooser: Chooser, marks: Marks, next_fun, args, kwargs, context):
    """Runs a chosen layer as a copy of itself, on the same scope, whose product is `MoRA`."""
    layer, method = context.module, context.method_name
    if not marks.are_on(layer):  # under an `apply` of its own, on parameters that it is handed
        return next_fun(*args, **kwargs)
    marks.enter(layer)
    path = join_path(*layer.path[marks.depth :])
    if not is_adaptable(layer, method, chooser) or uses_mora(layer):
        return next_fun(*args, **kwargs)
    config = chooser.choose(path)
    if config is None:
        return next_fun(*args, **kwargs)
    if isinstance(layer, (nn.Einsum, *ADAPTED_WHEN_NAMED)):
        trained = chooser.trains(join_path(path, kernel_name(layer)))
        config = dataclasses.replace(config, train_kernel=trained)
        return as_function(layer, method, next_fun, args, kwargs, config)
    base_dot = layer.dot_general or lax.dot_general
    if layer.dot_general_cls is not None:
        base_dot = layer.dot_general_cls()
    product = functools.partial(MoRA, config, base_dot, name=ADAPTER)
    twin = layer.clone(parent=layer.scope, dot_general_cls=product)
    # What the call returns is captured once, by the layer itself.
    object.__setattr__(twin, "sow", functools.partial(_sow_but, method, twin.sow))
    return twin(*args, **kwargs)


def _sow_but(method: str, sow: Callable[..., bool], col: str, name: str, *args, **kwargs) -> bool:
    """A module's `sow`, apart from what `capture_intermediates` stores of a method."""
    return (col, name) != ("intermediates", method) and sow(col, name, *args, **kwargs)


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
