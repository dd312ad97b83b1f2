"""Multi-scale residual VQ-VAE (VAR, arXiv 2404.02905)."""
