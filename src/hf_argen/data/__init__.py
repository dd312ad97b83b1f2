"""Data sets that our small models are trained and judged on."""
