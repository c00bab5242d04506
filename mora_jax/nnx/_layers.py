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

from mora_jax._arrays.boxes import MoRAParam, box_like, place_for
from mora_jax._arrays.paths import ADAPTER, IDS
from mora_jax._plans.layer import AdapterSpec, LayerConfig
from mora_jax._product.axes import KernelAxes
from mora_jax._product.cost import Placement
from mora_jax._product.dot import dropout, mora_dot_general
from mora_jax._product.per_example import ExampleIds, bank_size, holds_bank, unstack_bank
from mora_jax._schemes.base import Scheme
from mora_jax._schemes.registry import as_scheme
from mora_jax._tracing.interpreter import trace
from mora_jax._tracing.kernel_views import AdaptedView
from mora_jax.nnx._guard import AdaptedLayer, LayerPath, code_of, kernel_path, refuse_writing
from mora_jax.nnx._trace_check import note_use


class MoRA(nnx.Module):
    """The adapter of one kernel: `matrix`, or `a` and `b`; with DoRA `magnitude` too.

    Attributes:
      config: rank, scheme and options.
      kernel_name: the layer's name for the kernel.
      kernel_axes: as the layer sees it, without the axes of stacked layers.
      kernel_shape: likewise.
      kernel_stacks: axes of stacked layers, where `adapt` made the adapter.
      layer_path: where the layer stands, where `adapt` made the adapter.
      deterministic: no dropout where True, as `model.eval()` sets it.
      rngs: the stream of the dropout's keys, where the config asks for dropout.
      adapter_ids: which adapter each example has, where `set_adapter_ids` has said it and the
        leaves are those of a bank.
    """

    kernel_stacks: tuple[int, ...] = ()
    layer_path: LayerPath = LayerPath("")

    def __init__(
        self,
        spec: AdapterSpec,
        kernel_axes: KernelAxes,
        kernel_shape: tuple[int, ...],
        *,
        kernel: nnx.Variable | None = None,
        key: jax.Array | None = None,
    ):
        """New adapters of zero delta, beside `kernel` where that lies on a mesh.

        `key` is needed where the config draws numbers. Without one these are nan, and there is no
        dropout to train with.
        """
        self.config, self.kernel_name = spec.config, spec.kernel_name
        self.kernel_axes, self.kernel_shape = kernel_axes, kernel_shape
        for index, (name, shape) in enumerate(spec.shapes.items()):
            own = None if key is None else jax.random.fold_in(key, index)
            start = spec.leaves[name].start
            if spec.leaves[name].draws and key is None:
                start = _not_a_number  # until `nnx.update` gives it the numbers of a saved one
            make = functools.partial(start, shape=shape, dtype=spec.config.dtype)
            common = dict(zip(spec.adapter_batch_axes, spec.kernel_axes.batch, strict=True))
            if place := place_for(kernel, len(shape), common):
                make = jax.jit(make, out_shardings=place)
            setattr(
                self,
                name,
                MoRAParam(make(own)) if kernel is None else box_like(kernel, make(own), common),
            )
        self.deterministic = False
        if self.config.dropout and key is not None:
            own = jax.random.fold_in(key, len(spec.shapes))
            stacks = spec.batch[: len(spec.batch) - len(kernel_axes.batch)]
            keys = jax.random.split(own, stacks) if stacks else own
            self.rngs = nnx.RngStream(keys, tag=ADAPTER)

    def adapter(self) -> tuple[dict[str, jax.Array], ExampleIds | None]:
        """The leaves by name, and which adapter each example has where they are a bank's.

        Within a scan over stacked layers, they are those of one layer.
        """
        _, in_features, out_features = self.kernel_axes.sizes(self.kernel_shape)
        shapes = self.config.shapes(in_features, out_features)
        rows = {name: shape[0] for name, shape in shapes.items()}
        leaves = {name: getattr(self, name)[...] for name in rows}
        if (variable := getattr(self, IDS, None)) is None:
            if (count := bank_size(leaves, rows)) > 1:
                raise holds_bank(count, f"the variables of a layer of {self.config.scheme}")
            return leaves, None
        # Stacked layers have their ids stacked, whether a scan takes them apart or not.
        ids, path = variable[...], variable.get_metadata("layer")
        return unstack_bank(leaves, rows, path), ExampleIds(ids[(0,) * (ids.ndim - 1)], path)

    def dropout_key(self) -> jax.Array | None:
        """A new key for the dropout of one call; None where there is none."""
        if not self.config.dropout or self.deterministic:
            return None
        if not hasattr(self, "rngs"):
            raise ValueError(
                f"layer {self.layer_path.path!r} has dropout={self.config.dropout} and no key to "
                "draw by. Call model.eval(), or adapt(model, plan, key=jax.random.key(...))."
            )
        return self.rngs()

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: no dropout where True.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def _not_a_number(key: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del key
    return jnp.full(shape, jnp.nan, dtype)


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
