"""Text that may come from anyone: JSON and regular expressions, read within limits."""
