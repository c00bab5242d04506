"""The paper's experiments, resumable, each method at its own best learning rate."""
