"""What a scheme must answer, and all that follows from it.

    h = W0 x + f_decomp(M f_comp(x))        equation (2) of arXiv 2405.12130

`compress` is f_comp and `decompress` is f_decomp: fixed linear maps. They define a scheme. The
delta, its kernel and the gradient of the matrix follow from them, and are derived here. A scheme
writes one of them out only where that is faster, and the tests hold it to the derived one, so that
forward pass, merge and training agree.

Shape letters: I input features, O output features, R the square size, N blocks of R features,
T rows, P parts on different devices; `...` any leading axes. The matrix is a JAX kernel, `z @ M`;
files of the authors' PyTorch code hold its transpose.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mora_jax._arrays.dtypes import linear_transpose, product, summable, wide_dtype

Adapter = Mapping[str, jax.Array]

#: (key or None, shape, dtype) -> the numbers that a new leaf starts with.
Start = Callable[..., jax.Array]


def zeros(key: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A new leaf of zeros."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A new leaf of ones."""
    del key
    return jnp.ones(shape, dtype)


class Leaf(NamedTuple):
    """One array of an adapter.

    Attributes:
      shape: (rows, columns), without the axes of stacked layers and of experts.
      start: makes a new one, of a shape that may have these axes too.
      draws: whether `start` needs a PRNG key.
    """

    shape: tuple[int, int]
    start: Start = zeros
    draws: bool = False


class Work(NamedTuple):
    """What a delta costs, in numbers that are moved; see `mora_jax._product.cost`.

    Attributes:
      entries: numbers that each row is multiplied with.
      kernel_moves: numbers moved to form the delta's kernel, beyond a pass over the kernel.
      row_moves: numbers moved for each row of the inputs, beyond its features.
      table_terms: terms of each number of the result, on machines that spread features by a product
        with a table.
    """

    entries: int
    kernel_moves: int = 0
    row_moves: int = 0
    table_terms: int = 0


