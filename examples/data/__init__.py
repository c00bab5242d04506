"""What the examples learn from: text, random pairs, and files that wheels of an index carry."""
