"""MoRA as LoRA: every delta's best approximation of a low rank, and how far off it is.

By Eckart and Young, no matrix of rank r is nearer to a delta than the first r terms of its
singular value decomposition; what is missing is known exactly, layer by layer. A MoRA update has a
far higher rank than the LoRA of as many parameters, so a projection loses something unless its rank
is R: the report says how much.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mora_jax._analysis.singular_values import core_matrices, layer_names
from mora_jax._arrays.boxes import put_beside
from mora_jax._arrays.paths import flatten, is_adapter, last_name, unflatten_like
from mora_jax._params.checks import check_adapted, check_adapters_finite, refuse_dora
from mora_jax._params.split import Params
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._plans.table import table
from mora_jax._schemes.low_rank import LowRank
from mora_jax._schemes.operators import check_rank


class LayerProjection(NamedTuple):
    """How well one layer's delta is approximated.

    Attributes:
      error: Frobenius norm of what is missing, over that of the delta; 0 where the delta is zero.
      norm: Frobenius norm of the delta.
    """

    error: float
    norm: float

    @property
    def kept(self) -> float:
        """The share of the delta's energy (its squared norm) that is kept."""
        return 1 - self.error**2


@dataclasses.dataclass(frozen=True)
class ProjectionReport:
    """What a projection to LoRA lost, layer by layer; prints as a table.

    Attributes:
      rank: of the LoRA.
      layers: name of a layer -> `LayerProjection`; layers of a stack are numbered,
        `"layers/up[3]"`.
    """

    rank: int
    layers: Mapping[str, LayerProjection]

    @property
    def total(self) -> LayerProjection:
        """The deltas of all layers taken as one vector."""
        norm = math.hypot(*(layer.norm for layer in self.layers.values()))
        missing = math.hypot(*(layer.error * layer.norm for layer in self.layers.values()))
        return LayerProjection(missing / norm if norm else 0.0, norm)

    def __str__(self) -> str:
        """A row for each layer, and one for all."""
        lines = [("layer", "norm", "relative error", "energy kept")]
        rows = {**self.layers, f"all, rank {self.rank}": self.total}
        for name, layer in rows.items():
            name = name or "(root)"
            lines.append((name, f"{layer.norm:.4g}", f"{layer.error:.2e}", f"{layer.kept:.2%}"))
        return "\n".join(table(lines))


def project_to_lora(
    params: Params, plan: Plan, rank: int
) -> tuple[dict[str, Any], Plan, ProjectionReport]:
    """Replaces every adapter by the LoRA of this rank that is nearest to it.

    Computed on the host, in float64. The deltas of sharing and truncation have no higher rank than
    R, the adapter's own size: at `rank` R the LoRA is exact. Those of rotation and decoupling have
    in general full rank, and take longer.

    Args:
      params: parameters with adapters of any scheme, LoRA's included.
      plan: the plan.
      rank: of the LoRA, in every layer. Where a delta has less, the rest is zero.

    Returns:
      (params, plan, report): the parameters with adapters of `LowRank()`, float32, and scale 1; the
      plan to `adapt` the base model with; and the error of every layer.

    Raises:
      ValueError: where the plan does not fit the parameters, an adapter is not finite, a layer has
        DoRA, or the rank is not a positive integer.

    >>> import flax.linen as nn, jax, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 3)))["params"]
    >>> params["mora"]["matrix_sharing"] = jax.numpy.diag(jax.numpy.array([0.0, 3.0, 4.0]))
    >>> lora_params, lora_plan, report = project_to_lora(params, plan, rank=1)
    >>> jax.tree.map(jax.numpy.shape, lora_params["mora"])
    {'a': (3, 1), 'b': (1, 6)}
    >>> f"{report.layers[''].error:.1f} {report.layers[''].kept:.2f}"
    '0.6 0.64'
    """
    check_rank(rank)
    leaves = flatten(params)
    check_adapted(plan, leaves)
    check_adapters_finite(plan, leaves, "projected")
    refuse_dora(
        plan,
        "projected",
        "scales the columns of the base too, which no LoRA does. Merge it instead",
    )
    layers = tuple((path, _low_rank(spec, rank)) for path, spec in plan.items())
    lora = dataclasses.replace(plan, layers=layers)
    factors: dict[str, dict[str, np.ndarray]] = {}
    found: dict[str, dict[tuple[int, ...], LayerProjection]] = {path: {} for path in plan}
    for path, index, core in core_matrices(plan, leaves):
        spec = plan[path]
        if path not in factors:
            a = np.zeros((*spec.batch, spec.features[0], rank), np.float32)
            factors[path] = {"a": a, "b": np.zeros((*spec.batch, rank, spec.features[1]), a.dtype)}
        u, v, energies = core.factors(rank)
        factors[path]["a"][index][:, : u.shape[1]] = u
        factors[path]["b"][index][: v.shape[1]] = v.T
        found[path][index] = _loss(energies, rank)
    owners, new = lora.adapter_owners(), {}
    for path, spec in plan.items():
        batch = spec.adapter_batch_axes
        for name, leaf in lora.leaf_paths(path).items():
            kernel, axes = owners[leaf]
            value = np.moveaxis(factors[path][name], range(len(batch)), batch)
            new[leaf] = put_beside(leaves[kernel], value, axes, last_name(leaf))
    base = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    report = ProjectionReport(rank, layer_names(plan, found))
    return unflatten_like(base | new, params), lora, report


def _low_rank(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """The same layer with a LoRA."""
    config = dataclasses.replace(
        spec.config, rank=rank, scheme=LowRank(), cycle=None, dtype="float32"
    )
    return dataclasses.replace(spec, config=config)


def _loss(energies: np.ndarray, rank: int) -> LayerProjection:
    """What is lost of a delta of these squared singular values, largest first."""
    total, missing = energies.sum(), energies[rank:].sum()
    return LayerProjection(float(np.sqrt(missing / total)) if total else 0.0, float(np.sqrt(total)))
