"""Schemes as data: sizes, names, round trips, what is refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mora_jax
from helpers import reference
from helpers.schemes import ALL_SCHEMES
from mora_jax._plans.cycles import check_cycle, next_scheme
from mora_jax._schemes import registry
from mora_jax._schemes.registry import as_scheme


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_round_trips_through_json_and_repr(scheme):
    assert mora_jax.scheme_from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    # A scheme of one's own has its class in no module of ours.
    own = {type(scheme).__name__: type(scheme)}
    assert eval(repr(scheme), {**vars(mora_jax), **own}) == scheme
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


def own(bases=(mora_jax.Scheme,), **members):
    """A class with the two maps, and what is given beside or in place of them."""
    maps = {"compress": lambda self, x, size, **_: x, "decompress": lambda self, z, out_features: z}
    members = {"kind": "own", "__module__": __name__, **maps, **members}
    return type("Own", bases, {name: value for name, value in members.items() if value})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: 3, TypeError, "expected a class derived from Scheme, got 3"),
        (lambda: own(bases=(object,)), TypeError, "expected a class derived from Scheme"),
        (lambda: own(kind=""), ValueError, "kind must name it, got ''"),
        (lambda: own(kind="auto"), ValueError, "kind must name it, got 'auto'"),
        (lambda: own(kind="sharing"), ValueError, "'sharing' is taken by .*Sharing"),
        (lambda: own(__annotations__={"kind": str}), TypeError, "a field `kind`"),
        (lambda: own(__annotations__={"turns": int}), TypeError, r"give \['turns'\] defaults"),
        (lambda: own(__init__=lambda self: None), TypeError, "__init__ of its own"),
        (lambda: dataclasses.dataclass(frozen=True, eq=False)(own()), TypeError, "must be frozen"),
        (lambda: own(compress=None, decompress=None), TypeError, "must define compress and"),
        (lambda: own(leaves=lambda *_: {}), TypeError, "leaves of its own.* delta_by, delta_ker"),
    ],
)
def test_a_scheme_that_could_not_be_compared_saved_or_trained_is_not_registered(
    make, error, message
):
    before = dict(registry.SCHEMES)
    with pytest.raises(error, match=message):
        mora_jax.register_scheme(make())
    assert before == registry.SCHEMES


def test_a_scheme_that_is_not_registered_enters_no_config():
    unknown = own(kind="unknown")()
    for config in (
        lambda: mora_jax.MoRAConfig(scheme=unknown),
        lambda: mora_jax.MoRAConfig(schemes={"q": unknown}),
        lambda: mora_jax.MoRAConfig(cycle=(mora_jax.Sharing(), unknown)),
    ):
        with pytest.raises(ValueError, match="Own is not registered, so a plan with it could not"):
            config()


def test_lists_of_json_come_back_as_tuples(monkeypatch):
    monkeypatch.setattr(registry, "SCHEMES", dict(registry.SCHEMES))
    cls = mora_jax.register_scheme(own(offsets=((0, 1), (2,)), __annotations__={"offsets": tuple}))
    scheme = cls(offsets=((3, 1), ()))
    found = mora_jax.scheme_from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert found == scheme
    assert hash(found) == hash(scheme)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 6, 7, 12, 19])
def test_the_first_walsh_functions_are_independent_on_any_number_of_blocks(blocks):
    rows = [
        mora_jax.compress(jnp.eye(blocks), 1, mora_jax.Sharing(signs=signs))[:, 0]
        for signs in range(blocks)
    ]
    assert np.linalg.matrix_rank(np.stack(rows)) == blocks
