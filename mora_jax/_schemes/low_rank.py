"""LoRA and ReLoRA, the baselines of the paper, through the same engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from mora_jax._arrays.dtypes import product, summable
from mora_jax._schemes.base import Adapter, Leaf, Scheme, Work


@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Scheme):
    """LoRA, the paper's baseline, through the same engine: `delta = (alpha / rank) x A B`.

    Args:
      alpha: LoRA's scale; None stands for alpha = rank, a scale of one.
    """

    kind: ClassVar[str] = "low_rank"
    is_linear: ClassVar[bool] = False
    # Its pair is thin: products with it cost a read of the inputs, and no sum is needed.
    prefers_activations: ClassVar[bool] = True
    peft_leaves: ClassVar[tuple[str, str]] = ("a", "b")
    alpha: float | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (number and self.alpha > 0):
            raise ValueError(f"LowRank: alpha must be a positive number, got {self.alpha!r}.")

    @property
    def tag(self) -> str:
        """alpha where it is given; the leaves' names, `a` and `b`, say the rest."""
        return "" if self.alpha is None else f"alpha_{self.alpha:g}"

    def size(self, in_features: int, out_features: int, rank: int, multiple: int = 1) -> int:
        """The rank itself."""
        del in_features, out_features, multiple
        return rank

    def leaves(self, in_features: int, out_features: int, size: int) -> dict[str, Leaf]:
        """`a`, which is drawn, and `b`, which is zero."""
        # Uniform in +-1/sqrt(I), as in the LoRA authors' code and in PEFT.
        limit = 1 / math.sqrt(in_features)

        def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, minval=-limit, maxval=limit)

        return {"a": Leaf((in_features, size), draw, draws=True), "b": Leaf((size, out_features))}

    def size_of(self, adapter: Mapping[str, Any]) -> int:
        """The rank of an adapter's leaves."""
        return adapter["a"].shape[-1]

    def scale(self, adapter: Mapping[str, Any]) -> float:
        """What the product is multiplied by: alpha over the rank."""
        return 1.0 if self.alpha is None else self.alpha / adapter["a"].shape[-1]

    def delta(self, x: jax.Array, adapter: Adapter, out_features: int) -> jax.Array:
        del out_features
        wide = summable(x)
        hidden = (self.scale(adapter) * product(wide, adapter["a"])).astype(wide.dtype)
        return (hidden @ adapter["b"].astype(wide.dtype)).astype(x.dtype)

    def delta_by(
        self,
        multiply: Callable[[jax.Array, jax.Array], jax.Array],
        x: jax.Array,
        adapter: Adapter,
        out_features: int,
    ) -> jax.Array:
        del out_features
        wide = summable(x)
        hidden = self.scale(adapter) * multiply(wide, adapter["a"])
        return multiply(hidden.astype(wide.dtype), adapter["b"]).astype(x.dtype)

    def delta_kernel(self, adapter: Adapter, in_features: int, out_features: int) -> jax.Array:
        del in_features, out_features
        return self.scale(adapter) * (adapter["a"] @ adapter["b"])

    def delta_transpose(self, dy: jax.Array, adapter: Adapter, in_features: int) -> jax.Array:
        del in_features
        wide = summable(dy)
        hidden = (self.scale(adapter) * product(wide, adapter["b"].T)).astype(wide.dtype)
        return (hidden @ adapter["a"].T.astype(wide.dtype)).astype(dy.dtype)

    def gradient_residual(self, x: jax.Array, adapter: Adapter, out_features: int) -> jax.Array:
        """`x` itself: the gradient of `a` needs all of it."""
        del adapter, out_features
        return x

    def gradient(
        self, z: jax.Array, dy: jax.Array, adapter: Adapter, in_features: int
    ) -> dict[str, jax.Array]:
        del in_features
        scale, z, dy = self.scale(adapter), summable(z), summable(dy)
        hidden, dhidden = product(z, adapter["a"]), product(dy, adapter["b"].T)
        hidden, dhidden = (scale * hidden).astype(dy.dtype), (scale * dhidden).astype(z.dtype)
        gradient = {"a": product(z.T, dhidden), "b": product(hidden.T, dy)}
        return {name: value.astype(adapter[name].dtype) for name, value in gradient.items()}

    def work(self, in_features: int, out_features: int, size: int) -> Work:
        return Work(entries=(in_features + out_features) * size)

    def dead_entries(self, in_features: int, out_features: int, size: int) -> int:
        """None: each entry acts, though a rank beyond the layer's sides adds nothing."""
        del in_features, out_features, size
        return 0

    def maps(self, in_features: int, out_features: int, size: int) -> None:
        """None: both maps are trained."""
        del in_features, out_features, size

    def factors(self, adapter: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """`a`, the scale as a matrix, and `b`."""
        return adapter["a"], self.scale(adapter) * np.eye(self.size_of(adapter)), adapter["b"]

    def lora_alpha(self, rank: int) -> float:
        """alpha as PEFT writes it; the rank itself where the scale is one."""
        return rank if self.alpha is None else self.alpha
