"""Visual tokenizers, one folder each."""
