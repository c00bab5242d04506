"""Training a Llama on a mesh of devices, with checkpoints that a killed run resumes from."""
