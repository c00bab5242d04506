"""Arrays and trees of them: dtypes, meshes, boxes, paths; nothing here knows of adapters."""
