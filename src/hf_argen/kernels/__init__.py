"""
The operations on which decoding spends its time, each written twice: `reference.py` is the definition in plain PyTorch,
`triton.py` does the same in one pass on a GPU. `HF_ARGEN_KERNELS=auto|reference|triton` picks; see docs/kernels.md.
"""

from .dispatch import mode, use

__all__ = ["OPERATIONS", "mode", "use"]

# One package each
OPERATIONS = ("adaln", "qk_norm_rope", "sample_logits", "tree_attention", "vector_quantize", "verify_draft")
