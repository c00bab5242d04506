"""Names that have changed, and packages that may be missing."""
