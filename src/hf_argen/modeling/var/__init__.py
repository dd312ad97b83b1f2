"""VAR: visual autoregressive modeling by next-scale prediction (arXiv 2404.02905)."""
