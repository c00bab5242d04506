"""A plain Flax Llama: the model, loading it from files, laying it out on a mesh of devices."""
