"""Which parameters are trained: split them off, join them again, mark them.

Pure functions over nested dicts, or over an `nnx.State`. With a plan that adapts `dense`:

    params      {"dense": {"kernel": W, "mora": {"matrix_sharing": M}}, "norm": {"scale": s}}
    split(...)  {"dense": {"mora": {"matrix_sharing": M}}},
                {"dense": {"kernel": W}, "norm": {"scale": s}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mora_jax._arrays.paths import flatten, list_paths, unflatten_like
from mora_jax._params.checks import check_adapted
from mora_jax._plans.plan import Plan

Params = Mapping[str, Any]


def split(params: Params, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts parameters into those that are trained and those that are frozen.

    Differentiate by the first alone, and no gradient of the base ever exists.

    Args:
      params: parameters with adapters.
      plan: the plan.

    Returns:
      (trainable, frozen): two trees that share no leaf; `join` puts them together again. The first
      holds the adapters and the parameters of `also_train`.

    Raises:
      ValueError: where the plan does not fit the parameters.
    """
    leaves = flatten(params)
    check_adapted(plan, leaves)
    trainable = {path: leaf for path, leaf in leaves.items() if plan.role(path) != "frozen"}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trainable}
    return unflatten_like(trainable, params), unflatten_like(frozen, params)


def join(first: Params, second: Params) -> dict[str, Any]:
    """One tree from two that share no leaf: the inverse of `split`.

    Raises:
      ValueError: where a leaf stands in both.

    >>> join({"dense": {"kernel": 1}}, {"dense": {"mora": {"matrix_sharing": 0}}})
    {'dense': {'kernel': 1, 'mora': {'matrix_sharing': 0}}}
    """
    ours, theirs = flatten(first), flatten(second)
    if both := ours.keys() & theirs.keys():
        raise ValueError(f"the trees share leaves: {list_paths(both)}.")
    return unflatten_like(ours | theirs, first, second)


def trainable_mask(params: Params, plan: Plan) -> dict[str, Any]:
    """True for every leaf that is trained, False for every frozen one: a mask for optax.

    `optax.masked(tx, mask)` alone passes on the raw gradient of what the mask leaves out, so the
    other half belongs to it (`freeze_base` does both):

        optax.chain(
            optax.masked(tx, mask),
            optax.masked(optax.set_to_zero(), jax.tree.map(operator.not_, mask)),
        )

    Raises:
      ValueError: where the plan does not fit the parameters.
    """
    leaves = flatten(params)
    check_adapted(plan, leaves)
    return unflatten_like({path: plan.role(path) != "frozen" for path in leaves}, params)
