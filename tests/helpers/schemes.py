"""The schemes that tests run over, and how the slow reference describes each."""

from typing import Any, NamedTuple

import numpy as np

import mora_jax
from custom_scheme import RandomGroups


class Row(NamedTuple):
    """A scheme of the battery.

    Attributes:
      scheme: the scheme.
      described: the same as `helpers.reference` describes it.
      family: whether it stands for its family in tests that compile a whole model.
    """

    scheme: mora_jax.Scheme
    described: tuple[Any, ...]
    family: bool = False


#: A scheme of the examples, which the library knows by two maps alone.
CUSTOM = RandomGroups(draw=3)


def random_inputs(features, size):
    """(feature, group) of CUSTOM's inputs: stride groups over features in a random order."""
    order = np.random.default_rng((3, 0, features)).permutation(features)
    padded = size * -(-features // size)
    return [(order[place % features], place % size) for place in range(padded)]


def random_outputs(features, size):
    """(feature, group) of CUSTOM's outputs."""
    order = np.random.default_rng((3, 1, features)).permutation(features)
    return [(feature, place % size) for feature, place in enumerate(order)]


ROWS = [
    Row(mora_jax.Sharing(), ("sharing", "stride", "stride", 0, 0)),
    Row(
        mora_jax.Sharing("contiguous", "contiguous"),
        ("sharing", "contiguous", "contiguous", 0, 0),
    ),
    Row(
        mora_jax.Sharing("contiguous", "stride"),
        ("sharing", "contiguous", "stride", 0, 0),
        family=True,
    ),
    Row(mora_jax.Sharing("stride", "contiguous"), ("sharing", "stride", "contiguous", 0, 0)),
    Row(mora_jax.Sharing(shift=3), ("sharing", "stride", "stride", 3, 0)),
    Row(mora_jax.Sharing(signs=3), ("sharing", "stride", "stride", 0, 3)),
    Row(mora_jax.Sharing(shift=1, signs=2), ("sharing", "stride", "stride", 1, 2), family=True),
    Row(mora_jax.Rotation(), ("rotation", False)),
    Row(mora_jax.Rotation(wrap=True), ("rotation", True), family=True),
    Row(mora_jax.Decoupling(), ("decoupling", False)),
    Row(mora_jax.Decoupling(wrap=True), ("decoupling", True)),
    Row(mora_jax.Truncation(), ("truncation",), family=True),
    Row(CUSTOM, ("groups", random_inputs, random_outputs), family=True),
    Row(mora_jax.LowRank(alpha=3.0), ("low_rank", 3.0), family=True),
]

ALL_SCHEMES = [row.scheme for row in ROWS]
#: Those with one square matrix.
SCHEMES = [row.scheme for row in ROWS if row.described[0] != "low_rank"]
#: One scheme of each family, for tests that compile a whole model.
FAMILIES = [row.scheme for row in ROWS if row.family]
#: Scheme -> how the reference describes it.
DESCRIBED = {row.scheme: row.described for row in ROWS}
