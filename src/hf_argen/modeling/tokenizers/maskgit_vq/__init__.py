"""MaskGIT-VQGAN, the visual tokenizer of RAR and TiTok (arXiv 2202.04200, 2411.00776)."""
