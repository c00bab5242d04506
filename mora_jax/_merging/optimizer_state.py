"""Finds what an optax state holds about adapters, however its transformations are nested.

optax nests named tuples; those that keep moments hold trees shaped like the parameters:

    ScaleByAdamState(count, mu={"dense": {"mora": {"matrix": ...}}}, nu={...})

A leaf is an adapter's moment if it stands in such a tree at the adapter's own path. A `count`
beside the tree corrects the moments' bias and belongs to them. Any other count, of a schedule or of
injected hyperparameters, stands beside no such tree, and is left alone.

A restart gives these numbers the values of a fresh state. With the optimizer at hand, its `init`
says which. Without it they are known for states that always start at zero. Everything else is
rejected by name: some optimizers share a state class and start at different values (Adam and Yogi).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._arrays.boxes import rebox, unbox
from mora_jax._arrays.paths import (
    KeyPath,
    field_name,
    flatten,
    list_paths,
    out_of_box,
    parameter_path,
    unflatten_like,
)
from mora_jax._arrays.places import Places, constrain, places_of
from mora_jax._params.attach import new_adapters
from mora_jax._params.freeze import AMBIGUOUS_STARTS, OwnStart, is_of_freeze_base
from mora_jax._params.split import Params
from mora_jax._plans.plan import Plan

#: Fields of optax states that are shaped like the parameters.
_MOMENTS = {
    "mu", "nu", "nu_max", "m1", "m2", "trace", "ema", "e_g", "e_x", "v", "v_row", "v_col",
    "acc_grads",
}  # fmt: skip
#: Step counts of these moments.
_COUNTS = {"count", "count_m2"}
#: What may stay as it is: the clock of MultiSteps, the constants of Muon.
_KEPT = {"mini_step", "gradient_step", "ns_coeffs", "inner_opt_state", "skip_state"}
#: States of optax whose moments and counts start at zero, whatever the optimizer.
_START_AT_ZERO = {
    "EmaState", "FactoredState", "MultiStepsState", "MuonState", "ScaleByAdaDeltaState",
    "ScaleByAdemamixState", "ScaleByAmsgradState", "ScaleByBeliefState", "ScaleByLionState",
    "ScaleByNovogradState", "TraceState",
}  # fmt: skip
#: States that count the steps of a schedule, which goes on through a restart.
_CLOCKS = {
    "InjectHyperparamsState", "InjectStatefulHyperparamsState", "ScaleByScheduleState",
    "WeightDecaySchedule", "WrappedScheduleState",
}  # fmt: skip
#: State -> its field that is zero where no gradients are accumulated.
_ACCUMULATORS = {"MultiStepsState": "mini_step", "ApplyEvery": "count"}

#: Index into `jax.tree.leaves(opt_state)`, where the leaf stands, and the leaf.
_Entry = tuple[int, KeyPath, Any]


class AdapterState(NamedTuple):
    """Indices into `jax.tree.leaves(opt_state)`.

    Attributes:
      moments: of each of the adapters' moments, and the path of its adapter's leaf.
      counts: the step counts of these moments, and what else goes with them alone.
    """

    moments: dict[int, str]
    counts: tuple[int, ...]


def find_adapter_state(
    opt_state: Any, adapters: Iterable[str], *, starts_known: bool = False
) -> AdapterState:
    """The leaves of an optimizer state that belong to adapters alone.

    Args:
      opt_state: the state.
      adapters: paths of the adapters' leaves.
      starts_known: whether the optimizer's `init` will say where each leaf starts.

    Raises:
      ValueError: where a count is shared with other parameters; where the state holds arrays but
        none of an adapter; where gradients are accumulated, or may be, under a transformation;
        unless starts are known, where a leaf may start elsewhere than at zero.
    """
    adapters = set(adapters)
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    entries = [(index, keys, leaf) for index, (keys, leaf) in enumerate(leaves)]
    moments: dict[int, str] = {}
    trees: set[KeyPath] = set()
    for index, keys, _ in entries:
        path = parameter_path(keys)
        if path in adapters:
            moments[index] = path
            trees.add(out_of_box(keys)[: -path.count("/") - 1])
    if not moments and (arrays := [keys for _, keys, leaf in entries if np.ndim(leaf)]):
        raise ValueError(
            "the optimizer state holds arrays, but none at an adapter's path, so there is nothing "
            f"to restart: {list_paths(map(jax.tree_util.keystr, arrays))}. Was it made for these "
            "parameters?"
        )
    # A tree of moments is one field of the state that owns it.
    owners = {keys[:-1] for keys in trees}
    _check_nothing_accumulated(opt_state, owners)
    counts = []
    for index, keys, _ in entries:
        owner = _owner_of(keys, owners)
        if index in moments or owner is None:
            continue
        if _goes_with_moments(opt_state, keys, owner, trees, starts_known):
            _check_not_shared(keys, owner, trees, adapters, entries)
            counts.append(index)
    if not starts_known:
        _check_known(owners, trees, entries)
        _check_start_at_zero(opt_state, owners)
    return AdapterState(moments, tuple(counts))


def _owner_of(keys: KeyPath, owners: set[KeyPath]) -> KeyPath | None:
    """The innermost state that owns moments of adapters and in which a leaf stands."""
    above = (keys[:length] for length in reversed(range(len(keys))))
    return next((prefix for prefix in above if prefix in owners), None)


def _goes_with_moments(
    opt_state: Any, keys: KeyPath, owner: KeyPath, trees: set[KeyPath], starts_known: bool
) -> bool:
    """Whether a leaf that is no moment of an adapter restarts with the moments beside it."""
    tree = keys[: len(owner) + 1]
    if not starts_known:
        return keys[:-1] == owner and field_name(keys) in _COUNTS
    if field_name(tree) in _KEPT or tree in trees:
        return False
    # A clock within the owner's state, such as a schedule inside of an optimizer that it wraps.
    within = [*_above(opt_state, keys)][len(owner) :]
    return not any(type(state).__name__ in _CLOCKS for state in within)


def _above(opt_state: Any, keys: KeyPath) -> Iterator[Any]:
    """The nodes on the way from the state to a leaf of it, the leaf not among them."""
    node: Any = opt_state
    for key in keys:
        yield node
        if (name := getattr(key, "name", None)) is not None:
            node = getattr(node, name, None)
            continue
        try:
            node = node[getattr(key, "idx", getattr(key, "key", None))]
        except (LookupError, TypeError):
            return


def _at(opt_state: Any, keys: KeyPath) -> Any:
    """The node at a place in the state."""
    return [*_above(opt_state, (*keys, jax.tree_util.SequenceKey(0)))][-1]


def _check_nothing_accumulated(opt_state: Any, owners: set[KeyPath]) -> None:
    """Raises ValueError where gradients are accumulated, which a restart would lose."""
    for owner in owners:
        state = _at(opt_state, owner)
        if (field := _ACCUMULATORS.get(type(state).__name__)) is None:
            continue
        count, name = getattr(state, field), f"opt_state{jax.tree_util.keystr(owner)}.{field}"
        if isinstance(count, Tracer):
            raise ValueError(
                f"{name} is not known under a transformation such as jit, so merge_and_reset "
                "cannot tell whether gradients are accumulated, which it would lose. Call it "
                "outside of the transformation, when a step has just been taken."
            )
        if np.any(count):
            raise ValueError(
                f"{name} is {count}: merging in the middle of an accumulation would lose "
                "gradients. Merge when optax.MultiSteps (or apply_every) has just taken a step."
            )


def _check_known(owners: set[KeyPath], trees: set[KeyPath], entries: list[_Entry]) -> None:
    """Raises ValueError for a field beside adapters' moments whose restart is not known."""
    for _, keys, _ in entries:
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
                    f"merge_and_reset does not know how to restart the field {field!r}. {_REMEDY}"
                )


