"""LlamaGen: next-token prediction of image tokens with a plain Llama (arXiv 2406.06525)."""
