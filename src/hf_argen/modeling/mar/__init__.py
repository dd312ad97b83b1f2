"""MAR: masked autoregressive generation of continuous tokens (arXiv 2406.11838)."""
