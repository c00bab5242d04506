"""What adapters have learned, and in which layers: spectra, and budgets of parameters by layer."""
