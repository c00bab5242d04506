"""Trees of parameters as flat dicts of paths, and back."""

from hypothesis import given
from hypothesis import strategies as st

from mora_jax._arrays.paths import flatten, unflatten

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
