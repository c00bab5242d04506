"""MoRA, high-rank parameter-efficient fine-tuning, for JAX and Flax.

Jiang et al., "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning", arXiv 2405.12130.
"""

from mora_jax._adapt import adapt, plan
from mora_jax._analysis.allocate import Allocation, LayerScore, allocate
from mora_jax._analysis.projection import LayerProjection, ProjectionReport, project_to_lora
from mora_jax._analysis.spectrum import Spectrum, SpectrumReport, spectrum
from mora_jax._arrays.paths import rename_leaves
from mora_jax._compat.renamed import renamed_names
from mora_jax._merging.losses import MergeLoss, MergeWarning
from mora_jax._merging.merge import merge, merge_losses
from mora_jax._merging.prune import Prune
from mora_jax._merging.remora import ResetReport, ResetResult, merge_and_reset
from mora_jax._merging.schedules import jagged_cosine_schedule, merge_steps
from mora_jax._merging.unmerge import unmerge, unmerge_losses
from mora_jax._params.attach import attach
from mora_jax._params.bank import AdapterBank, stack_adapters
from mora_jax._params.freeze import freeze_base
from mora_jax._params.split import join, split, trainable_mask
from mora_jax._plans.config import MoRAConfig
from mora_jax._plans.layer import AdapterSpec
from mora_jax._plans.plan import Plan
from mora_jax._product.axes import KernelAxes
from mora_jax._product.dot import mora_dot_general
from mora_jax._schemes.base import Leaf, Scheme, Work
from mora_jax._schemes.blocks import Decoupling, Rotation
from mora_jax._schemes.groups import Sharing
from mora_jax._schemes.low_rank import LowRank
from mora_jax._schemes.operators import (
    compress,
    decompress,
    delta,
    delta_kernel,
    square_rank,
)
from mora_jax._schemes.registry import register_scheme, scheme_from_dict, scheme_from_mora_type
from mora_jax._schemes.truncation import Truncation
from mora_jax._tracing.function import as_params
from mora_jax._version import __version__
from mora_jax.linen._dense import MoRADense

__all__ = [
    "AdapterBank",
    "AdapterSpec",
    "Allocation",
    "Decoupling",
    "KernelAxes",
    "LayerProjection",
    "LayerScore",
    "Leaf",
    "LowRank",
    "MergeLoss",
    "MergeWarning",
    "MoRAConfig",
    "MoRADense",
    "Plan",
    "ProjectionReport",
    "Prune",
    "ResetReport",
    "ResetResult",
    "Rotation",
    "Scheme",
    "Sharing",
    "Spectrum",
    "SpectrumReport",
    "Truncation",
    "Work",
    "__version__",
    "adapt",
    "allocate",
    "as_params",
    "attach",
    "compress",
    "decompress",
    "delta",
    "delta_kernel",
    "freeze_base",
    "jagged_cosine_schedule",
    "join",
    "merge",
    "merge_and_reset",
    "merge_losses",
    "merge_steps",
    "mora_dot_general",
    "plan",
    "project_to_lora",
    "register_scheme",
    "rename_leaves",
    "scheme_from_dict",
    "scheme_from_mora_type",
    "spectrum",
    "split",
    "square_rank",
    "stack_adapters",
    "trainable_mask",
    "unmerge",
    "unmerge_losses",
]

__getattr__ = renamed_names(
    __name__,
    {"Projected": ("LayerProjection", LayerProjection)},
    # Some of these need an extra.
    inner={"checkpoint", "export", "linen", "nnx", "peft", "quantized", "sharding"},
)
