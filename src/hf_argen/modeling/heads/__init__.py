"""Heads: from a hidden state to a distribution of the next token."""
