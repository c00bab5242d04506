"""Trees of parameters as flat dicts of paths, and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_jax._arrays.paths import flatten, unflatten, unflatten_like

names = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(
    st.integers(), lambda child: st.dictionaries(names, child, min_size=1, max_size=3)
).filter(lambda tree: isinstance(tree, dict))


@given(trees)
def test_flatten_and_unflatten_are_inverse(tree):
    assert unflatten(flatten(tree)) == tree


def test_names_may_hold_slashes():
    tree = {"WeightNorm_0": {"a/kernel/scale": 1, "100%": 2, "%2F": 3}}
    assert list(flatten(tree)) == [
        "WeightNorm_0/a%2Fkernel%2Fscale", "WeightNorm_0/100%25", "WeightNorm_0/%252F",
    ]  # fmt: skip
    assert unflatten(flatten(tree)) == tree


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"": 1}, "the outermost dict of the parameters has an empty key"),
        ({"a": {"": {"kernel": 1}}}, "the dict at 'a' has an empty key"),
        ({"a": {1: 1, "1": 2}}, r"the dict at 'a' has keys that make one path, \[1, '1'\]"),
        ({"a": {0: {"x": 1}, "0": {"y": 2}}}, "keys that make one path"),
    ],
)
def test_trees_whose_paths_would_not_tell_their_leaves_apart(tree, said):
    with pytest.raises(ValueError, match=said):
        flatten(tree)


def test_empty_dicts_are_kept():
    params = {"a": {"kernel": 1, "none": {}}, "b": {}, 0: {"c": {"d": {}}}}
    leaves = flatten(params)
    assert leaves == {"a/kernel": 1}
    assert unflatten_like(leaves | {"a/more": 2}, params) == {
        "a": {"kernel": 1, "none": {}, "more": 2},
        "b": {},
        0: {"c": {"d": {}}},
    }
