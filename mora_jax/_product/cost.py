"""Where a delta is cheaper: a model of cost, from static shapes and the kind of machine.

The products of a step cost the same wherever the delta is. What the placements add is memory
traffic, arithmetic of their own and the launching of kernels; all are counted here in numbers
moved: the numbers of the kernel's dtype that the machine moves in the same time.

Shape letters: T rows, I input features, O output features, R the square size, N blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from mora_jax._arrays.mesh import platform
from mora_jax._schemes.base import Scheme

#: Where a delta is; and what one may ask for.
Place = Literal["kernel", "activation"]
Placement = Literal["auto", "kernel", "activation"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a kind of machine does in the time in which it moves one number.

    Attributes:
      arithmetic: multiplications and additions in a product.
      launch: numbers moved while one more kernel is started.
      adding: passes over a result to which a delta is added. It is read and written, but for what
        compilers merge into the operation that follows.
      tables: whether features are spread by products with a table (`Work.table_terms`).
      sending: numbers moved while one is summed over devices.
    """

    arithmetic: float
    launch: float
    adding: float = 1.5
    tables: bool = False
    sending: float = 10


#: "gpu" is an H100 (3 TB/s, 5 us a kernel); its constants were set by hand after timing single
#: kernels and whole steps of examples/benchmarks/step.py. "tpu" is untimed; it agrees with the
#: cycles that the compiler estimates for a v5p. "cpu" is the right order.
MACHINES = {
    "gpu": Machine(arithmetic=500, launch=7_500_000),
    "tpu": Machine(arithmetic=250, launch=500_000, tables=True),
    "cpu": Machine(arithmetic=20, launch=20_000),
}


class Splits(NamedTuple):
    """Over how many devices a layer's input features, its output features and its kernel are split.

    A kernel may lie in more parts than its features do: in FSDP it is gathered after the sum.
    """

    inputs: int = 1
    outputs: int = 1
    kernel: int = 1


def cheapest_placements(
    rows: int,
    in_features: int,
    out_features: int,
    size: int,
    scheme: Scheme,
    machine: str | None = None,
    splits: Splits = Splits(),  # noqa: B008
) -> tuple[Place, Place]:
    """The cheaper places of the delta in the forward pass and for the gradient of the inputs.

    In the kernel either pass reads and writes `I O` numbers more. In the activations it has
    products with the matrix, and adds to `T O` outputs or `T I` inputs; where features are split,
    devices have to sum what they have compressed, `T R` numbers.

    Args:
      rows: T, the rows of one product that a device has.
      in_features: I.
      out_features: O.
      size: R, or LoRA's rank.
      scheme: the scheme.
      machine: "gpu", "tpu" or "cpu"; by default that of the mesh in use, or where JAX runs.
      splits: how the layer is split over devices.

    >>> from mora_jax import Sharing
    >>> cheapest_placements(16384, 4096, 4096, 256, Sharing(), "gpu")
    ('kernel', 'kernel')
    >>> cheapest_placements(8, 4096, 4096, 256, Sharing(), "gpu")
    ('activation', 'activation')
    """
    costs = MACHINES.get(machine or platform(), MACHINES["gpu"])
    if scheme.prefers_activations:
        return "activation", "activation"
    work = scheme.work(in_features, out_features, size)
    spreading = work.table_terms / costs.arithmetic if costs.tables else 0
    kernel = 2 * in_features * out_features + work.kernel_moves
    # Exact in float32, as the kernel's sum is, a product takes six passes.
    kernel += 6 * spreading * in_features * out_features
    kernel /= splits.kernel
    moved = rows * work.row_moves
    product = 2 * rows * work.entries / costs.arithmetic + moved + 2 * costs.launch
    if splits.inputs * splits.outputs > 1:
        product += costs.sending * rows * size + 2 * costs.launch

    def place(added: float) -> Place:
        return "activation" if product + (costs.adding + spreading) * added < kernel else "kernel"

    return place(rows * out_features / splits.outputs), place(rows * in_features / splits.inputs)
