"""The operators of the MoRA paper (arXiv 2405.12130) as explicit matrices: slow, plain, NumPy only.

Every scheme is written as n pairs of matrices, so that with rows as vectors

    delta_kernel = sum_i C_i @ M @ D_i,    y = x @ (W + delta_kernel)              (2), (3)

where C_i (in, r) compresses and D_i (r, out) decompresses. Equation numbers are the paper's; where
its text and the authors' code differ (padding, rounding, pairing) the code is followed.

Schemes are plain tuples, and adapters dicts {"matrix": M} or {"a": A, "b": B}:

    ("sharing", grouping_in, grouping_out, shift, sign)   groupings "stride" or "contiguous"
    ("rotation", cycle)  ("decoupling", cycle)  ("truncation",)
    ("groups", inputs, outputs)               functions (features, r) -> pairs (feature, group)
    ("low_rank", alpha)

Stride groups, block b = j // r: g(j) = (j + shift * b) mod r, times (-1)**popcount(sign & b).
Shapes: x (..., in), dy (..., out), M (r, r), A (in, rank), B (rank, out). All sums are float64.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Scheme = tuple[Any, ...]


def square_rank(in_features: int, out_features: int, rank: int, even: bool) -> int:
    """r = round(sqrt((in + out) * rank)), floored to even for the rotation."""
    size = int(math.sqrt((in_features + out_features) * rank) + 0.5)
    return size - size % 2 if even else size


def _share(grouping: str, length: int, features: int, r: int, shift: int, sign: int) -> Array:
    """g as a signed 0-1 matrix (features, r): positions j < length, feature j mod features."""
    matrix = np.zeros((features, r))
    if grouping == "stride":
        for j in range(length):
            walsh = (-1.0) ** (sign & j // r).bit_count()
            matrix[j % features, (j + shift * (j // r)) % r] += walsh
    elif shift or sign:
        raise ValueError(f"{shift=} and {sign=} need stride groups on both sides")
    else:
        q, longer = divmod(features, r)  # runs of q, the first `longer` of them of q + 1
        for j in range(features):
            group = j // (q + 1) if j < longer * (q + 1) else (j - longer) // q
            matrix[j, group] = 1.0
    return matrix


def _members(pairs: Callable[[int, int], list[tuple[int, int]]], features: int, r: int) -> Array:
    """Groups as a matrix (features, r): how often a feature is in a group."""
    matrix = np.zeros((features, r))
    for feature, group in pairs(features, r):
        matrix[feature, group] += 1.0
    return matrix


def _rotate(position: int, r: int) -> Array:
    """R_i (r, r) of (9)-(11), for rows: x @ R_i = x * cos + concat(-x[r/2:], x[:r/2]) * sin."""
    if r % 2:
        raise ValueError(f"a rotation pairs features, so r must be even, got {r}")
    half = r // 2
    matrix = np.zeros((r, r))
    for j in range(half):
        angle = position * 10000.0 ** (-2.0 * j / r)
        matrix[j, j] = matrix[j + half, j + half] = math.cos(angle)
        matrix[j + half, j] = -math.sin(angle)
        matrix[j, j + half] = math.sin(angle)
    return matrix


def _block_counts(in_features: int, out_features: int, r: int, cycle: bool) -> tuple[int, int, int]:
    """(n, n_in, n_out); without a cycle n_in of each, whatever the output."""
    n_in = math.ceil(in_features / r)
    n_out = math.ceil(out_features / r) if cycle else n_in
    return max(n_in, n_out), n_in, n_out


def compress_matrices(scheme: Scheme, in_features: int, out_features: int, r: int) -> Array:
    """C (n, in, r), where f_comp(x)_i = x @ C_i."""
    match scheme:
        case ("truncation",):  # (4): the first r features, zeros where there are fewer
            return np.eye(in_features, r)[None]
        case ("sharing", "stride" | "contiguous" as grouping, _, shift, sign):  # (6): sum groups
            padded = r * math.ceil(in_features / r)
            return _share(grouping, padded, in_features, r, shift, sign)[None]
        case ("rotation" | "decoupling" as name, cycle):  # (8)-(11): blocks of r
            n, n_in, _ = _block_counts(in_features, out_features, r, cycle)
            matrices = np.zeros((n, in_features, r))
            for i in range(n):
                for c in range(r):
                    matrices[i, ((i % n_in) * r + c) % in_features, c] = 1.0  # circular padding
                if name == "rotation":
                    matrices[i] = matrices[i] @ _rotate(i, r)
            return matrices
        case ("groups", inputs, _):  # as (6), of any groups
            return _members(inputs, in_features, r)[None]
    raise ValueError(f"unknown scheme {scheme!r}")


def decompress_matrices(scheme: Scheme, in_features: int, out_features: int, r: int) -> Array:
    """D (n, r, out), where f_decomp(z) = sum_i z_i @ D_i."""
    match scheme:
        case ("truncation",):  # (5): zeros after the first r
            return np.eye(r, out_features)[None]
        case ("sharing", _, "stride" | "contiguous" as grouping, shift, sign):  # (7): z[g'(j)]
            return _share(grouping, out_features, out_features, r, shift, sign).T[None]
        case ("rotation" | "decoupling", cycle):  # (8), (9): blocks concatenated
            n, _, n_out = _block_counts(in_features, out_features, r, cycle)
            matrices = np.zeros((n, r, out_features))
            for j in range(out_features):  # blocks i = j // r modulo n_out: one, or all that meet
                matrices[(j // r) % n_out :: n_out, j % r, j] = 1.0
            return matrices
        case ("groups", _, outputs):  # as (7), of any groups
            return _members(outputs, out_features, r).T[None]
    raise ValueError(f"unknown scheme {scheme!r}")


def _float64(array: Any) -> Array:
    return np.asarray(array, np.float64)


def _outer(x: Array, dy: Array) -> Array:
    """x^T dy, summed over the leading axes: (in, out)."""
    return _float64(x).reshape(-1, x.shape[-1]).T @ _float64(dy).reshape(-1, dy.shape[-1])


def delta_kernel(scheme: Scheme, M: Array, in_features: int, out_features: int) -> Array:
    """sum_i C_i @ M @ D_i: (in, out), the transpose of the paper's dW in (3)."""
    C = compress_matrices(scheme, in_features, out_features, M.shape[0])
    D = decompress_matrices(scheme, in_features, out_features, M.shape[0])
    return (C @ _float64(M) @ D).sum(axis=0)