_REMEDY = (
    "Pass the optimizer that made opt_state: merge_and_reset(..., optimizer=optimizer). The "
    "adapters' state then restarts at the values of its init."
)


def _check_start_at_zero(opt_state: Any, owners: set[KeyPath]) -> None:
    """Raises ValueError for a state of moments that may start elsewhere than at zero."""
    for owner in sorted(owners, key=jax.tree_util.keystr):
        state = _at(opt_state, owner)
        name, place = type(state).__name__, jax.tree_util.keystr(owner)
        ours = type(state).__module__.startswith("optax")
        above = [*_above(opt_state, owner)]
        marked = any(isinstance(node, OwnStart) for node in above)
        known = any(map(is_of_freeze_base, above)) and not marked
        if ours and name in _START_AT_ZERO:
            continue
        if ours and name in AMBIGUOUS_STARTS and known:
            continue
        why = "does not start at zero" if marked else "may start elsewhere than at zero"
        raise ValueError(
            f"opt_state{place} is a {name}, which holds moments of adapters and {why}: Adam and "
            f"Yogi share one state, for example. {_REMEDY}"
        )


def _check_not_shared(
    count: KeyPath,
    owner: KeyPath,
    trees: set[KeyPath],
    adapters: set[str],
    entries: list[_Entry],
) -> None:
    own = [keys for keys in trees if keys[:-1] == owner]
    others = {
        parameter_path(keys)
        for _, keys, _ in entries
        if any(keys[: len(tree)] == tree for tree in own) and parameter_path(keys) not in adapters
    }
    if others:
        raise ValueError(
            f"opt_state{jax.tree_util.keystr(count)} counts the steps of adapters and of other "
            f"parameters together ({list_paths(others)}), so it cannot restart for the adapters "
            "alone. Give them states of their own: freeze_base(optimizer, plan), of NNX "
            "nnx.Optimizer(model, freeze_base(optimizer, mora_jax.plan(model)), wrt=...)."
        )


