"""Where a Llama lies on a mesh: logical axes for its parameters, and rules that place them.

Three mesh axes, each of which may have size 1:

    data     copies of the model, each with its part of the batch
    fsdp     the batch and every kernel in parts, kernels gathered where they are used
    tensor   heads and hidden features in parts, kernels used where they lie

`examples/llama/model.py` names the axes of its activations alike, so that under

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):

the same model runs on any of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

#: Mesh axes that the batch is split over.
BATCH_AXES = ("data", "fsdp")

#: Logical axis -> mesh axes.
RULES = (
    ("batch", BATCH_AXES),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("hidden", "tensor"),
    ("embed", "fsdp"),
)

#: The logical axes of a layer's kernel; an axis of stacked layers may stand before them.
AXES = {
    "embed_tokens": ("vocab", None),
    "lm_head": ("embed", "vocab"),
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "heads"),
    "v_proj": ("embed", "heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "hidden"),
    "up_proj": ("embed", "hidden"),
    "down_proj": ("hidden", "embed"),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Any = None) -> Mesh:
    """A mesh of data x fsdp x tensor devices.

    Args:
      data: copies of the model.
      fsdp: parts of the batch and of every kernel.
      tensor: parts of heads and hidden features.
      devices: as for `jax.make_mesh`, by default all there are.
    """
    sizes, names = (data, fsdp, tensor), ("data", "fsdp", "tensor")
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where tokens [B, T] lie."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(("batch", None), RULES) or P())


def param_shardings(params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Where the parameters of a Llama lie: a tree of shardings like `params`, without adapters."""

    def place(path, leaf):
        axes = AXES.get(path[-2], ())
        stacked = (None,) * (len(leaf.shape) - len(axes))
        return NamedSharding(mesh, nn.logical_to_mesh_axes((*stacked, *axes), RULES) or P())

    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: place(path, leaf) for path, leaf in flat.items()})
