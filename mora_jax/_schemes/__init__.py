"""Schemes: the maps between a layer's features and its square matrix."""
