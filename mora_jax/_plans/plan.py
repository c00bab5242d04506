"""Plans: what was adapted, layer by layer, as static data.

A plan is all that the tree functions need to know of a model: it comes from `mora_jax.plan`, it is
hashable (a static argument of jitted functions, a pytree without leaves), it prints as a table and
it travels as JSON beside saved adapters.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping

import jax

from mora_jax._arrays.paths import adapter_path, is_adapter, join_path
from mora_jax._compat.renamed import renamed_argument, warn_renamed
from mora_jax._plans.layer import AdapterSpec, LayerConfig, spec_from_dict, spec_to_dict
from mora_jax._plans.saved import Fields, digest_of, fields_of, natural, naturals
from mora_jax._plans.table import plan_table
from mora_jax._text.json_reader import read_json

_FORMAT = 1


@renamed_argument("left", "unadapted")
@jax.tree_util.register_static  # pyright: ignore
@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, AdapterSpec]):
    """What was adapted: a mapping from a layer's path to its `AdapterSpec`.

    Attributes:
      layers: (path, spec) of every adapted layer, in the model's order.
      also_train: (path, shape) of every parameter trained in full beside the adapters.
      base_parameters: how many numbers the base model has.
      merges: how often adapters were merged into the base by `merge_and_reset`; then they belong to
        the base as it is now, not to the pretrained one. Plans are compared by whether they were:
        a count would have jit compile anew after each merge.
      unadapted: (path, why) of every other layer, and of other parameters that are matrices. It is
        printed; plans are not compared by it, and it is not saved.
    """

    layers: tuple[tuple[str, AdapterSpec], ...]
    also_train: tuple[tuple[str, tuple[int, ...]], ...] = ()
    base_parameters: int = 0
    merges: int = dataclasses.field(default=0, compare=False, kw_only=True)
    unadapted: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)
    _merged: bool = dataclasses.field(init=False, repr=False, default=False)

    def __post_init__(self):
        object.__setattr__(self, "_merged", self.merges > 0)

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

    def role(self, path: str) -> str:
        """ "adapter", "also_train" or "frozen": how the parameter at `path` is treated."""
        if is_adapter(path):
            return "adapter"
        return "also_train" if self.trains(path) else "frozen"

    def group(self, path: str) -> str:
        """The old name of `role`."""
        warn_renamed("Plan.group", "Plan.role")
        return self.role(path)

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
        """Name -> path of the leaves of one layer's adapter.

        The path says the scheme: `{"matrix": "q_proj/mora/matrix_sharing"}`.
        """
        spec = self[layer]
        prefix = adapter_path(layer, spec.kernel_name)
        return {name: join_path(prefix, spec.config.stored_name(name)) for name in spec.shapes}

    def renamed(self, other: Plan) -> dict[str, str]:
        """Path of an adapter's leaf -> its path in another plan of these layers.

        They differ where the schemes do; nothing where none does.
        """
        old, new = [*self.plain_paths()], [*other.plain_paths()]
        # All of them, so that a path that ends in another one is not taken for it.
        return {} if old == new else dict(zip(old, new, strict=True))

    def plain_paths(self) -> dict[str, str]:
        """Path of every adapter's leaf -> the same without the scheme: its name in files."""
        return {
            path: join_path(path.rpartition("/")[0], name)
            for layer in self
            for name, path in self.leaf_paths(layer).items()
        }

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

    def before_merges(self) -> Plan:
        """The plan as one of a base that was never merged into: for what does not depend on it."""
        return dataclasses.replace(self, merges=0) if self.merges else self

    def advance(self) -> Plan:
        """The plan after a merge: every layer with the next scheme of its cycle."""
        layers = tuple((path, spec.advance()) for path, spec in self.layers)
        return dataclasses.replace(self, layers=layers, merges=self.merges + 1)

    @property
    def trained_parameters(self) -> int:
        """Numbers in the adapters and in the parameters trained in full beside them."""
        adapters = sum(spec.parameters for _, spec in self.layers)
        return adapters + sum(math.prod(shape) for _, shape in self.also_train)

    def __str__(self) -> str:
        """The table of what was adapted; layers that differ in a number alone share a row."""
        return plan_table(self.layers, self.also_train, self.unadapted, self.base_parameters)

    def to_json(self) -> str:
        """The plan as JSON, read back by `Plan.from_json`."""
        layers = {path: spec_to_dict(spec) for path, spec in self.layers}
        fields = {
            "format": _FORMAT,
            "base_parameters": self.base_parameters,
            "merges": self.merges,
            "layers": layers,
            "also_train": dict(self.also_train),
        }
        return json.dumps({**fields, "digest": digest_of(fields)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
          ValueError: naming the key, where the text is no plan, or one of a later version.
        """
        try:
            return _read(text)
        except ValueError as error:
            raise ValueError(
                f"not a plan: {error}. Expected the text of Plan.to_json, of this version."
            ) from error


def _read(text: str) -> Plan:
    """A plan, each of its fields checked."""
    if not isinstance(text, str):
        raise ValueError(f"it is a {type(text).__name__}, wanted a text")
    fields = Fields(read_json(text), "")
    digest = fields.left.pop("digest", None)  # plans of earlier versions have none
    if digest is not None and digest != digest_of(fields.left):
        raise ValueError(
            "its digest is that of other text, so it is damaged. If you changed the text on "
            "purpose, leave the key 'digest' out"
        )
    if (version := fields.take("format", natural)) != _FORMAT:
        raise ValueError(f"format is {version}, this version reads {_FORMAT}")
    layers, trained = (Fields(fields.take(key, fields_of), key) for key in ("layers", "also_train"))
    plan = Plan(
        tuple((path, spec_from_dict(v, f"layers[{path!r}]")) for path, v in layers.left.items()),
        tuple((path, trained.take(path, naturals)) for path in [*trained.left]),
        fields.take("base_parameters", natural),
        merges=fields.take("merges", natural, 0),
    )
    fields.end()
    return plan
