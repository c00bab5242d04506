"""What adapters have learned, and where they would learn most."""
