"""MaskGIT: masked generation of ids, surest first (arXiv 2202.04200), as TiTok's generators have it (arXiv 2406.07550)."""
