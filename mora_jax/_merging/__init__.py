"""Merging adapters into their base, taking them out again, and ReMoRA's restarts."""
