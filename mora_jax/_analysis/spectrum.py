"""What was learned, layer by layer: the singular values of every delta."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._analysis.singular_values import core_matrices, layer_names
from mora_jax._arrays.boxes import to_array, unbox
from mora_jax._arrays.dtypes import wide_dtype
from mora_jax._arrays.paths import flatten, join_path
from mora_jax._arrays.places import on_host
from mora_jax._params.checks import check_adapted, check_adapters_finite, refuse_dora
from mora_jax._params.split import Params
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._plans.table import table


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of one layer's delta.

    Attributes:
      singular_values: [K] float64, largest first; exact down to 1e-8 of the largest. K is the size
        of the adapter where its delta has no higher rank, else the smaller side of the kernel.
      base_norm: Frobenius norm of the base's kernel.
    """

    singular_values: np.ndarray
    base_norm: float

    def count(self, threshold: float = 0.1) -> int:
        """How many singular values exceed a threshold; the paper's Figure 5 has 0.1."""
        return int((self.singular_values > threshold).sum())

    @property
    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return float(np.linalg.norm(self.singular_values))

    @property
    def relative_norm(self) -> float:
        """The delta's norm over the base kernel's; NaN where both are zero."""
        norm = self.norm
        if not self.base_norm:
            return math.inf if norm else math.nan
        return norm / self.base_norm

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values over their sum; 0 where the delta is zero.

        From 1, where one stands for all, to their number, where all are equal. Roy and Vetterli,
        "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
        """
        total = self.singular_values.sum()
        if not total:
            return 0.0
        share = self.singular_values[self.singular_values > 0] / total
        return float(np.exp(-(share * np.log(share)).sum()))


@dataclasses.dataclass(frozen=True, eq=False)
class SpectrumReport:
    """The singular values of every layer's delta; prints as a table.

    Attributes:
      layers: name of a layer -> `Spectrum`; layers of a stack are numbered, `"layers/up[3]"`.
      threshold: of the singular values that the table counts.
    """

    layers: Mapping[str, Spectrum]
    threshold: float = 0.1

    @property
    def mean_count(self) -> float:
        """How many singular values of a layer exceed the threshold, the mean over the layers."""
        return float(np.mean([layer.count(self.threshold) for layer in self.layers.values()]))

    def __str__(self) -> str:
        """A row for each layer, and the mean of each column."""
        numbers = {
            name: (
                layer.norm,
                layer.relative_norm,
                layer.singular_values.max(),
                layer.count(self.threshold),
                layer.effective_rank,
            )
            for name, layer in self.layers.items()
        }
        rows = [("layer", "norm", "of base", "largest", f"> {self.threshold:g}", "effective rank")]
        for name, (norm, relative, largest, count, rank) in numbers.items():
            cells = f"{norm:.4g}", f"{relative:.2%}", f"{largest:.4g}", f"{count}", f"{rank:.1f}"
            rows.append((name or "(root)", *cells))
        norm, relative, largest, count, rank = np.mean([*numbers.values()], axis=0)
        cells = f"{norm:.4g}", f"{relative:.2%}", f"{largest:.4g}", f"{count:.1f}", f"{rank:.1f}"
        rows.append((f"mean of {len(numbers)}", *cells))
        return "\n".join(table(rows))


def spectrum(params: Params, plan: Plan, *, threshold: float = 0.1) -> SpectrumReport:
    """The singular values of every adapter's delta, and how they compare to the base.

    Computed on the host, in float64. Sharing, truncation and LoRA take a decomposition of the
    adapter's own size; rotation and decoupling one of the smaller side of the kernel.

    Args:
      params: parameters with adapters of any scheme, LoRA's included.
      plan: the plan.
      threshold: which singular values the printed table counts.

    Returns:
      The report, which prints as a table.

    Raises:
      ValueError: where the plan does not fit the parameters, an adapter is not finite, or the
        threshold is negative.

    >>> import flax.linen as nn, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="truncation"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = {"kernel": jnp.eye(3, 6), "bias": jnp.zeros(6)}
    >>> params["mora"] = {"matrix_truncation": jnp.diag(jnp.array([0.05, 0.3, 0.4]))}
    >>> report = mora_jax.spectrum(params, plan)
    >>> print(report)
    layer      norm    of base  largest  > 0.1  effective rank
    ----------------------------------------------------------
    (root)     0.5025  29.01%   0.4      2      2.4
    mean of 1  0.5025  29.01%   0.4      2.0    2.4
    >>> report.layers[""].singular_values.round(3)
    array([0.4 , 0.3 , 0.05])
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must not be negative, got {threshold}.")
    leaves = flatten(params)
    check_adapted(plan, leaves)
    check_adapters_finite(plan, leaves, "decomposed")
    refuse_dora(
        plan,
        "decomposed",
        "scales the columns of the base too, so that what was learned is more than a delta",
    )
    norms = {
        path: on_host(_norms(unbox(leaves[join_path(path, spec.kernel_name)]), spec))
        for path, spec in plan.items()
    }
    found: dict[str, dict[tuple[int, ...], Spectrum]] = {path: {} for path in plan}
    for path, index, core in core_matrices(plan, leaves):
        found[path][index] = Spectrum(core.singular_values, float(norms[path][index]))
    return SpectrumReport(layer_names(plan, found), threshold)


@functools.partial(jax.jit, static_argnames="spec")
def _norms(kernel: Any, spec: AdapterSpec) -> jax.Array:
    """Frobenius norms of a stack's kernels: [B...]."""
    kernel = to_array(kernel)
    axes = spec.kernel_axes
    squares = jnp.square(kernel.astype(wide_dtype(kernel.dtype)))
    squares = squares.transpose(axes.batch + axes.inputs + axes.outputs)
    return jnp.sqrt(squares.sum(range(len(axes.batch), squares.ndim)))
