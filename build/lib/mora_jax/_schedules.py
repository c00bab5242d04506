"""Jagged learning-rate schedules: a restart with a warm-up of its own at every merge."""

from __future__ import annotations

import jax.numpy as jnp
import optax


def jagged_cosine_schedule(
    peak_value: float,
    decay_steps: int,
    merge_every: int,
    *,
    warmup_steps: int = 0,
    rewarm_steps: int = 50,
    end_value: float = 0.0,
) -> optax.Schedule:
    """Cosine decay that drops at each merge and climbs back within `rewarm_steps`.

    ReMoRA (appendix B of arXiv 2405.12130) merges every `merge_every` steps and restarts Adam with
    empty moments; the climb keeps its first, badly estimated steps small. The envelope is
    `optax.warmup_cosine_decay_schedule`; at step t >= merge_every it is multiplied by
    `min((t mod merge_every + 1) / rewarm_steps, 1)`.

    Args:
      peak_value: learning rate at the end of the first warm-up.
      decay_steps: length of the whole schedule in steps, the first warm-up included.
      merge_every: steps between merges.
      warmup_steps: length of the first warm-up, in steps.
      rewarm_steps: length of the climb after each merge, in steps; 50 in the paper.
      end_value: learning rate at `decay_steps`.

    Returns:
      An optax schedule: step (int scalar) -> learning rate (float scalar).

    Raises:
      ValueError: where a length is out of range.

    >>> rate = jagged_cosine_schedule(1.0, 1000, 200, warmup_steps=10, rewarm_steps=50)
    >>> [round(float(rate(step)), 2) for step in (0, 10, 199, 200, 224, 249)]
    [0.0, 1.0, 0.91, 0.02, 0.44, 0.86]
    """
    if merge_every < 1 or rewarm_steps < 1:
        raise ValueError(
            f"merge_every and rewarm_steps must be at least 1, got {merge_every}, {rewarm_steps}."
        )
    if not 0 <= warmup_steps < decay_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, decay_steps), got {warmup_steps} of {decay_steps}."
        )
    start = 0.0 if warmup_steps else peak_value
    envelope = optax.warmup_cosine_decay_schedule(
        start, peak_value, warmup_steps, decay_steps, end_value
    )

    def schedule(step):
        climb = jnp.minimum((step % merge_every + 1) / rewarm_steps, 1.0)
        return envelope(step) * jnp.where(step < merge_every, 1.0, climb)

    return schedule
