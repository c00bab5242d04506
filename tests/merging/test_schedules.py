"""Learning rates that start anew with every merge, and when to merge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mora_jax


def test_the_jagged_schedule():
    schedule = mora_jax.jagged_cosine_schedule(
        2.0, 100, 40, warmup_steps=10, rewarm_steps=4, end_value=0.2
    )
    envelope = optax.warmup_cosine_decay_schedule(0.0, 2.0, 10, 100, 0.2)
    rates = jax.vmap(schedule)(jnp.arange(100))
    factors = np.ones(100)
    for merge in (40, 80):
        factors[merge : merge + 4] = [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(rates, [envelope(i) * factors[i] for i in range(100)], rtol=1e-5)
    assert mora_jax.jagged_cosine_schedule(2.0, 100, 40)(0) == 2.0
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mora_jax.jagged_cosine_schedule(2.0, 100, 0)
    with pytest.raises(ValueError, match=r"\[0, decay_steps\), got 100 of 100"):
        mora_jax.jagged_cosine_schedule(2.0, 100, 10, warmup_steps=100)


@pytest.mark.parametrize("every", [1, 7, 40, 100, 150])
def test_merges_at_fixed_steps_are_merges_every_so_often(every):
    options = {"warmup_steps": 5, "rewarm_steps": 4}
    steps = mora_jax.merge_steps(100, every)
    fixed, listed = (
        jax.vmap(mora_jax.jagged_cosine_schedule(2.0, 100, merges, **options))(jnp.arange(100))
        for merges in (every, steps)
    )
    np.testing.assert_array_equal(fixed, listed)
    # A loop that counts the steps it has taken merges at the same ones.
    assert steps == tuple(step for step in range(1, 100) if step % every == 0)


def test_growing_intervals():
    steps = mora_jax.merge_steps(200, 10, growth=2.0, after=15)
    assert steps == (25, 45, 85, 165)
    schedule = mora_jax.jagged_cosine_schedule(2.0, 200, steps, warmup_steps=15, rewarm_steps=50)
    smooth = optax.warmup_cosine_decay_schedule(0.0, 2.0, 15, 200, 0.0)
    # The climb of one merge ends where the next one begins, at step 45 after 20 of its 50 steps.
    for step, factor in [(24, 1), (25, 0.02), (44, 0.4), (45, 0.02), (134, 1), (165, 0.02)]:
        np.testing.assert_allclose(schedule(step), factor * smooth(step), rtol=1e-6)
    assert mora_jax.merge_steps(40, 4, growth=0.5) == (4, 6, 7, *range(8, 40))
    with pytest.raises(ValueError, match=r"growth > 0, got every=4, after=0, growth=-1"):
        mora_jax.merge_steps(100, 4, growth=-1)
    for wrong in ((5, 5), (0, 5), (9, 5)):
        with pytest.raises(ValueError, match=r"from 1 on, in order, got \("):
            mora_jax.jagged_cosine_schedule(2.0, 100, wrong)
