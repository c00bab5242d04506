"""The kernel of an adapted layer, kept to its layer: during a forward pass nothing else may use it.

An adapted layer multiplies by its kernel plus a delta, and `merge` writes that sum into the kernel.
The two agree if the layer multiplies by the kernel that is stored, and if nothing else reads it. A
head that is tied by hand, `x @ model.embed.embedding[...].T`, breaks that. So does a wrapper that
writes into the kernel of its layer before it runs it. Both are refused when they happen.

Between forward passes a kernel is read and written freely. A forward pass is whatever JAX traces,
and whatever a method of an NNX module runs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NoReturn

from flax import nnx
from jax.extend.core import get_opaque_trace_state

from mora_jax._arrays.paths import join_path

#: Attributes of arrays that do not depend on the numbers in them.
_STATIC = {"dtype", "itemsize", "nbytes", "ndim", "sharding", "size", "weak_type"}

_EAGER = get_opaque_trace_state(convention="nnx")

LEAVE_OUT = (
    "Leave the layer out with MoRAConfig.exclude, or adapt the model as a function of its "
    "parameters, mora_jax.adapt(function, config), which takes such a model as it is."
)

_REMEDY = (
    f"{LEAVE_OUT} Between steps, nnx.state(model) has the numbers and nnx.update(model, state) "
    "changes them."
)


@dataclasses.dataclass(frozen=True)
class LayerPath:
    """Where a layer stands, for error messages.

    Any two compare equal, so that what is compiled for one block of a model serves the others.
    """

    path: str = dataclasses.field(compare=False)


class AdaptedLayer(nnx.Module):
    """What layers of an adapted class have in common.

    Attributes:
      mora: the adapter, a `MoRA`.
      mora_base: the layer's own class.
      mora_reader: the code that may read the kernel's attribute. The methods that run as functions
        of the kernel do not read it.
    """

    mora: Any
    mora_base: type = nnx.Linear
    mora_reader: CodeType | None = None

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if not isinstance(value, nnx.Variable) or name != _kernel_name(self):
            return value
        elsewhere = _is_used_elsewhere(type(self).mora_reader)
        return _guarded(kernel_path(self), value) if elsewhere else value

    def __setattr__(self, name, value):
        if name == _kernel_name(self) and _is_used_elsewhere(type(self).mora_reader):
            refuse_writing(kernel_path(self))
        super().__setattr__(name, value)


def code_of(method: Callable[..., Any]) -> CodeType:
    """The code of a method, whatever decorates it."""
    return inspect.unwrap(method).__code__


def _kernel_name(layer: AdaptedLayer) -> str | None:
    """The name of the adapted kernel; None while the layer is being made."""
    mora = vars(layer).get("mora")
    return None if mora is None else mora.kernel_name


def kernel_path(layer: AdaptedLayer) -> str:
    """Of a layer that `adapt` did not make, the kernel's name alone."""
    mora = vars(layer)["mora"]
    return repr(join_path(mora.layer_path.path, mora.kernel_name))


def _is_used_elsewhere(reader: CodeType | None) -> bool:
    """Whether a forward pass uses a kernel's attribute in other code than `reader`.

    To be called by the layer's own `__getattribute__` and `__setattr__`.
    """
    caller = sys._getframe(2)
    return caller.f_code is not reader and (_is_traced() or _is_in_a_method(caller))


def _guarded(path: str, variable: nnx.Variable) -> nnx.Variable:
    """A kernel as code outside its layer sees it: shape, dtype and metadata, but no numbers."""
    made = object.__new__(_guarded_class(type(variable)))
    fields = {
        "_mora_path": path,
        "_mora_variable": variable,
        "_var_metadata": variable.get_metadata(),
        "_trace_state": variable._trace_state,
    }
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def refuse_writing(path: str) -> NoReturn:
    """Raises ValueError for a kernel that the forward pass writes into."""
    raise ValueError(
        f"the forward pass writes into {path}, the kernel of an adapted layer. The layer would "
        f"multiply by other numbers than those that a merge adds its delta to. {_REMEDY}"
    )


class _Guarded:
    """What a guarded kernel has instead of what a variable has."""

    __slots__ = ()

    @property
    def _raw_value(self):
        raise ValueError(
            f"a method or a traced function reads {self._mora_path}, the kernel of an adapted "
            "layer, outside that layer. It would see the kernel without its delta now, and with it "
            f"after a merge. To look at it, take flax.nnx.state(model). {_REMEDY}"
        )

    @_raw_value.setter
    def _raw_value(self, value):
        refuse_writing(self._mora_path)

    @property
    def shape(self):
        return self._mora_variable.get_raw_value().shape

    def set_value(self, value, **options):
        refuse_writing(self._mora_path)

    def __getattr__(self, name):
        if name in _STATIC:
            return getattr(self._mora_variable.get_raw_value(), name)
        of_variables: Any = super()
        return of_variables.__getattr__(name)


@functools.cache
def _guarded_class(cls: type) -> type:
    fields = {"__slots__": ("_mora_path", "_mora_variable"), "__module__": cls.__module__}
    return type(cls)(cls.__name__, (_Guarded, cls), fields)


def _is_traced() -> bool:
    return get_opaque_trace_state(convention="nnx") != _EAGER


def _is_in_a_method(frame: FrameType | None) -> bool:
    """Whether a method of a module is running, other than its `__init__` and NNX's own."""
    while frame is not None:
        if _is_method(frame.f_code, frame):
            return True
        frame = frame.f_back
    return False


def _is_method(code: CodeType, frame: FrameType) -> bool:
    if not code.co_argcount or code.co_name == "__init__" or "." not in code.co_qualname:
        return False
    module = frame.f_locals.get(code.co_varnames[0])
    if not isinstance(module, nnx.Module):
        return False
    owners = (owner for owner in type(module).__mro__ if owner not in nnx.Module.__mro__)
    methods = (vars(owner).get(code.co_name) for owner in owners)
    return any(getattr(inspect.unwrap(of), "__code__", None) is code for of in methods if of)
