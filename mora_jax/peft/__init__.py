"""Adapters in the format of PEFT and of the authors' fork of it: safetensors and a JSON config.

A directory of two files, as `PeftModel.save_pretrained` writes it:

    adapter_config.json           use_mora, mora_type, r, rank_pattern, target_modules, ...
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight and .lora_B.weight

MoRA's one matrix is stored twice, as both. `LowRank` is LoRA as every PEFT has it. Files hold the
transposes of our matrices. How modules are called is data, `names=`, as in `export`; `LLAMA`, the
same as there, is the default.

Pickles (`adapter_model.bin`) are refused: opening one runs code.

An optional module: it needs `pip install 'mora_jax[peft]'`.
"""

from mora_jax._compat.extras import needs_extra
from mora_jax._compat.renamed import renamed_names

with needs_extra("peft", "safetensors"):
    from mora_jax._torch.names import KernelName
    from mora_jax._torch.tensors import LLAMA
    from mora_jax.peft._load import load_adapters
    from mora_jax.peft._save import save_adapters

__all__ = ["LLAMA", "KernelName", "load_adapters", "save_adapters"]

__getattr__ = renamed_names(__name__, {"Name": ("KernelName", KernelName)})
