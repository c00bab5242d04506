"""Finds what an optax state holds about adapters, however its transformations are nested.

optax nests named tuples; those that keep moments hold trees shaped like the parameters:

    ScaleByAdamState(count, mu={"dense": {"mora": {"matrix": ...}}}, nu={...})

A leaf is an adapter's moment if it stands in such a tree at the adapter's own path. A `count`
beside the tree corrects the moments' bias and belongs to them. Any other count, of a schedule or of
injected hyperparameters, stands beside no such tree, and is left alone.

A restart writes zeros, which is where these fields start, or prunes them. What else stands beside
an adapter's moments is refused by name: zero may be no start for it (the step sizes of Rprop), or
it may be a number that goes with the moments (the estimates of Prodigy).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from mora_jax._arrays.paths import KeyPath, field_name, list_paths, out_of_box, parameter_path

#: Fields of optax states that are shaped like the parameters and start at zero.
_MOMENTS = {
    "mu", "nu", "nu_max", "m1", "m2", "trace", "ema", "e_g", "e_x", "v", "v_row", "v_col",
    "acc_grads",
}  # fmt: skip
#: Step counts of these moments, which start at zero.
_COUNTS = {"count", "count_m2"}
#: What may stay as it is: the clock of MultiSteps, the constants of Muon.
_KEPT = {"mini_step", "gradient_step", "ns_coeffs", "inner_opt_state", "skip_state"}


class AdapterState(NamedTuple):
    """Indices into `jax.tree.leaves(opt_state)`.

    Attributes:
      moments: of each of the adapters' moments, and the path of its adapter's leaf.
      counts: the step counts of these moments.
    """

    moments: dict[int, str]
    counts: tuple[int, ...]


def find_adapter_state(opt_state: Any, adapters: Iterable[str]) -> AdapterState:
    """The leaves of an optimizer state that belong to adapters alone.

    Args:
      opt_state: the state.
      adapters: paths of the adapters' leaves.

    Raises:
      ValueError: where a count is shared with other parameters; where the state holds arrays but
        none of an adapter; where a field beside adapters' moments is not known; where
        `optax.MultiSteps` has gradients accumulated.
    """
    adapters = set(adapters)
    entries = list(enumerate(jax.tree_util.tree_leaves_with_path(opt_state)))
    moments: dict[int, str] = {}
    trees: set[KeyPath] = set()
    for index, (keys, _) in entries:
        path = parameter_path(keys)
        if path in adapters:
            moments[index] = path
            trees.add(out_of_box(keys)[: -path.count("/") - 1])
    if not moments and (arrays := [keys for _, (keys, leaf) in entries if np.ndim(leaf)]):
        raise ValueError(
            "the optimizer state holds arrays, but none at an adapter's path, so there is nothing "
            f"to restart: {list_paths(map(jax.tree_util.keystr, arrays))}. Was it made for these "
            "parameters?"
        )
    # A tree of moments is one field of the state that owns it.
    owners = {keys[:-1] for keys in trees}
    counts = []
    for index, (keys, leaf) in entries:
        if keys[:-1] not in owners:
            continue
        if field_name(keys) == "mini_step" and not isinstance(leaf, Tracer) and leaf.any():
            raise ValueError(
                f"{jax.tree_util.keystr(keys)} is {leaf}: merging in the middle of an accumulation "
                "would lose gradients. Merge when optax.MultiSteps has just taken a step."
            )
        if field_name(keys) in _COUNTS:
            _check_not_shared(keys, trees, adapters, entries)
            counts.append(index)
    _check_known(owners, trees, entries)
    return AdapterState(moments, tuple(counts))


def _check_known(owners: set[KeyPath], trees: set[KeyPath], entries) -> None:
    """Raises ValueError for a field beside adapters' moments whose restart is not known."""
    for _, (keys, _) in entries:
        for owner in owners:
            if keys[: len(owner)] != owner or len(keys) == len(owner):
                continue
            tree = keys[: len(owner) + 1]
            field = field_name(tree)
            # Moments in another form than the parameters' (SM3's, an array for each axis) are
            # found at no adapter's path, and are as unknown as a field of another name.
            if field not in _COUNTS | _KEPT and (field not in _MOMENTS or tree not in trees):
                raise ValueError(
                    f"opt_state{jax.tree_util.keystr(keys)} goes with the adapters' moments, and "
                    f"merge_and_reset does not know how to restart the field {field!r}. It knows "
                    f"{', '.join(sorted(_MOMENTS | _COUNTS))}. Reset that optimizer by its own "
                    "`init` after `merge`, or take another."
                )


def _check_not_shared(count: KeyPath, trees, adapters, entries) -> None:
    own = [keys for keys in trees if keys[:-1] == count[:-1]]
    others = {
        parameter_path(keys)
        for _, (keys, _) in entries
        if any(keys[: len(tree)] == tree for tree in own) and parameter_path(keys) not in adapters
    }
    if others:
        raise ValueError(
            f"opt_state{jax.tree_util.keystr(count)} counts the steps of adapters and of other "
            f"parameters together ({list_paths(others)}), so it cannot restart for the adapters "
            "alone. Give them states of their own: freeze_base(optimizer, plan)."
        )
