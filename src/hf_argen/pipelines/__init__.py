"""Pipelines of transformers, one per task; importing `hf_argen` registers them with `transformers.pipeline`."""
