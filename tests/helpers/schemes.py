"""The schemes that tests run over."""

import mora_jax

SCHEMES = [
    mora_jax.Sharing(),
    mora_jax.Sharing("contiguous", "contiguous"),
    mora_jax.Sharing("contiguous", "stride"),
    mora_jax.Sharing("stride", "contiguous"),
    mora_jax.Sharing(shift=3),
    mora_jax.Sharing(signs=3),
    mora_jax.Sharing(shift=1, signs=2),
    mora_jax.Rotation(),
    mora_jax.Rotation(wrap=True),
    mora_jax.Decoupling(),
    mora_jax.Decoupling(wrap=True),
    mora_jax.Truncation(),
]
ALL_SCHEMES = [*SCHEMES, mora_jax.LowRank(alpha=3.0)]

#: One scheme of each family, for tests that compile a whole model.
FAMILIES = [
    mora_jax.Sharing("contiguous", "stride"),
    mora_jax.Sharing(shift=1, signs=2),
    mora_jax.Rotation(wrap=True),
    mora_jax.Truncation(),
    mora_jax.LowRank(alpha=3.0),
]