def restart_values(
    optimizer: Any,
    opt_state: Any,
    indices: Iterable[int],
    params: Params,
    plan: Plan,
    key: jax.Array | None,
) -> dict[int, jax.Array]:
    """Index -> what these leaves of a state are in a fresh one, beside new adapters.

    Args:
      optimizer: what made the state.
      opt_state: the state.
      indices: into `jax.tree.leaves(opt_state)`.
      params: the parameters with adapters.
      plan: the plan.
      key: of the new adapters.

    Raises:
      ValueError: where the optimizer's `init` makes another state than this.
    """
    entries = jax.tree_util.tree_leaves_with_path(opt_state)
    held = {jax.tree_util.keystr(keys): leaf for keys, leaf in entries}
    names = {index: jax.tree_util.keystr(entries[index][0]) for index in indices}
    like = _parameters_of(optimizer, held, params, plan)
    wanted = {name: held[name] for name in names.values()}
    found = _start(key, optimizer, plan, like, tuple(wanted), places_of(wanted))
    # Of the old dtype, for which the training step is compiled.
    return {i: found[name].astype(jnp.result_type(held[name])) for i, name in names.items()}


#: A tree's structure, and (path, shape, dtype) of its leaves.
_Like = tuple[Any, tuple[tuple[str, tuple[int, ...], str], ...]]


def _parameters_of(optimizer: Any, held: dict[str, Any], params: Params, plan: Plan) -> _Like:
    """Which tree of parameters the state was made for: all, what is trained, or the adapters."""
    leaves = flatten(params)
    shapes = {name: np.shape(leaf) for name, leaf in held.items()}
    for roles in ({"adapter", "also_train", "frozen"}, {"adapter", "also_train"}, {"adapter"}):
        abstract = {
            path: rebox(leaf, jax.ShapeDtypeStruct(unbox(leaf).shape, unbox(leaf).dtype))
            for path, leaf in leaves.items()
            if plan.role(path) in roles
        }
        tree = unflatten_like(abstract, params)
        try:
            state = jax.eval_shape(optimizer.init, tree)
        except Exception:
            continue  # an optimizer may reject a tree that it was not made for
        found = jax.tree_util.tree_leaves_with_path(state)
        if {jax.tree_util.keystr(keys): leaf.shape for keys, leaf in found} == shapes:
            flat = jax.tree_util.tree_leaves_with_path(tree)
            described = ((parameter_path(keys), x.shape, x.dtype.name) for keys, x in flat)
            return jax.tree.structure(tree), tuple(described)
    raise ValueError(
        "optimizer.init makes another state than opt_state, whether of all parameters, of the "
        f"trainable half or of the adapters; opt_state has {list_paths(held)}. Pass the optimizer "
        "that made opt_state, freeze_base around it included."
    )


@functools.partial(jax.jit, static_argnames=("optimizer", "plan", "like", "wanted", "places"))
def _start(
    key: jax.Array | None,
    optimizer: Any,
    plan: Plan,
    like: _Like,
    wanted: tuple[str, ...],
    places: Places,
) -> dict[str, jax.Array]:
    structure, leaves = like
    dtypes = {path: dtype for path, _, dtype in leaves}
    adapters = new_adapters(plan, key, dtypes)
    # What is made of other parameters is not asked for, and compiles to nothing.
    values = [
        adapters[path] if path in adapters else jnp.zeros(shape, dtype)
        for path, shape, dtype in leaves
    ]
    state = optimizer.init(structure.unflatten(values))
    found = {
        jax.tree_util.keystr(keys): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    return constrain({name: found[name] for name in wanted}, places)
