"""TiTok: a picture as a few tokens in one row (arXiv 2406.07550)."""
