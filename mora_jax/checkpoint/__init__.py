"""Saving and loading adapters with Orbax: the trained parameters and the plan, never the base.

An optional module: it needs `pip install 'mora_jax[checkpoint]'`.
"""

from mora_jax._extras import needs_extra

with needs_extra("checkpoint", "orbax", "orbax.checkpoint", "etils"):
    from mora_jax.checkpoint._adapters import (
        SavedAdapters,
        list_adapters,
        load_adapters,
        save_adapters,
    )

__all__ = ["SavedAdapters", "list_adapters", "load_adapters", "save_adapters"]
