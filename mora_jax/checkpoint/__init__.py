"""Saving and loading adapters with Orbax: the trained parameters and the plan, never the base.

A saved adapter is one Orbax checkpoint of the trained tree. A directory is one, or holds many of
them, by name and version:

    adapters/                     save_adapters("adapters", params, plan)

    library/poems/1/              save_adapters("library", params, plan, name="poems")
    library/poems/2/              and once more
    library/summaries/1/

Its custom metadata says by itself what it fits and what it must hold: the plan as JSON, with the
scheme of each layer's cycle; shape and dtype of every kernel of the base; shape, dtype and checksum
of every array. Orbax renames a directory when it is whole, so a torn one is never found, and what
was damaged later is refused.

An optional module: it needs `pip install 'mora_jax[checkpoint]'`.
"""

from mora_jax._compat.extras import needs_extra

with needs_extra("checkpoint", "orbax", "orbax.checkpoint", "etils"):
    from mora_jax.checkpoint._adapters import (
        SavedAdapters,
        list_adapters,
        load_adapters,
        save_adapters,
    )

__all__ = ["SavedAdapters", "list_adapters", "load_adapters", "save_adapters"]
