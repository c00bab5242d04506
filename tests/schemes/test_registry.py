"""Schemes as data: sizes, names, round trips, cycles."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mora_jax
from helpers import reference
from helpers.arrays import random_adapter
from helpers.schemes import ALL_SCHEMES
from mora_jax._plans.cycles import check_cycle, next_scheme
from mora_jax._schemes.registry import as_scheme


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_round_trips_through_json_and_repr(scheme):
    assert mora_jax.scheme_from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert eval(repr(scheme), vars(mora_jax)) == scheme
    assert hash(scheme) == hash(mora_jax.scheme_from_dict(scheme.to_dict()))


@given(*(st.integers(1, 20_000) for _ in range(2)), st.integers(1, 512))
def test_square_rank_is_the_authors(in_features, out_features, rank):
    for scheme, even in ((mora_jax.Sharing(), False), (mora_jax.Rotation(), True)):
        wanted = reference.square_rank(in_features, out_features, rank, even)
        # A rotation needs a pair of features, where the authors' arithmetic gives none.
        wanted = max(wanted, 2) if even else wanted
        assert mora_jax.square_rank(in_features, out_features, rank, scheme) == wanted


@given(*(st.integers(1, 20_000) for _ in range(2)), st.integers(1, 512), st.integers(1, 200))
def test_sizes_are_rounded_to_the_nearest_multiple_that_the_layer_holds(i, o, rank, multiple):
    for scheme, step in (
        (mora_jax.Sharing(), multiple),
        (mora_jax.Rotation(), np.lcm(multiple, 2)),
    ):
        exact = mora_jax.square_rank(i, o, rank, scheme)
        size = mora_jax.square_rank(i, o, rank, scheme, multiple=multiple)
        most = max(exact, min(i, o))
        held = [n for n in range(step, 2 * exact + step, step) if n <= most]
        nearest = min((abs(n - exact) for n in held), default=0)
        assert abs(size - exact) == nearest
        assert size in (held or [exact])
    assert mora_jax.square_rank(i, o, rank, mora_jax.LowRank(), multiple=multiple) == rank


def test_rounded_sizes_of_llama_3():
    features = {"q": (4096, 4096), "k": (4096, 1024), "up": (4096, 14336)}
    sizes = {
        name: [mora_jax.square_rank(*f, rank, mora_jax.Sharing(), multiple=64) for rank in (8, 128)]
        for name, f in features.items()
    }
    assert sizes == {"q": [256, 1024], "k": [192, 832], "up": [384, 1536]}


def test_the_authors_types():
    types = {number: mora_jax.scheme_from_mora_type(number) for number in (1, 2, 3, 4, 6)}
    assert types[3] == mora_jax.Sharing("contiguous", "stride")
    assert len(set(types.values())) == 5
    for unknown in (0, 5, 7):
        with pytest.raises(ValueError, match=f"mora_type {unknown} is no scheme"):
            mora_jax.scheme_from_mora_type(unknown)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_ranks_are_positive_integers(rank):
    with pytest.raises(ValueError, match=f"rank must be a positive integer, got {rank}"):
        mora_jax.square_rank(8, 8, rank, mora_jax.Sharing())
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        mora_jax.MoRAConfig(rank=rank)
    with pytest.raises(ValueError, match=f"size_multiple must be a positive integer, got {rank}"):
        mora_jax.MoRAConfig(size_multiple=rank)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mora_jax.Sharing("blocks"), "input must be one of"),
        (lambda: mora_jax.Sharing(shift=-1), "shift must be a non-negative int"),
        (lambda: mora_jax.Sharing("contiguous", "stride", shift=1), "needs 'stride' on both"),
        (lambda: mora_jax.scheme_from_dict({"kind": "spiral"}), "Unknown scheme 'spiral'"),
        (lambda: mora_jax.scheme_from_dict({"kind": "rotation", "x": 1}), "has no field"),
        (lambda: as_scheme("spiral", 8), "Unknown scheme 'spiral'; there are: auto, sharing"),
        (lambda: mora_jax.Rotation(wrap="no"), "wrap must be a bool, got 'no'"),
        (lambda: mora_jax.LowRank(alpha=0), "alpha must be a positive number, got 0"),
        (lambda: check_cycle(3), "must be a name, None or a tuple of schemes, got 3"),
        (lambda: mora_jax.compress(jnp.ones(8), 3, mora_jax.Rotation()), "must be even, got 3"),
        (lambda: check_cycle("spirals"), "Unknown cycle 'spirals'"),
        (lambda: check_cycle((mora_jax.Sharing(),) * 2), "names a scheme twice"),
        (lambda: next_scheme(mora_jax.Rotation(), "signs", 8, 8, 4), "needs Sharing"),
        (lambda: next_scheme(mora_jax.Rotation(), "groupings", 8, 8, 4), "needs Sharing, got Rot"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 6, 7, 12, 19])
def test_the_first_walsh_functions_are_independent_on_any_number_of_blocks(blocks):
    rows = [
        mora_jax.compress(jnp.eye(blocks), 1, mora_jax.Sharing(signs=signs))[:, 0]
        for signs in range(blocks)
    ]
    assert np.linalg.matrix_rank(np.stack(rows)) == blocks
