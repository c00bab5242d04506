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

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._merge import check_finite
from mora_jax._mesh import beside, on_host, sharding_of
from mora_jax._operators import Adapter, compress, decompress, delta_kernel, lora_scale
from mora_jax._params import Params, check_adapted
from mora_jax._plan import AdapterSpec, Plan
from mora_jax._schemes import LowRank, Sharing, Truncation, check_rank
from mora_jax._tree import flatten, is_adapter, listing, rebuild
from mora_jax._variables import box_like, value_of


class Projected(NamedTuple):
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
      layers: name of a layer -> `Projected`; layers of a stack are numbered, `"layers/up[3]"`.
    """

    rank: int
    layers: Mapping[str, Projected]

    @property
    def total(self) -> Projected:
        """The deltas of all layers taken as one vector."""
        norm = math.hypot(*(layer.norm for layer in self.layers.values()))
        missing = math.hypot(*(layer.error * layer.norm for layer in self.layers.values()))
        return Projected(missing / norm if norm else 0.0, norm)

    def __str__(self) -> str:
        """A row for each layer, and one for all."""
        table = [("layer", "norm", "relative error", "energy kept")]
        rows = {**self.layers, f"all, rank {self.rank}": self.total}
        for name, layer in rows.items():
            table.append((name, f"{layer.norm:.4g}", f"{layer.error:.2e}", f"{layer.kept:.2%}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(lines)


def project_to_lora(
    params: Params, plan: Plan, rank: int
) -> tuple[dict[str, Any], Plan, ProjectionReport]:
    """Replaces every adapter by the LoRA of this rank that is nearest to it.

    Computed on the host, in float64. Sharing and truncation take a decomposition of R x R, where R
    is the adapter's own size: their deltas have no higher rank, and at `rank` R the LoRA is exact.
    The delta of a rotation or a decoupling has in general full rank, and its whole kernel is
    decomposed.

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

    >>> import flax.linen as nn, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> params["mora"]["matrix"] = jnp.diag(jnp.array([0.0, 3.0, 4.0]))
    >>> lora_params, lora_plan, report = project_to_lora(params, plan, rank=1)
    >>> jax.tree.map(jnp.shape, lora_params["mora"])
    {'a': (3, 1), 'b': (1, 6)}
    >>> f"{report.layers[''].error:.1f} {report.layers[''].kept:.2f}"
    '0.6 0.64'
    """
    check_rank(rank)
    leaves = flatten(params)
    check_adapted(plan, leaves)
    check_finite(plan, leaves)
    if dora := [path for path, spec in plan.items() if spec.config.dora]:
        raise ValueError(
            f"not projected: DoRA scales the columns of the base too, which no LoRA does (layers "
            f"{listing(dora)}). Merge it instead."
        )
    layers = tuple((path, _low_rank(spec, rank)) for path, spec in plan.items())
    lora = dataclasses.replace(plan, layers=layers)
    owners, new, report = lora.adapter_owners(), {}, {}
    for spec, paths in _kinds(plan).items():
        sides, batch = _sides(spec), spec.adapter_batch_axes
        for path in paths:
            adapter = {name: value_of(leaves[leaf]) for name, leaf in plan.leaf_paths(path).items()}
            factors, report[path] = _project_layer(spec, sides, adapter, rank)
            for name, leaf in lora.leaf_paths(path).items():
                kernel, axes = owners[leaf]
                value = np.moveaxis(factors[name], range(len(batch)), batch)
                place = sharding_of(value_of(leaves[kernel]))
                place = None if place is None else beside(place, value.ndim, axes)
                new[leaf] = box_like(leaves[kernel], jax.device_put(value, place), axes)
    base = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    layers = {
        path + "".join(f"[{i}]" for i in index): found
        for path in plan
        for index, found in report[path].items()
    }
    return rebuild(base | new, params), lora, ProjectionReport(rank, layers)


def _kinds(plan: Plan) -> dict[AdapterSpec, list[str]]:
    """The layers of each kind: what is fixed about a kind is decomposed once."""
    kinds: dict[AdapterSpec, list[str]] = {}
    for path, spec in plan.items():
        kinds.setdefault(spec, []).append(path)
    return kinds


def _low_rank(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """The same layer with a LoRA."""
    config = dataclasses.replace(
        spec.config, rank=rank, scheme=LowRank(), cycle=None, dtype="float32"
    )
    return dataclasses.replace(spec, config=config)


def _project_layer(
    spec: AdapterSpec, sides: Sides | None, adapter: Adapter, rank: int
) -> tuple[dict[str, np.ndarray], dict[tuple[int, ...], Projected]]:
    """({"a": [B..., I, rank], "b": [B..., rank, O]}, index on B -> what was lost)."""
    axes = spec.adapter_batch_axes
    host = {
        name: np.moveaxis(on_host(leaf).astype(np.float64), axes, range(len(axes)))
        for name, leaf in adapter.items()
    }
    a = np.zeros((*spec.batch, spec.features[0], rank), np.float32)
    b = np.zeros((*spec.batch, rank, spec.features[1]), np.float32)
    found = {}
    for index in np.ndindex(*spec.batch):
        one = {name: leaf[index] for name, leaf in host.items()}
        u, v, found[index] = _factors(spec, sides, one, rank)
        a[index][:, : u.shape[1]] = u
        b[index][: v.shape[1]] = v.T
    return {"a": a, "b": b}, found


#: (Q, R) of the compression's matrix, [I, R], and of the decompression's transpose, [O, R].
Sides = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _sides(spec: AdapterSpec) -> Sides | None:
    """For schemes whose delta is one product C M D."""
    if not isinstance(spec.scheme, Sharing | Truncation):
        return None
    before, after = jax.jit(_maps, static_argnums=0)(spec)
    return np.linalg.qr(np.asarray(before, np.float64)), np.linalg.qr(
        np.asarray(after.T, np.float64)
    )


def _maps(spec: AdapterSpec) -> tuple[jax.Array, jax.Array]:
    """C [I, R] and D [R, O]."""
    inputs, outputs = spec.features
    before = compress(jnp.eye(inputs), spec.size, spec.scheme)
    return before, decompress(jnp.eye(spec.size), outputs, spec.scheme)


def _factors(
    spec: AdapterSpec, sides: Sides | None, adapter: Mapping[str, Any], rank: int
) -> tuple[np.ndarray, np.ndarray, Projected]:
    """`_nearest` of one delta, by a core of the adapter's size where it has one."""
    if isinstance(spec.scheme, LowRank):
        matrix = lora_scale(adapter, spec.scheme) * np.eye(spec.size)
        sides = np.linalg.qr(adapter["a"]), np.linalg.qr(adapter["b"].T)
    elif sides is None:
        single = {name: leaf.astype(np.float32) for name, leaf in adapter.items()}
        kernel = _kernel(single, *spec.features, spec.scheme)
        return _nearest(np.asarray(kernel, np.float64), rank)
    else:
        matrix = adapter["matrix"]
    (q_in, r_in), (q_out, r_out) = sides
    u, v, found = _nearest(r_in @ matrix @ r_out.T, rank)
    return q_in @ u, q_out @ v, found


_kernel = jax.jit(delta_kernel, static_argnums=(1, 2, 3))


def _nearest(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, Projected]:
    """U [I, k] and V [O, k] with `U @ V.T` the nearest to the kernel of rank k <= `rank`.

    By the eigenvectors of the smaller Gram matrix, five times as fast as a singular value
    decomposition. Singular values below 1e-8 of the largest are lost in it, far below what
    float32 factors can say.
    """
    if kernel.shape[0] > kernel.shape[1]:
        v, u, found = _nearest(kernel.T, rank)
        return u, v, found
    energies, vectors = np.linalg.eigh(kernel @ kernel.T)
    energies, vectors = energies[::-1].clip(0), vectors[:, ::-1]
    total = energies.sum()
    missing = energies[rank:].sum()
    u = vectors[:, :rank]
    v = kernel.T @ u
    # Half of each singular value on either side.
    norms = np.sqrt(np.linalg.norm(v, axis=0))
    u, v = u * norms, v / np.where(norms > 0, norms, 1)
    return u, v, Projected(float(np.sqrt(missing / total)) if total else 0.0, float(np.sqrt(total)))
