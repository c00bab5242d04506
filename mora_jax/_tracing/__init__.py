"""Adapters in functions that no hook reaches: traced, and run again."""
