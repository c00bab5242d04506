"""Plans: which layers are adapted and how, as static data."""
