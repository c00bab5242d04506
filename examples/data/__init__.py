"""What the examples learn from: text, random pairs, and files that wheels on a package index carry."""
