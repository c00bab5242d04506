"""Deltas and their singular values, exactly and cheaply.

Computed on the host, in float64. Sharing, truncation and LoRA take a decomposition of R x R, where
R is the adapter's own size: their deltas are Q_in K Q_out^T with orthonormal columns in Q_in and
Q_out, and K, the core, has all that is to be known. The delta of a rotation or a decoupling has in
general full rank, and is its own core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.places import on_host
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._schemes.operators import delta_kernel


class CoreMatrix(NamedTuple):
    """One layer's delta, `Q_in @ matrix @ Q_out.T`.

    Attributes:
      matrix: [J, K] float64.
      sides: (Q_in [I, J], Q_out [O, K]), of orthonormal columns; None where both are identities.
    """

    matrix: np.ndarray
    sides: tuple[np.ndarray, np.ndarray] | None

    @property
    def singular_values(self) -> np.ndarray:
        """The delta's, largest first; those beyond the core's size are zero.

        Exact down to 1e-8 of the largest.
        """
        return np.sqrt(np.linalg.eigvalsh(_gram(self.matrix))[::-1].clip(0))

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The nearest matrix of rank k <= `rank`, U @ V.T, by Eckart and Young.

        Returns:
          (U [I, k], V [O, k], squared singular values, largest first).
        """
        u, v, energies = _nearest(self.matrix, rank)
        if self.sides is None:
            return u, v, energies
        return self.sides[0] @ u, self.sides[1] @ v, energies


def core_matrices(
    plan: Plan, leaves: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], CoreMatrix]]:
    """(path, index on the stack, core) of every delta, layers of one kind after another."""
    kinds: dict[AdapterSpec, list[str]] = {}
    for path, spec in plan.items():
        kinds.setdefault(spec, []).append(path)
    for spec, paths in kinds.items():
        sides, axes = _sides(spec), spec.adapter_batch_axes
        for path in paths:
            host = {
                name: np.moveaxis(
                    on_host(unbox(leaves[leaf])).astype(np.float64), axes, range(len(axes))
                )
                for name, leaf in plan.leaf_paths(path).items()
            }
            for index in np.ndindex(*spec.batch):
                yield path, index, _core(spec, sides, {n: leaf[index] for n, leaf in host.items()})


def layer_names(plan: Plan, indices: Mapping[str, Mapping[tuple[int, ...], Any]]) -> dict[str, Any]:
    """Path -> index on the stack -> anything, as one mapping: `"layers/up[3]"`, as in the plan."""
    return {
        path + "".join(f"[{i}]" for i in index): found
        for path in plan
        for index, found in indices[path].items()
    }


#: (Q, R) of the compression's matrix, [I, R], and of the decompression's transpose, [O, R].
_Sides = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _sides(spec: AdapterSpec) -> _Sides | None:
    """Of schemes whose delta is one product C M D of fixed maps; None for others."""
    maps = jax.jit(_maps, static_argnums=0)(spec)
    if maps is None:
        return None
    before, after = (np.asarray(map, np.float64) for map in maps)
    return np.linalg.qr(before), np.linalg.qr(after.T)


def _maps(spec: AdapterSpec) -> tuple[jax.Array, jax.Array] | None:
    """C [I, R] and D [R, O]."""
    return spec.scheme.maps(*spec.features, spec.size)


def _core(spec: AdapterSpec, sides: _Sides | None, adapter: Mapping[str, Any]) -> CoreMatrix:
    """The core of one adapter, of the adapter's size where its delta has one."""
    if (factors := spec.scheme.factors(adapter)) is not None:
        first, matrix, second = factors
        sides = np.linalg.qr(first), np.linalg.qr(second.T)
    elif sides is None:
        single = {name: leaf.astype(np.float32) for name, leaf in adapter.items()}
        return CoreMatrix(
            np.asarray(_kernel(single, *spec.features, spec.scheme), np.float64), None
        )
    else:
        matrix = adapter["matrix"]
    (q_in, r_in), (q_out, r_out) = sides
    return CoreMatrix(r_in @ matrix @ r_out.T, (q_in, q_out))


_kernel = jax.jit(delta_kernel, static_argnums=(1, 2, 3))


def _gram(matrix: np.ndarray) -> np.ndarray:
    """The smaller one. Its eigenvalues take a fifth of the time of singular values.

    Those below 1e-8 of the largest are lost in it, far below what float32 can say.
    """
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _nearest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Core.factors` of the core itself."""
    if matrix.shape[0] > matrix.shape[1]:
        v, u, energies = _nearest(matrix.T, rank)
        return u, v, energies
    energies, vectors = np.linalg.eigh(_gram(matrix))
    u = vectors[:, ::-1][:, :rank]
    v = matrix.T @ u
    # Half of each singular value on either side.
    norms = np.sqrt(np.linalg.norm(v, axis=0))
    return u * norms, v / np.where(norms > 0, norms, 1), energies[::-1].clip(0)
