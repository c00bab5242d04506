"""The adapter of one NNX layer: its variables, and what they are now."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax._arrays.boxes import MoRAParam, box_like, place_for
from mora_jax._arrays.paths import ADAPTER, IDS, NAME
from mora_jax._params.checks import other_adapter
from mora_jax._plans.layer import AdapterSpec, LayerConfig
from mora_jax._product.axes import KernelAxes
from mora_jax._product.per_example import ExampleIds, bank_size, holds_bank, unstack_bank
from mora_jax.nnx._guard import LayerPath


class MoRA(nnx.Module):
    """The adapter of one kernel: `matrix`, or `a` and `b`; with DoRA `magnitude` too.

    Attributes:
      config: rank, scheme and options.
      kernel_name: the layer's name for the kernel.
      kernel_axes: as the layer sees it, without the axes of stacked layers.
      kernel_shape: likewise.
      merged: whether adapters were merged into the kernel by `merge_and_reset`. A count would have
        jit compile anew after each.
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
            stored, value = self.config.stored_name(name), make(own)
            alone = kernel is None
            leaf = MoRAParam(value) if alone else box_like(kernel, value, common, stored)
            leaf.set_metadata(**{NAME: stored})
            setattr(self, stored, leaf)
        self.merged, self.deterministic = False, False
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
        leaves = self._stored_leaves(rows)
        if (variable := getattr(self, IDS, None)) is None:
            if (count := bank_size(leaves, rows)) > 1:
                raise holds_bank(count, f"the variables of a layer of {self.config.scheme}")
            return leaves, None
        # Stacked layers have their ids stacked, whether a scan takes them apart or not.
        ids, path = variable[...], variable.get_metadata("layer")
        return unstack_bank(leaves, rows, path), ExampleIds(ids[(0,) * (ids.ndim - 1)], path)

    def _stored_leaves(self, names: Iterable[str]) -> dict[str, jax.Array]:
        """The leaves' values by their plain names.

        Raises:
          ValueError: where the variables were put here from a model of another scheme.
        """
        stored = {name: self.config.stored_name(name) for name in names}
        there = {
            variable.get_metadata(NAME, name) if isinstance(variable, MoRAParam) else name
            for name, variable in vars(self).items()
            if isinstance(variable, nnx.Variable | jax.Array | np.ndarray) and name != IDS
        }
        if there != set(stored.values()):
            path = self.layer_path.path
            raise other_adapter(path, there, stored.values(), self.config.scheme)
        return {name: getattr(self, attribute)[...] for name, attribute in stored.items()}

    def go_on_with(self, config: LayerConfig) -> None:
        """Takes the next scheme of a cycle; the leaves stay, under the names that say it."""
        for name in self.config.leaves(1, 1):
            old, new = self.config.stored_name(name), config.stored_name(name)
            if old != new:
                leaf = getattr(self, old)
                leaf.set_metadata(**{NAME: new})
                setattr(self, new, leaf)
                delattr(self, old)
        self.config, self.merged = config, True

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