def delta(scheme: Scheme, x: Array, M: Array, out_features: int) -> Array:
    """f_decomp(M f_comp(x)) of (2): (..., out)."""
    return _float64(x) @ delta_kernel(scheme, M, x.shape[-1], out_features)


def grad_M(scheme: Scheme, x: Array, dy: Array, r: int) -> Array:
    """Gradient of <delta, dy> in M, sum_i C_i^T x^T dy D_i^T: (r, r)."""
    C = compress_matrices(scheme, x.shape[-1], dy.shape[-1], r)
    D = decompress_matrices(scheme, x.shape[-1], dy.shape[-1], r)
    return (C.swapaxes(1, 2) @ _outer(x, dy) @ D.swapaxes(1, 2)).sum(axis=0)


def grad_x(scheme: Scheme, M: Array, dy: Array, in_features: int) -> Array:
    """Gradient of <delta, dy> in x, dy @ delta_kernel^T: (..., in)."""
    return _float64(dy) @ delta_kernel(scheme, M, in_features, dy.shape[-1]).T


def low_rank_kernel(alpha: float, A: Array, B: Array) -> Array:
    """LoRA, (1): alpha / rank * A @ B, (in, out)."""
    return alpha / A.shape[1] * _float64(A) @ _float64(B)


def low_rank_grads(alpha: float, A: Array, B: Array, x: Array, dy: Array) -> tuple[Array, Array]:
    """Gradients of <x @ low_rank_kernel, dy> in A and in B."""
    dW = alpha / A.shape[1] * _outer(x, dy)
    return dW @ _float64(B).T, _float64(A).T @ dW


def adapter_kernel(
    scheme: Scheme, adapter: dict[str, Array], in_features: int, out_features: int
) -> Array:
    """The delta's kernel (in, out) of an adapter of any scheme."""
    match scheme:
        case ("low_rank", alpha):
            return low_rank_kernel(alpha, adapter["a"], adapter["b"])
    return delta_kernel(scheme, adapter["matrix"], in_features, out_features)


def adapter_gradients(
    scheme: Scheme, adapter: dict[str, Array], x: Array, dy: Array
) -> dict[str, Array]:
    """Gradient of <delta, dy> in an adapter of any scheme, a dict like it."""
    match scheme:
        case ("low_rank", alpha):
            da, db = low_rank_grads(alpha, adapter["a"], adapter["b"], x, dy)
            return {"a": da, "b": db}
    return {"matrix": grad_M(scheme, x, dy, adapter["matrix"].shape[0])}


def dora_kernel(W: Array, D: Array, m: Array) -> Array:
    """DoRA, (5) of arXiv 2402.09353: m (W + D) / ||W + D||_c, norms over the inputs; m (out,)."""
    V = _float64(W) + _float64(D)
    return _float64(m) * V / np.sqrt((V**2).sum(axis=0))


def dora_grads(W: Array, D: Array, m: Array, x: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Gradients of <x @ W', dy> in m, (7) there, in x, and the dy' for which that of D is x^T dy'.

    The norm is a constant C for the gradient of the direction, (11) there: m / C times that of W'.
    """
    V = _float64(W) + _float64(D)
    norm = np.sqrt((V**2).sum(axis=0))
    dm = (_outer(x, dy) * V / norm).sum(axis=0)
    return dm, _float64(dy) @ dora_kernel(W, D, m).T, _float64(dy) * m / norm
