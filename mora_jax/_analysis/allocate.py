"""Where to adapt: what each layer's adapter would gain, and a budget spent where it gains most."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mora_jax._analysis.budget import check_budget, offers_of, spend
from mora_jax._arrays.boxes import unbox
from mora_jax._arrays.paths import flatten, is_adapter, list_paths, unflatten_like
from mora_jax._arrays.places import on_host
from mora_jax._params.checks import check_adapted
from mora_jax._params.split import Params, join
from mora_jax._plans.config import MoRAConfig
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._plans.table import table

#: (params with adapters, batch) -> scalar.
Loss = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerScore:
    """What one layer's adapter would gain, and what it got.

    Attributes:
      gains: [B...] float64, by element of the stack; a scalar array where there is none. Where all
        that is seen is noise it can be negative.
      signal: the share of the gradient's energy that is common to all batches; 1 with one batch.
      parameters: trained numbers at the rank that was scored, of the whole stack.
      rank: what the budget gives it; 0 where it is left alone.
      spent: trained numbers at that rank.
    """

    gains: np.ndarray
    signal: float
    parameters: int
    rank: int = 0
    spent: int = 0

    @property
    def gain(self) -> float:
        """That of the whole stack, at the rank that was scored."""
        return max(float(self.gains.sum()), 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """Which layers get which ranks, and why; prints as a table, the most useful layer first.

    Attributes:
      config: to `adapt` the base model with: layers and ranks by their exact paths.
      scores: path -> what was found.
      budget: trained numbers that there were to spend on adapters.
    """

    config: MoRAConfig
    scores: Mapping[str, LayerScore]
    budget: int

    @property
    def spent(self) -> int:
        """Trained numbers in all adapters."""
        return sum(score.spent for score in self.scores.values())

    def __str__(self) -> str:
        """A row for each layer or stack of layers.

        gain: the share of all; density: over the share of the parameters that were scored.
        """
        total = sum(score.gain for score in self.scores.values())
        uniform = sum(score.parameters for score in self.scores.values())
        rows = [("layer", "gain", "density", "signal", "rank", "trained")]
        for path, score in sorted(
            self.scores.items(), key=lambda item: -item[1].gain / item[1].parameters
        ):
            share = score.gain / total
            rows.append(
                (
                    path or "(root)",
                    f"{share:.2%}",
                    f"{share * uniform / score.parameters:.2f}",
                    f"{score.signal:.2f}",
                    f"{score.rank or '-'}",
                    f"{score.spent:,}",
                )
            )
        adapted = sum(score.rank > 0 for score in self.scores.values())
        summary = (
            f"{adapted:,} of {len(self.scores):,} kernels adapted; {self.spent:,} trained "
            f"parameters of {self.budget:,}"
        )
        return "\n".join([*table(rows), summary])


def allocate(
    params: Params,
    plan: Plan,
    loss: Loss,
    batches: Iterable[Any],
    budget: int | float,
    *,
    ranks: Sequence[int] | None = None,
) -> Allocation:
    """Spends a budget of trained parameters on the layers where adapters would gain most.

    A layer's gain is how much the first step of Adam would lower the loss, to first order and for
    a learning rate of 1. Adam moves an entry of M by `mean(g) / sqrt(mean(g^2))` of its gradients
    g over the batches, so that is the sum over the entries of

        mean(g)^2 / sqrt(mean(g^2)),    mean(g)^2 as the mean of all products g_i g_j, i != j,

    the norm |g|_1 of a gradient without noise, and zero on average for one of noise alone (from
    two batches on; a single one cannot tell them apart).

    A layer gets the share of the budget that it has of all gains, and no layer with a gain is left
    out while the budget buys it the smallest rank. `budget.spend` says why not more, nor less.
    Gains are those of the first step. What they are worth at the last one is to be measured against
    a smaller rank everywhere (`examples/analysis/allocate.py`): with one, SmolLM2 learned GSM8K as
    well, and UUIDs better at all rates but the highest.

    A batch costs a backward pass of adapters, less than a training step. No gradient of a kernel is
    formed.

    Args:
      params: parameters with adapters, in every layer that may have one; new ones (`attach`), or
        trained ones, which then count from where they are.
      plan: the plan: uniform targeting, whose schemes and other settings the result keeps.
      loss: `(params, batch) -> scalar`, any function of the adapted parameters such as
        `lambda params, batch: loss_fn(model.apply({"params": params}, batch), batch)`; of an
        `nnx.State` where params is one. It is compiled.
      batches: of one structure and shape, as in training; two tell signal from noise, more are
        better at it.
      budget: trained numbers in adapters; or a fraction of those that the plan has, a float.
      ranks: those that a layer can have, by default the multiples of an eighth of the plan's
        largest, up to four times it. `[r]` means that a layer gets rank r or nothing. A rank whose
        matrix is larger than its layer is not given. The layers of a stack share one.

    Returns:
      The allocation. `mora_jax.adapt(base_model, allocation.config)` goes on from there. The config
      has no `kernels`: where the plan's had, `dataclasses.replace` puts them back.

    Raises:
      ValueError: where the plan does not fit the parameters, there are no batches, gradients are
        not finite or all zero, or the budget does not buy a single adapter.

    >>> def forward(params, x):
    ...     return (x @ params["useful"]["kernel"]).sum() + 0 * (x @ params["idle"]["kernel"]).sum()
    >>> base = {"useful": {"kernel": jnp.ones((8, 8))}, "idle": {"kernel": jnp.ones((8, 8))}}
    >>> import mora_jax
    >>> x = jnp.ones((2, 8))
    >>> model = mora_jax.adapt(forward, mora_jax.MoRAConfig(rank=1, scheme="sharing"))
    >>> plan = mora_jax.plan(model, base, x)
    >>> found = mora_jax.allocate(mora_jax.attach(plan, base), plan, model, [x], budget=0.5)
    >>> print(found)
    layer   gain     density  signal  rank  trained
    -----------------------------------------------
    useful  100.00%  2.00     1.00    1     16
    idle    0.00%    0.00     1.00    -     0
    1 of 2 kernels adapted; 16 trained parameters of 16
    >>> found.config.targets, found.config.ranks
    ('useful', (('useful', 1),))
    """
    leaves = flatten(params)
    check_adapted(plan, leaves)
    uniform = sum(spec.parameters for spec in plan.values())
    allowed = check_budget(budget, uniform)
    if ranks is None:
        largest = max(spec.config.rank for spec in plan.values())
        ranks = range(max(1, largest // 8), 4 * largest + 1, max(1, largest // 8))
    scores = _scores(plan, *_moments(loss, params, batches))
    offers = {path: offers_of(spec, sorted(set(ranks))) for path, spec in plan.items()}
    bought = spend({path: score.gain for path, score in scores.items()}, offers, allowed)
    scores = {
        path: dataclasses.replace(score, rank=bought[path][0], spent=bought[path][1])
        for path, score in scores.items()
    }
    kept = {path: score.rank for path, score in scores.items() if score.rank}
    return Allocation(_config(plan, kept), scores, allowed)


#: Path of an adapter's leaf -> (sum of its gradients, sum of their squares).
_Moments = dict[str, tuple[jax.Array, jax.Array]]


def _moments(loss: Loss, params: Params, batches: Iterable[Any]) -> tuple[_Moments, int]:
    """(moments of the gradients over the batches, number of batches)."""
    leaves = flatten(params)
    adapters = unflatten_like(
        {path: leaf for path, leaf in leaves.items() if is_adapter(path)}, params
    )
    base = unflatten_like(
        {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}, params
    )
    moments, count = None, 0
    for batch in batches:
        found = gradient_moments(loss, adapters, base, batch)
        moments, count = found if moments is None else _add(moments, found), count + 1
    if moments is None:
        raise ValueError("batches is empty; two batches tell a gradient from its noise.")
    finite = {path: jnp.isfinite(squares).all() for path, (_, squares) in moments.items()}
    if bad := [path for path, good in jax.device_get(finite).items() if not good]:
        raise ValueError(f"not allocated: the gradients of {list_paths(bad)} are not finite.")
    return moments, count


@functools.partial(jax.jit, static_argnums=0)
def gradient_moments(loss: Loss, adapters: Params, base: Params, batch: Any) -> _Moments:
    """Those of one batch; added up elsewhere, or the second batch would compile this once more."""
    gradients = jax.grad(lambda adapters: loss(join(adapters, base), batch))(adapters)
    found = {}
    for path, leaf in flatten(gradients).items():
        gradient = unbox(leaf).astype(jnp.float32)
        found[path] = gradient, gradient**2
    return found


@functools.partial(jax.jit, donate_argnums=0)
def _add(moments: _Moments, others: _Moments) -> _Moments:
    return jax.tree.map(jnp.add, moments, others)


def _scores(plan: Plan, moments: _Moments, count: int) -> dict[str, LayerScore]:
    scores = {}
    for path, spec in plan.items():
        own = {name: moments[leaf] for name, leaf in plan.leaf_paths(path).items()}
        gains, signal, energy = map(on_host, _score(own, spec, count))
        gains = gains.astype(np.float64)
        signal = float(np.clip(signal.sum() / energy.sum(), 0, 1)) if energy.any() else 1.0
        scores[path] = LayerScore(gains, signal, spec.parameters)
    if not any(score.gain for score in scores.values()):
        raise ValueError(
            "not allocated: no adapter has a gradient that the batches agree on. Does the loss "
            "use the adapted model, and the parameters that it is given?"
        )
    return scores


@functools.partial(jax.jit, static_argnames=("spec", "count"))
def _score(moments: Mapping[str, Any], spec: AdapterSpec, count: int) -> tuple[jax.Array, ...]:
    """(gain, squared signal, squared gradient), each by element of the stack."""
    total: Any = (0, 0, 0)
    for name, (sums, squares) in moments.items():
        sums, squares = (spec.batch_first({name: leaf})[name] for leaf in (sums, squares))
        energy = squares / count
        signal = energy if count == 1 else (sums**2 - squares) / (count * (count - 1))
        gain = signal / jnp.sqrt(jnp.where(energy > 0, energy, 1))
        parts = (part.sum((-2, -1)) for part in (gain, signal, energy))
        total = tuple(map(jnp.add, total, parts))
    return total


def _config(plan: Plan, ranks: Mapping[str, int]) -> MoRAConfig:
    """The plan's settings for these layers alone, each by its exact path."""
    specs = {path: plan[path] for path in ranks}
    settings = next(iter(specs.values())).config
    scheme = Counter(spec.scheme for spec in specs.values()).most_common(1)[0][0]
    return MoRAConfig(
        rank=max(ranks.values()),
        scheme=scheme,
        targets="|".join(map(re.escape, ranks)),
        ranks={re.escape(path): rank for path, rank in ranks.items()},
        schemes={re.escape(p): spec.scheme for p, spec in specs.items() if spec.scheme != scheme},
        cycle=settings.cycle,
        also_train="|".join(re.escape(path) for path, _ in plan.also_train) or None,
        dropout=settings.dropout,
        placement=settings.placement,
        dtype=settings.dtype,
        keep_sums=settings.keep_sums,
        dora=settings.dora,
        size_multiple=settings.size_multiple,
    )
