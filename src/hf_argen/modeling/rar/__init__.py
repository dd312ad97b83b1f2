"""RAR: randomized autoregressive visual generation (arXiv 2411.00776)."""
