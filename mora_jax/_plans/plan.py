"""Plans: what was adapted, layer by layer, as static data.

A plan is all that the tree functions need to know of a model: it comes from `mora_jax.plan`, it is
hashable (a static argument of jitted functions, a pytree without leaves), it prints as a table and
it travels as JSON beside saved adapters.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mora_jax._arrays.paths import adapter_path, is_adapter, join_path
from mora_jax._plans.config import LayerConfig
from mora_jax._plans.cycles import next_scheme
from mora_jax._plans.table import table
from mora_jax._product.axes import KernelAxes
from mora_jax._schemes.base import Adapter, Leaf, Scheme
from mora_jax._schemes.registry import scheme_from_dict

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """One adapted layer: its kernel's layout and its adapter's.

    Attributes:
      config: rank, scheme, cycle, placement, dropout, dtype.
      kernel_shape: full shape of the kernel, the axes of stacked layers included.
      kernel_axes: which of these axes are input, output and batch (stacked layers, experts).
      adapter_batch_axes: where the batch axes stand in the adapter's leaves.
      kernel_name: name of the kernel within its layer; "" where the layer is the kernel.
    """

    config: LayerConfig
    kernel_shape: tuple[int, ...]
    kernel_axes: KernelAxes
    adapter_batch_axes: tuple[int, ...] = ()
    kernel_name: str = "kernel"

    @property
    def scheme(self) -> Scheme:
        """The scheme in use now."""
        return self.config.scheme

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes: one adapter for each element."""
        return self.kernel_axes.sizes(self.kernel_shape)[0]

    @property
    def features(self) -> tuple[int, int]:
        """(I, O): input and output features."""
        return self.kernel_axes.sizes(self.kernel_shape)[1:]

    @property
    def size(self) -> int:
        """R: the side of the square matrix, or LoRA's rank."""
        return self.config.size(*self.features)

    @property
    def leaves(self) -> dict[str, Leaf]:
        """Name -> leaf, without the batch axes."""
        return self.config.leaves(*self.features)

    @property
    def draws(self) -> bool:
        """Whether a new adapter needs a PRNG key."""
        return any(leaf.draws for leaf in self.leaves.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes of the adapter's leaves, batch axes in their places."""
        shapes = {}
        for name, leaf in self.leaves.items():
            rest = iter(leaf.shape)
            ndim = len(leaf.shape) + len(self.batch)
            sizes = dict(zip(self.adapter_batch_axes, self.batch, strict=True))
            shapes[name] = tuple(sizes[a] if a in sizes else next(rest) for a in range(ndim))
        return shapes

    @property
    def row_axis(self) -> int:
        """Which axis of the adapter's leaves is their rows; in a bank, adapter after adapter."""
        ndim = len(self.adapter_batch_axes) + 2
        return next(axis for axis in range(ndim) if axis not in self.adapter_batch_axes)

    @property
    def rows(self) -> dict[str, int]:
        """Rows of one adapter's leaves, by their names."""
        return {name: shape[self.row_axis] for name, shape in self.shapes.items()}

    @property
    def parameters(self) -> int:
        """Trained numbers in this layer's adapter."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def dead_entries(self) -> int:
        """Entries of one matrix that cannot act, where R exceeds a side of the layer."""
        return self.scheme.dead_entries(*self.features, self.size)

    def delta(self, adapter: Adapter) -> jax.Array:
        """The delta's kernel, laid out like the base kernel."""
        return self.kernel_axes.delta(self.batch_first(adapter), self.kernel_shape, self.scheme)

    def batch_first(self, adapter: Adapter) -> dict[str, jax.Array]:
        """The adapter's leaves as [B..., rows, columns]."""
        front = tuple(range(len(self.adapter_batch_axes)))
        return {
            name: jnp.moveaxis(leaf, self.adapter_batch_axes, front)
            for name, leaf in adapter.items()
        }

    def advance(self) -> AdapterSpec:
        """The same layer with the next scheme of its cycle.

        Raises:
          ValueError: where the next scheme's matrix has another size.
        """
        scheme = next_scheme(self.scheme, self.config.cycle, *self.features, self.size)
        spec = dataclasses.replace(self, config=dataclasses.replace(self.config, scheme=scheme))
        if spec.shapes != self.shapes:
            raise ValueError(
                f"a cycle must keep the adapter's shape: {self.scheme} has {self.shapes}, the next "
                f"one, {scheme}, has {spec.shapes}."
            )
        return spec


@jax.tree_util.register_static  # pyright: ignore
@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, AdapterSpec]):
    """What was adapted: a mapping from a layer's path to its `AdapterSpec`.

    Attributes:
      layers: (path, spec) of every adapted layer, in the model's order.
      also_train: (path, shape) of every parameter trained in full beside the adapters.
      base_parameters: how many numbers the base model has.
      left: (path, why) of every other layer, and of other parameters that are matrices; printed,
        and no part of what the plan is compared by or saves.
    """

    layers: tuple[tuple[str, AdapterSpec], ...]
    also_train: tuple[tuple[str, tuple[int, ...]], ...] = ()
    base_parameters: int = 0
    left: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)

    def __getitem__(self, path: str) -> AdapterSpec:
        for layer, spec in self.layers:
            if layer == path:
                return spec
        raise KeyError(path)

    def __iter__(self) -> Iterator[str]:
        return (path for path, _ in self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def choose(self, path: str) -> LayerConfig | None:
        """What the layer at `path` gets, or None where it is left alone."""
        return self[path].config if path in self else None

    def group(self, path: str) -> str:
        """ "adapter", "also_train" or "frozen": how the parameter at `path` is treated."""
        if is_adapter(path):
            return "adapter"
        return "also_train" if self.trains(path) else "frozen"

    def adapter_leaves(self, count: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Path, shape and dtype of every leaf of every adapter, or of banks of `count` adapters."""
        leaves = {}
        for path, spec in self.layers:
            for name, leaf in self.leaf_paths(path).items():
                shape = list(spec.shapes[name])
                shape[spec.row_axis] *= count
                leaves[leaf] = jax.ShapeDtypeStruct(tuple(shape), spec.config.dtype)
        return leaves

    def trains(self, path: str) -> bool:
        """Whether the parameter at `path` is trained in full beside the adapters."""
        return any(path == also for also, _ in self.also_train)

    def leaf_paths(self, layer: str) -> dict[str, str]:
        """Name -> path of the leaves of one layer's adapter."""
        spec = self[layer]
        prefix = adapter_path(layer, spec.kernel_name)
        return {name: join_path(prefix, name) for name in spec.shapes}

    def adapter_owners(self) -> dict[str, tuple[str, dict[int, int]]]:
        """Path of an adapter's leaf -> its kernel's, and which axes the two have in common.

        These are the axes of stacked layers and of experts: axis of the leaf -> axis of the kernel.
        """
        return {
            leaf: (
                join_path(path, spec.kernel_name),
                dict(zip(spec.adapter_batch_axes, spec.kernel_axes.batch, strict=True)),
            )
            for path, spec in self.layers
            for leaf in self.leaf_paths(path).values()
        }

    def kernel_paths(self) -> tuple[str, ...]:
        """Path of every adapted kernel."""
        return tuple(join_path(path, spec.kernel_name) for path, spec in self.layers)

    def advance(self) -> Plan:
        """The plan after a merge: every layer with the next scheme of its cycle."""
        layers = tuple((path, spec.advance()) for path, spec in self.layers)
        return dataclasses.replace(self, layers=layers)

    @property
    def trained_parameters(self) -> int:
        """Numbers in the adapters and in the parameters trained in full beside them."""
        adapters = sum(spec.parameters for _, spec in self.layers)
        return adapters + sum(math.prod(shape) for _, shape in self.also_train)

    def __str__(self) -> str:
        """The table of what was adapted; layers that differ in a number alone share a row."""
        rows: dict[tuple[str, ...], list[str]] = {}
        for path, spec in self.layers:
            row = (
                re.sub(r"\d+", "*", path),
                " x ".join(map(str, spec.kernel_shape)),
                f"{spec.scheme}, DoRA" if spec.config.dora else str(spec.scheme),
                str(spec.size),
                f"{spec.parameters:,}",
            )
            rows.setdefault(row, []).append(path)
        cells: list[tuple[str, ...]] = [("layer", "kernel", "scheme", "size", "trained")]
        for (pattern, *rest), paths in rows.items():
            name = paths[0] or "(root)" if len(paths) == 1 else f"{pattern} ({len(paths)}x)"
            cells.append((name, *rest))
        cells += [
            (path, " x ".join(map(str, shape)), "(trained in full)", "", f"{math.prod(shape):,}")
            for path, shape in self.also_train
        ]
        lines = table(cells)
        adapters = sum(math.prod(spec.batch) for _, spec in self.layers)
        share = self.trained_parameters / max(self.base_parameters, 1)
        lines.append(
            f"{adapters:,} adapters in {len(self):,} kernels; {self.trained_parameters:,} trained "
            f"parameters, {share:.2%} of the base model's {self.base_parameters:,}"
        )
        reasons: dict[str, dict[str, int]] = {}
        for path, why in self.left:
            paths = reasons.setdefault(why, {})
            pattern = re.sub(r"\d+", "*", path) or "(root)"
            paths[pattern] = paths.get(pattern, 0) + 1
        for why, paths in reasons.items():
            names = (f"{path} ({n}x)" if n > 1 else path for path, n in paths.items())
            lines.append(f"left alone, {why}: {', '.join(names)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as JSON, read back by `Plan.from_json`."""
        layers = {path: _spec_to_dict(spec) for path, spec in self.layers}
        fields = {"format": _FORMAT, "base_parameters": self.base_parameters}
        return json.dumps({**fields, "layers": layers, "also_train": dict(self.also_train)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
          ValueError: where the text is no plan, or one of a later version of this library.
        """
        try:
            fields = json.loads(text)
            if fields["format"] != _FORMAT:
                raise ValueError(f"format {fields['format']}, this version reads {_FORMAT}")
            return cls(
                tuple((path, _spec_from_dict(spec)) for path, spec in fields["layers"].items()),
                tuple((path, tuple(shape)) for path, shape in fields["also_train"].items()),
                fields["base_parameters"],
            )
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"not a plan: {error!r}. Expected the text of Plan.to_json, of this version."
            ) from error


def _spec_to_dict(spec: AdapterSpec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec)
    del fields["config"]["spread"]  # of a mesh, not of the adapter
    fields["config"]["scheme"] = spec.scheme.to_dict()
    if isinstance(spec.config.cycle, tuple):
        fields["config"]["cycle"] = [scheme.to_dict() for scheme in spec.config.cycle]
    return fields


def _spec_from_dict(fields: Mapping[str, Any]) -> AdapterSpec:
    config, axes = dict(fields["config"]), fields["kernel_axes"]
    config["scheme"] = scheme_from_dict(config["scheme"])
    if isinstance(config["cycle"], list):
        config["cycle"] = tuple(scheme_from_dict(scheme) for scheme in config["cycle"])
    spec = AdapterSpec(
        config=LayerConfig(**config),
        kernel_shape=tuple(fields["kernel_shape"]),
        kernel_axes=KernelAxes(**{name: tuple(value) for name, value in axes.items()}),
        adapter_batch_axes=tuple(fields["adapter_batch_axes"]),
        kernel_name=fields["kernel_name"],
    )
    _ = spec.rows  # axes that are not the kernel's are an error here
    return spec
