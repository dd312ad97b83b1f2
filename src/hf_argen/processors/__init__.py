"""Processors: what a person gives (label, caption, picture) to tensors, and tensors to pictures."""
