"""Models: one folder per family, visual tokenizers, and what they share."""
