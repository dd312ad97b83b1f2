"""VQ-16 and VQ-8, the visual tokenizers of LlamaGen (arXiv 2406.06525)."""
