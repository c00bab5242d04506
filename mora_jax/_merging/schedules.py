"""When ReMoRA merges, and the jagged learning rate that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def merge_steps(
    decay_steps: int, every: int, *, growth: float = 1.0, after: int = 0
) -> tuple[int, ...]:
    """After how many steps of a training ReMoRA merges: at fixed or growing intervals.

    Intervals are `every`, `every * growth`, `every * growth ** 2`, ..., each rounded to whole
    steps; the first begins after `after` steps. Growth above 1 merges often while the loss falls
    fast, below 1 seldom.

        steps = merge_steps(10_000, 500, growth=1.5, after=1_000)
        rate = jagged_cosine_schedule(5e-4, 10_000, steps, warmup_steps=1_000)
        ...
        if step in steps:  # steps that were taken, 1 after the first
            params, opt_state, plan, report = merge_and_reset(params, opt_state, plan)

    Args:
      decay_steps: the length of the training; all merges are before its last step, for after it
        nothing would be trained.
      every: the first interval, in steps.
      growth: each interval over the one before it.
      after: steps of a warm-up, in which there are no merges.

    Returns:
      Step counts, in order; perhaps none.

    Raises:
      ValueError: where an argument is out of range.

    >>> merge_steps(1000, 200)
    (200, 400, 600, 800)
    >>> merge_steps(1000, 100, growth=1.5, after=50)
    (150, 300, 525, 863)
    """
    if every < 1 or after < 0 or growth <= 0:
        raise ValueError(
            "wanted every >= 1, after >= 0 and growth > 0, got "
            f"every={every}, after={after}, growth={growth}."
        )
    found: list[int] = []
    step, interval = after + every, float(every)
    while step < decay_steps:
        found.append(step)
        interval *= growth
        # Half up, not to even; and never twice at one step, however far intervals shrink.
        step += max(int(interval + 0.5), 1)
    return tuple(found)


def jagged_cosine_schedule(
    peak_value: float,
    decay_steps: int,
    merge_every: int | Sequence[int],
    *,
    warmup_steps: int = 0,
    rewarm_steps: int = 50,
    end_value: float = 0.0,
) -> optax.Schedule:
    """Cosine decay that drops at each merge and climbs back within `rewarm_steps`.

    ReMoRA (appendix B of arXiv 2405.12130) merges every `merge_every` steps and restarts Adam with
    empty moments; the climb keeps its first, badly estimated steps small. The envelope is
    `optax.warmup_cosine_decay_schedule`; k steps after a merge, it is multiplied by
    `min((k + 1) / rewarm_steps, 1)`.

    Args:
      peak_value: learning rate at the end of the first warm-up.
      decay_steps: length of the whole schedule in steps, the first warm-up included.
      merge_every: steps between merges; or after how many steps each merge is, see `merge_steps`.
      warmup_steps: length of the first warm-up, in steps.
      rewarm_steps: length of the climb after each merge, in steps; 50 in the paper.
      end_value: learning rate at `decay_steps`.

    Returns:
      An optax schedule: step (int scalar) -> learning rate (float scalar).

    Raises:
      ValueError: where a length is out of range, or merges are not in order.

    >>> rate = jagged_cosine_schedule(1.0, 1000, 200, warmup_steps=10, rewarm_steps=50)
    >>> [round(float(rate(step)), 2) for step in (0, 10, 199, 200, 224, 249)]
    [0.0, 1.0, 0.91, 0.02, 0.44, 0.86]
    """
    if rewarm_steps < 1:
        raise ValueError(f"rewarm_steps must be at least 1, got {rewarm_steps}.")
    if not 0 <= warmup_steps < decay_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, decay_steps), got {warmup_steps} of {decay_steps}."
        )
    start = 0.0 if warmup_steps else peak_value
    envelope = optax.warmup_cosine_decay_schedule(
        start, peak_value, warmup_steps, decay_steps, end_value
    )
    since = _steps_since_merge(merge_every, rewarm_steps)
    return lambda step: envelope(step) * jnp.minimum((since(step) + 1) / rewarm_steps, 1.0)


def _steps_since_merge(merges: int | Sequence[int], never: int) -> Callable[[Any], jax.Array]:
    """Step -> steps since the last merge, and no fewer than `never` before the first."""
    if isinstance(merges, int):
        if merges < 1:
            raise ValueError(f"merge_every must be at least 1, got {merges}.")
        return lambda step: jnp.where(step < merges, never, step % merges)
    # As if there had been a merge so long ago that nothing of its climb is left.
    steps = np.asarray([-never, *merges], np.int32)
    if any(np.diff(steps) < 1) or any(steps[1:] < 1):
        raise ValueError(f"merges must be at steps from 1 on, in order, got {tuple(merges)}.")
    return lambda step: step - jnp.asarray(steps)[jnp.searchsorted(steps, step, side="right") - 1]