@dataclasses.dataclass(frozen=True, repr=False)
class Scheme:
    """How a layer's features are compressed to the square matrix and decompressed from it.

    A scheme is a frozen dataclass: hashable and comparable, a static argument of jitted functions
    and a line of JSON. A new one defines `kind`, `compress` and `decompress`, and is registered
    with `register_scheme`; everything else has a default. examples/custom_scheme.py is one.
    """

    #: The scheme's name, in JSON and wherever a scheme may be given by name.
    kind: ClassVar[str] = ""
    #: Whether the delta is linear in the adapter, so that a sum of adapters is an adapter.
    is_linear: ClassVar[bool] = True
    #: Whether the delta is always cheaper in the activations than in the kernel.
    prefers_activations: ClassVar[bool] = False
    #: The square size is a multiple of this.
    size_step: ClassVar[int] = 1
    #: The named cycles that ReMoRA can walk through, see `successor`.
    cycles: ClassVar[tuple[str, ...]] = ()
    #: Fields that had another name in an earlier version: old -> new.
    renamed_fields: ClassVar[Mapping[str, str]] = {}
    #: The leaves that files of PEFT call `lora_A` and `lora_B`.
    peft_leaves: ClassVar[tuple[str, str]] = ("matrix", "matrix")

    def __repr__(self) -> str:
        """The call that makes the scheme, defaults left out."""
        fields = dataclasses.fields(self)
        given = [
            (f.name, getattr(self, f.name)) for f in fields if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description, read back by `scheme_from_dict`.

        >>> from mora_jax import Rotation
        >>> Rotation(wrap=True).to_dict()
        {'kind': 'rotation', 'wrap': True}
        """
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @property
    def tag(self) -> str:
        """What tells this scheme's parameters from another's: it ends the names of their leaves.

        >>> from mora_jax import LowRank, Sharing
        >>> Sharing().tag, Sharing(signs=3).tag, LowRank().tag
        ('sharing', 'sharing_signs_3', '')
        """
        fields = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
        given = [(name, value) for name, value, default in fields if value != default]
        return "_".join(
            [self.kind, *(name if value is True else f"{name}_{value}" for name, value in given)]
        )

    # The two maps that define a scheme.

    def compress(self, x: jax.Array, size: int, *, out_features: int | None = None) -> jax.Array:
        """f_comp: [..., I] -> [..., R], or [..., N, R] in blocks; linear, keeps the dtype.

        Args:
          x: the inputs.
          size: R.
          out_features: O, where the number of blocks depends on it.
        """
        raise TypeError(f"{self} has no fixed compression; use `delta`.")

    def decompress(self, z: jax.Array, out_features: int) -> jax.Array:
        """f_decomp: [..., R] or [..., N, R] -> [..., O]; linear, keeps the dtype.

        In the activations JAX transposes it in that dtype: a map that copies one number to many
        outputs should copy in float32 (`Sharing` does), or bfloat16 gradients lose digits.
        """
        raise TypeError(f"{self} has no fixed decompression; use `delta`.")

    # The adapter's arrays.

    def size(self, in_features: int, out_features: int, rank: int, multiple: int = 1) -> int:
        """R, the side of the square matrix; see `mora_jax.square_rank`."""
        size, step = int(math.sqrt((in_features + out_features) * rank) + 0.5), self.size_step
        size, multiple = max(size - size % step, step), math.lcm(multiple, step)
        most = max(size, min(in_features, out_features)) // multiple
        return min(max((size + multiple // 2) // multiple, 1), most) * multiple or size

    def leaves(self, in_features: int, out_features: int, size: int) -> dict[str, Leaf]:
        """Name -> leaf, of an adapter of this size beside a kernel of I x O."""
        del in_features, out_features
        return {"matrix": Leaf((size, size))}

    def size_of(self, adapter: Mapping[str, Any]) -> int:
        """R of an adapter's leaves [..., rows, columns]."""
        return adapter["matrix"].shape[-1]

    def check(self, adapter: Mapping[str, Any], in_features: int, out_features: int) -> None:
        """Raises ValueError unless the adapter has the names and shapes of this scheme.

        Any square size is legal here; the plan says which one the rank asks for.
        """
        got = {name: tuple(value.shape) for name, value in adapter.items()}
        try:
            size = max(self.size_of(adapter), 1)
        except (KeyError, IndexError):
            size = self.size_step
        leaves = self.leaves(in_features, out_features, size)
        wanted = {name: leaf.shape for name, leaf in leaves.items()}
        if got != wanted:
            raise ValueError(
                f"adapter of {self} on {in_features} -> {out_features} features must have shapes "
                f"{wanted}, got {got}."
            )
        if size % self.size_step:
            raise ValueError(
                f"the size of the matrix of {self} is a multiple of {self.size_step}, got {got}."
            )

    # The delta, derived from the two maps.

    def delta(self, x: jax.Array, adapter: Adapter, out_features: int) -> jax.Array:
        """`f_decomp(M f_comp(x))`: [..., I] -> [..., O], the dtype of `x`."""
        return self.delta_by(product, x, adapter, out_features)

    def delta_by(
        self,
        multiply: Callable[[jax.Array, jax.Array], jax.Array],
        x: jax.Array,
        adapter: Adapter,
        out_features: int,
    ) -> jax.Array:
        """`delta` with another product of rows [..., K] and a leaf, such as one for each expert."""
        matrix = adapter["matrix"]
        z = self.compress(summable(x), matrix.shape[-1], out_features=out_features)
        z = multiply(z, matrix).astype(z.dtype)
        return self.decompress(z, out_features).astype(x.dtype)

    def delta_kernel(self, adapter: Adapter, in_features: int, out_features: int) -> jax.Array:
        """The kernel of the delta, `C^T M D`: [I, O], the adapter's dtype; equation (3)."""
        matrix = adapter["matrix"]
        if self.blocks(in_features, out_features, matrix.shape[0]):
            identity = jnp.eye(in_features, dtype=matrix.dtype)
            return Scheme.delta(self, identity, adapter, out_features)
        # No product is made: entries of M are put in their places.
        rows = self.compress_transpose(matrix.T, in_features, out_features).T
        return self.decompress(rows, out_features)

    def delta_transpose(self, dy: jax.Array, adapter: Adapter, in_features: int) -> jax.Array:
        """What the adapter adds to the inputs' gradient, the transpose of `x -> delta(x)`.

        [T, O] -> [T, I], the dtype of `dy`.
        """
        matrix, out_features = adapter["matrix"], dy.shape[-1]
        dz = self.decompress_transpose(summable(dy), matrix.shape[0], in_features)
        dz = product(dz, matrix.T).astype(dz.dtype)
        return self.compress_transpose(dz, in_features, out_features).astype(dy.dtype)

    def compress_transpose(self, z: jax.Array, in_features: int, out_features: int) -> jax.Array:
        """The transpose of `compress`: [..., R] or [..., N, R] -> [..., I]."""
        blocks = self.blocks(in_features, out_features, z.shape[-1])
        lead = z.shape[: z.ndim - 1 - len(blocks)]
        compress = functools.partial(self.compress, size=z.shape[-1], out_features=out_features)
        return linear_transpose(compress, (*lead, in_features), z)

    def decompress_transpose(self, dy: jax.Array, size: int, in_features: int) -> jax.Array:
        """The transpose of `decompress`: [..., O] -> [..., R] or [..., N, R]."""
        blocks = self.blocks(in_features, dy.shape[-1], size)
        decompress = functools.partial(self.decompress, out_features=dy.shape[-1])
        return linear_transpose(decompress, (*dy.shape[:-1], *blocks, size), dy)

    def blocks(self, in_features: int, out_features: int, size: int) -> tuple[int, ...]:
        """(N,) where `compress` gives [..., N, R], else ()."""
        return _blocks(self, in_features, out_features, size)

    # The gradient by the adapter.

    def gradient_residual(self, x: jax.Array, adapter: Adapter, out_features: int) -> jax.Array:
        """All of `x` that the adapter's gradient needs: [T, I] -> P parts that add up to f_comp(x).

        [P, T, R] or [P, T, N, R], or `x` itself.
        """
        z = self.compress(summable(x), self.size_of(adapter), out_features=out_features)
        return z[None]

    def output_gradient_parts(self, dy: jax.Array, size: int, in_features: int) -> jax.Array:
        """[T, O] -> P parts that add up to `decompress_transpose(dy)`."""
        return self.decompress_transpose(dy, size, in_features)[None]

    def gradient(
        self, z: jax.Array, dy: jax.Array, adapter: Adapter, in_features: int
    ) -> dict[str, jax.Array]:
        """Gradient of `sum(dy * delta)` by the adapter: the transpose of `M -> delta(x, M)`.

        `dM = f_comp(x)^T D^T(dy)` with D^T the transpose of `decompress`: no product is larger than
        the adapter's own, no `[I, O]` gradient is ever formed.

        Args:
          z: `gradient_residual(x)`.
          dy: [T, O].
          adapter: the adapter.
          in_features: I.

        Returns:
          A dict like `adapter`, in its dtypes, accumulated in float32 or better.
        """
        dz = self.output_gradient_parts(summable(dy), z.shape[-1], in_features)
        # Parts and rows are contracted at once, so that one sum over devices does for both: what is
        # sent has the size of the matrix, not of the activations. Of two that have parts, one sums.
        z = z.sum(0, keepdims=True) if len(z) > 1 and len(dz) > 1 else z
        parts = max(len(z), len(dz))
        z, dz = (jnp.broadcast_to(part, (parts, *part.shape[1:])) for part in (z, dz))
        axes = tuple(range(z.ndim - 1))
        gradient = jax.lax.dot_general(
            z,
            dz.astype(z.dtype),
            ((axes, axes), ((), ())),
            preferred_element_type=wide_dtype(z.dtype),
        )
        return {"matrix": gradient.astype(adapter["matrix"].dtype)}

    # What plans and reports ask.

    def work(self, in_features: int, out_features: int, size: int) -> Work:
        """What the delta costs."""
        del in_features, out_features
        return Work(entries=size * size)

    def dead_entries(self, in_features: int, out_features: int, size: int) -> int:
        """Entries of one matrix that cannot act, where R exceeds a side of the layer."""
        return size**2 - min(size, in_features) * min(size, out_features)

    def maps(
        self, in_features: int, out_features: int, size: int
    ) -> tuple[jax.Array, jax.Array] | None:
        """(C [I, R], D [R, O]) of a delta kernel that is `C M D`; None where it is in blocks."""
        if self.blocks(in_features, out_features, size):
            return None
        before = self.compress(jnp.eye(in_features), size, out_features=out_features)
        return before, self.decompress(jnp.eye(size), out_features)

    def factors(self, adapter: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
        """(A [I, R], K [R, R], B [R, O]) of a delta `A K B`, all of it trained; else None."""
        del adapter
        return None

    def successor(self, cycle: str, in_features: int, out_features: int, size: int) -> Scheme:
        """The scheme after a merge in ReMoRA.

        Args:
          cycle: one of `cycles`, or "auto", which leaves the choice to the scheme.
          in_features: I.
          out_features: O.
          size: R.

        Raises:
          ValueError: if this scheme is not part of the cycle.
        """
        del cycle, in_features, out_features, size
        return self

    def lora_alpha(self, rank: int) -> float | None:
        """LoRA's alpha, of schemes that are LoRA; None for all others."""
        del rank
        return None


@functools.lru_cache(maxsize=4096)
def _blocks(scheme: Scheme, in_features: int, out_features: int, size: int) -> tuple[int, ...]:
    compress = functools.partial(scheme.compress, size=size, out_features=out_features)
    shape = jax.eval_shape(compress, jax.ShapeDtypeStruct((in_features,), jnp.float32)).shape
    return shape[:-1]
