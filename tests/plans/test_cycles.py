"""Cycles of schemes: where they go, and what rank adds up over merges."""

import jax
import numpy as np
import pytest

import mora_jax
from helpers.arrays import random_adapter
from mora_jax._plans.cycles import next_scheme


def walk(scheme, cycle, steps, in_features=1024, out_features=1024, size=181):
    schemes = [scheme]
    for _ in range(steps - 1):
        schemes.append(next_scheme(schemes[-1], cycle, in_features, out_features, size))
    return schemes


def test_cycles_go_round():
    assert len(set(walk(mora_jax.Sharing(), "groupings", 9))) == 4
    assert walk(mora_jax.Sharing(), "groupings", 5)[-1] == mora_jax.Sharing()
    assert [scheme.signs for scheme in walk(mora_jax.Sharing(), "signs", 8)] == [
        0, 1, 2, 3, 4, 5, 0, 1,
    ]  # fmt: skip
    assert [scheme.shift for scheme in walk(mora_jax.Sharing(), "shifts", 3)] == [0, 1, 2]
    own = (mora_jax.Truncation(), mora_jax.Decoupling())
    assert walk(own[0], own, 3) == [*own, own[0]]
    assert walk(mora_jax.Rotation(), "auto", 3) == [mora_jax.Rotation()] * 3
    assert walk(mora_jax.Sharing(), "auto", 2)[1] == mora_jax.Sharing(signs=1)


def accumulated_ranks(cycle, merges, in_features, out_features, rank):
    """Rank of the sum of deltas with random matrices, after each merge."""
    scheme, total, ranks = mora_jax.Sharing(), 0, []
    size = mora_jax.square_rank(in_features, out_features, rank, scheme)
    for seed in range(merges):
        adapter = random_adapter(in_features, out_features, rank, scheme, seed)
        make = jax.jit(mora_jax.delta_kernel, static_argnums=(1, 2, 3))
        kernel = make(adapter, in_features, out_features, scheme)
        total = total + np.asarray(kernel, np.float64)
        ranks.append(int(np.linalg.matrix_rank(total)))
        scheme = next_scheme(scheme, cycle, in_features, out_features, size)
    return ranks


def random_group_ranks(merges, in_features, out_features, size):
    rng, total, ranks = np.random.default_rng(0), 0, []
    for _ in range(merges):
        rows, columns = (rng.permutation(np.arange(n) % size) for n in (in_features, out_features))
        total = total + rng.standard_normal((size, size))[rows][:, columns]
        ranks.append(int(np.linalg.matrix_rank(total)))
    return ranks


def span_of_all_shifts(features, size):
    """Rank of the compressions of all shifts together: the most that shifts can reach."""
    padded = -(-features // size) * size
    feature, shift = np.arange(padded)[:, None], np.arange(size)
    group = (feature + shift * (feature // size)) % size
    span = np.zeros((features, size, size))
    np.add.at(span, (feature % features, shift, group), 1)
    span = span.reshape(features, -1)
    return int(np.linalg.matrix_rank(span @ span.T, hermitian=True))  # as that of the span


@pytest.mark.slow
def test_rank_accumulates_over_merges():
    in_features, out_features, rank, merges = 512, 768, 8, 10
    size = mora_jax.square_rank(in_features, out_features, rank, mora_jax.Sharing())
    full = min(in_features, out_features)
    sizes = (merges, in_features, out_features, rank)
    authors, shifts, signs = (
        accumulated_ranks(cycle, *sizes) for cycle in ("groupings", "shifts", "signs")
    )
    print(f"\n{in_features} -> {out_features}, size {size}; rank after each merge:")
    print(f"groupings {authors}\nshifts    {shifts}\nsigns     {signs}")
    print(f"random    {random_group_ranks(merges, in_features, out_features, size)}")
    assert max(authors) <= 2 * size
    reachable = min(span_of_all_shifts(n, size) for n in (in_features, out_features))
    assert shifts[-1] >= max(0.97 * reachable, 0.9 * full)
    # Walsh signs add the whole size at every merge, to the very end.
    assert signs == [min(size * (merge + 1), full) for merge in range(merges)]
