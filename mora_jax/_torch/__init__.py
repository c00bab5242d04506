"""PyTorch's names, tensors and files."""
