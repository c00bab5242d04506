"""The LoRA that is nearest to the adapters, in PEFT's format."""

from __future__ import annotations

import os
from collections.abc import Iterable

import jax

from mora_jax import peft
from mora_jax._analysis.projection import ProjectionReport, project_to_lora
from mora_jax._arrays.boxes import rebox, unbox
from mora_jax._arrays.paths import flatten, list_paths, unflatten_like
from mora_jax._arrays.places import on_host
from mora_jax._params.split import Params
from mora_jax._plans.plan import Plan
from mora_jax._torch.directories import check_new
from mora_jax._torch.names import KernelName, torch_kernels
from mora_jax._torch.tensors import LLAMA
from mora_jax.peft._save import check_base_model


def save_lora(
    directory: str | os.PathLike[str],
    params: Params,
    plan: Plan,
    rank: int,
    *,
    names: Iterable[KernelName] = LLAMA,
    base_model: str | None = None,
) -> ProjectionReport:
    """Writes the LoRA nearest to the adapters, as PEFT has it, and says what each layer lost.

    `mora_jax.project_to_lora`, then `mora_jax.peft.save_adapters`: float32, with `lora_alpha` the
    rank, which is a scale of 1. The LoRA goes with the base model, not with a merged one. Where
    several processes share the parameters all of them call it, and the first writes.

    Args:
      directory: a path that does not exist yet.
      params: parameters with adapters of any scheme.
      plan: the plan.
      rank: of the LoRA, in every layer. Servers limit it.
      names: what kernels are called in PyTorch.
      base_model: as for `peft.save_adapters`; required after `merge_and_reset`.

    Returns:
      The relative error of every layer; `print` gives a table.

    Raises:
      ValueError: as `project_to_lora` and `peft.save_adapters` do: where the plan does not fit, an
        adapter is not finite, the directory exists, a layer is no linear layer in PyTorch (an
        embedding), or `also_train` has parameters, which a LoRA cannot hold.
    """
    check_new(directory)
    check_base_model(plan, base_model)
    _check_projectable(params, plan, names)
    lora, lora_plan, report = project_to_lora(params, plan, rank)
    leaves = flatten(lora)
    # Arrays of all processes come together by the help of all.
    host = {p: rebox(leaves[p], on_host(unbox(leaves[p]))) for p in lora_plan.adapter_leaves()}
    if jax.process_index() == 0:
        own = unflatten_like(leaves | host, lora)
        peft.save_adapters(directory, own, lora_plan, names=names, base_model=base_model)
    return report


def _check_projectable(params: Params, plan: Plan, names: Iterable[KernelName]) -> None:
    """Raises ValueError for what PEFT's file cannot hold, before anything is decomposed."""
    if plan.also_train:
        raise ValueError(
            "a LoRA cannot hold the parameters that are trained in full, "
            f"{list_paths(dict(plan.also_train))}; save_merged can."
        )
    _, left = torch_kernels({p: unbox(x).shape for p, x in flatten(params).items()}, names)
    if unknown := [path for path in plan.kernel_paths() if path in left]:
        raise ValueError(f"{unknown[0]!r} is no linear layer in PyTorch: {left[unknown[0]]}.")
