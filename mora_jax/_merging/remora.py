"""ReMoRA: merge the adapters, zero them, regroup, restart their optimizer, and go on.

Appendix B of arXiv 2405.12130; with `LowRank` the same call is ReLoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._arrays.boxes import rebox, unbox
from mora_jax._arrays.paths import flatten, rename_leaves, unflatten_like
from mora_jax._arrays.places import constrain, places_of
from mora_jax._arrays.rounding import Rounding, check_rounding
from mora_jax._merging.losses import MergeLoss, warn_of_losses
from mora_jax._merging.merge import (
    check_merge,
    check_sums_finite,
    merge_losses,
    merged_kernels,
)
from mora_jax._merging.optimizer_state import AdapterState, find_adapter_state, restart_values
from mora_jax._merging.prune import Prune, Reset, check_reset, pruned
from mora_jax._params.attach import new_adapters
from mora_jax._params.checks import check_results_finite
from mora_jax._params.split import Params
from mora_jax._plans.plan import Plan


class ResetReport(NamedTuple):
    """What `merge_and_reset` did.

    Attributes:
      layers: adapters merged and started anew.
      moments: arrays of optimizer state that start anew, or are pruned.
      counts: step counts of moments, and what else goes with them alone, that start anew.
      losses: what rounding did to each layer's update, see `merge_losses`.
    """

    layers: int
    moments: int
    counts: int
    losses: dict[str, MergeLoss]

    def __str__(self) -> str:
        """One line, of losses the worst alone."""
        text = f"ResetReport(layers={self.layers}, moments={self.moments}, counts={self.counts})"
        if not self.losses:
            return text
        path, loss = min(self.losses.items(), key=lambda item: item[1].kept)
        return f"{text}, of the update of {path or '(root)'!r} {loss.kept:.1%} kept"


class ResetResult(NamedTuple):
    """What `merge_and_reset` returns, in the order to unpack it."""

    params: dict[str, Any]
    opt_state: Any
    plan: Plan
    report: ResetReport


def merge_and_reset(
    params: Params,
    opt_state: Any,
    plan: Plan,
    *,
    key: jax.Array | None = None,
    donate: bool = False,
    rounding: Rounding = "nearest",
    reset: Reset = "zero",
    optimizer: Any = None,
) -> ResetResult:
    """One ReMoRA restart: the adapters go into the base, and training goes on from zero adapters.

    The output of the model does not change across the call. Every adapter is merged and set to
    zero (`LowRank` is drawn anew), in the dtype that it has; its optimizer moments and **their**
    step count start anew; the plan moves to the next scheme of each layer's cycle. Everything else
    stays as it is: the state of `also_train` parameters, learning-rate schedules, hyperparameters.

    It runs as one jitted call, compiled once per scheme of the cycle. Before it, calls of their own
    check that the adapters are finite and measure what rounding will lose (of kernels narrower than
    float32), so that nothing is given up for a merge that is refused.

        params, opt_state, plan, report = merge_and_reset(params, opt_state, plan)
        model = adapt(base_model, plan)

    Args:
      params: parameters with adapters, the whole tree.
      opt_state: state of an optax optimizer over the whole tree, or over the trainable part of
        `split`.
      plan: the plan.
      key: a PRNG key, required where a scheme draws numbers (`LowRank`), for "stochastic" and for a
        random `Prune`.
      donate: reuse the memory of what changes: the adapted kernels, the adapters, their optimizer
        state. These arrays **cannot be used afterwards**, and pretrained parameters that were
        attached share their kernels. Pass True where a second copy of the kernels does not fit.
      rounding: "nearest" or "stochastic", as for `merge`. What a merge into bfloat16 loses is lost
        to the training, for its adapters start anew.
      reset: "zero", or `Prune(0.99)` to keep the largest hundredth of each moment, as ReLoRA does.
        The step counts restart in both (ReLoRA's code lets them run on): nearly all moments are
        empty then, and with an old count Adam would take them for full ones; its first step would
        be three times too long. What is kept is in turn taken for more than it is: there Adam's
        t-th step is sqrt(1 - b2^t) / (1 - b1^t) times as long, 0.15 to 0.32 in the first hundred.
        Where the cycle changes the grouping, an entry of the matrix stands for other pairs of
        features than the moments that are kept of it.
      optimizer: the optax transformation that made `opt_state`. Its `init` then says where the
        adapters' state starts. Optional for `freeze_base` around the usual optimizers; required
        for a state that starts, or may start, elsewhere than at zero. A bare `optax.adam` is such:
        `optax.yogi` has the same state, and starts at 1e-6.

    Returns:
      (params, opt_state, plan, report).

    Raises:
      ValueError: where the plan does not fit the parameters; where an adapter is not finite, or a
        merged kernel would not be; where adapters and other parameters share one step count, so
        that it cannot be reset for the adapters alone; where the optimizer holds moments but none
        for the adapters, or of which it is not known where they start; where `optimizer` makes
        another state; in the middle of `optax.MultiSteps`' accumulation, and under a transformation
        with it; where a key is missing; where two of the arrays to donate are one.

    Warns:
      MergeWarning: as `merge`, and before anything is given up.

    >>> import flax.linen as nn, optax, mora_jax
    >>> model = mora_jax.adapt(nn.Dense(6), mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, jax.ShapeDtypeStruct((1, 3), "float32"))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    >>> opt_state = mora_jax.freeze_base(optax.adam(1e-3), plan).init(params)
    >>> merge_and_reset(params, opt_state, plan).report
    ResetReport(layers=1, moments=2, counts=1, losses={})
    """
    check_rounding(rounding, key)
    check_reset(reset, key)
    leaves = flatten(params)
    check_merge(plan, leaves)
    next_plan = plan.advance()
    adapters, starts_known = plan.adapter_leaves(), optimizer is not None
    found = find_adapter_state(opt_state, adapters, starts_known=starts_known)
    losses = merge_losses(params, plan, rounding=rounding, key=key)
    # Only what changes goes through the jitted call; the rest is handed on, untouched.
    changing = {path: unbox(leaves[path]) for path in (*plan.kernel_paths(), *adapters)}
    bits = None if rounding == "nearest" else key
    if donate:
        _check_distinct(changing)
        check_sums_finite(changing, plan, plan.keys() - losses.keys(), bits)
    if rounding == "nearest":
        warn_of_losses(losses, stacklevel=2)
    state, structure = jax.tree.flatten(opt_state)
    start = {}
    if optimizer is not None:
        indices = (*found.moments, *found.counts)
        start = restart_values(optimizer, opt_state, indices, params, plan, key)
    pruning = _pruning(reset, found, plan, state)
    changed, anew = _restarted(changing, state, start, found, key, plan, rounding, pruning, donate)
    if not donate:
        check_results_finite({path: changed[path] for path in plan.kernel_paths()}, changing)
    for index, leaf in (start | anew).items():
        state[index] = leaf
    kept = leaves | {path: rebox(leaves[path], value) for path, value in changed.items()}
    names = plan.renamed(next_plan)
    return ResetResult(
        rename_leaves(unflatten_like(kept, params), names),
        rename_leaves(structure.unflatten(state), names),
        next_plan,
        ResetReport(len(plan), len(found.moments), len(found.counts), losses),
    )


def _restarted(
    changing: dict[str, Any],
    state: list[Any],
    start: dict[int, jax.Array],
    found: AdapterState,
    key: jax.Array | None,
    plan: Plan,
    rounding: Rounding,
    pruning: tuple[_Pruned, ...],
    donate: bool,
) -> tuple[dict[str, jax.Array], dict[int, jax.Array]]:
    """New kernels and adapters by path, and by its index what of the state the call changes."""
    indices: Iterable[int] = (*found.moments, *found.counts)
    if start:
        # What starts as it says needs no old values; what is pruned does.
        indices = [int(moment.place) for moment in pruning]
    resetting = {str(index): state[index] for index in indices}
    begin = {str(index): start[index] for index in indices if index in start}
    places, plan = (places_of(changing), places_of(resetting)), plan.before_merges()
    restart = _restart_donating if donate else _restart
    changed, anew = restart(changing, resetting, key, plan, places, rounding, pruning, begin)
    return changed, {int(index): leaf for index, leaf in anew.items()}


def _check_distinct(leaves: dict[str, Any]) -> None:
    """Raises ValueError where two paths hold one array, which cannot be given up twice."""
    seen: dict[int, str] = {}
    for path, leaf in leaves.items():
        if (other := seen.setdefault(id(leaf), path)) != path:
            raise ValueError(
                f"{other!r} and {path!r} hold one and the same array, which cannot be donated "
                "twice. Pass donate=False; the two are separate from then on."
            )


class _Pruned(NamedTuple):
    """One moment to prune: its place in the state, and what `pruned` wants to know."""

    place: str
    prune: Prune
    path: str
    stacks: tuple[int, ...]


def _pruning(reset: Reset, found: AdapterState, plan: Plan, state: list) -> tuple[_Pruned, ...]:
    """The moments to prune; none where all are set to zero."""
    if not isinstance(reset, Prune):
        return ()
    shapes, owners = plan.adapter_leaves(), plan.adapter_owners()

    def stacks(index, path):
        alike = np.shape(state[index]) == shapes[path].shape
        return tuple(owners[path][1]) if alike else ()

    return tuple(
        _Pruned(str(index), reset, path, stacks(index, path))
        for index, path in found.moments.items()
    )


def _merge_and_start_anew(
    leaves, state, key, plan, places, rounding="nearest", pruning=(), start=None
):
    adapters = new_adapters(plan, key, {path: leaves[path].dtype for path in plan.adapter_leaves()})
    kernels = merged_kernels(leaves, plan, None if rounding == "nearest" else key)
    start = start or {}
    anew = jax.tree.map(jnp.zeros_like, state)
    for place, prune, path, stacks in pruning:
        anew[place] = pruned(state[place], prune, path, stacks, key, start.get(place))
    return constrain(kernels | adapters, places[0]), constrain(anew, places[1])


_STATIC = ("plan", "places", "rounding", "pruning")
_restart = functools.partial(jax.jit, static_argnames=_STATIC)(_merge_and_start_anew)
_restart_donating = functools.partial(jax.jit, static_argnames=_STATIC, donate_argnums=(0, 1))(
    _merge_and_start_anew
)
