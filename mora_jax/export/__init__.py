"""For PyTorch: merged models as Hugging Face has them, and adapters as the nearest LoRA.

An optional module: it needs `pip install 'mora_jax[export]'`.
"""

from mora_jax._extras import needs_extra

with needs_extra("export", "safetensors", "regex"):
    from mora_jax._torch.names import Name
    from mora_jax._torch.tensors import LLAMA, Kept
    from mora_jax.export._merged import save_lora, save_merged

__all__ = ["LLAMA", "Kept", "Name", "save_lora", "save_merged"]
