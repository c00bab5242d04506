"""Adapters in trees of parameters: attach, split, join, freeze, banks."""
