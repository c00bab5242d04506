"""For PyTorch: merged models as Hugging Face has them, and adapters as the LoRA that is nearest.

    export.save_merged("out/model", params, plan, config="path/of/the/base/model")
    report = export.save_lora("out/lora", params, plan, rank=64)
    print(report)                                # what each layer lost

    AutoModelForCausalLM.from_pretrained("out/model")                  # transformers
    PeftModel.from_pretrained(base_model, "out/lora")                  # PEFT, or any LoRA server

A merged model is written one tensor at a time, so that it takes no second model's memory.
What parameters are called in PyTorch is data, `LLAMA` by default: `KernelName` for kernels,
`TensorName` for the rest.

An optional module: it needs `pip install 'mora_jax[export]'`.
"""

from mora_jax._compat.extras import needs_extra
from mora_jax._compat.renamed import renamed_names

with needs_extra("export", "safetensors"):
    from mora_jax._torch.names import KernelName
    from mora_jax._torch.tensors import LLAMA, TensorName
    from mora_jax.export._lora import save_lora
    from mora_jax.export._merged import save_merged

__all__ = ["LLAMA", "KernelName", "TensorName", "save_lora", "save_merged"]

_RENAMED = {"Kept": ("TensorName", TensorName), "Name": ("KernelName", KernelName)}
__getattr__ = renamed_names(__name__, _RENAMED)
