"""CoDe: collaborative decoding of a large and a small VAR (arXiv 2411.17787)."""
