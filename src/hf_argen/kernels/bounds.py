"""
Where a kernel was measured to be slower than its reference, chip by chip.

`bounds.json` has for each chip, and there for plain and for compiled code, the operations that have such shapes:
`{"sm_90": {"compiled": {"adaln": [{"rows": [1, 16], "hidden": [640, 2560]}]}}}` says that in compiled code up to 16 rows of
640 to 2560 channels are left to the reference. A chip that is not there was not measured; it takes kernels.
`scripts/benchmark_kernels.py --write-dispatch` writes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("bounds.json")

# The sizes by which shapes of an operation are told apart.
SIZES = {
    "adaln": ("rows", "hidden"),
    "qk_norm_rope": ("rows", "head_dim"),
    "sample_logits": ("rows", "vocab"),
    "tree_attention": ("key_heads", "nodes", "columns", "head_dim"),  # heads of all rows of the batch
    "vector_quantize": ("rows", "codes", "channels"),
    "verify_draft": ("rows", "nodes", "vocab"),
}
CODE = ("plain", "compiled")

BOUNDS: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def chip_of(device: int) -> str:
    """The architecture of a GPU, as compilers name it: sm_90, gfx942."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def prefers_reference(operation: str, device: torch.device, sizes: Mapping[str, int]) -> bool:
    """
    Whether the reference was measured to be faster, in compiled code the compiled one.

    Args:
        device: a GPU.
        sizes: of the shape, by the names in `SIZES`.
    """
    if not BOUNDS:
        return False
    chip = BOUNDS.get(chip_of(torch.cuda.current_device() if device.index is None else device.index), {})
    boxes = chip.get(CODE[torch.compiler.is_compiling()], {}).get(operation, ())
    return any(holds(box, sizes) for box in boxes)


def holds(box: Mapping[str, list[int]], sizes: Mapping[str, int]) -> bool:
    """Whether all sizes lie within their bounds, both included."""
    return all(least <= sizes[name] <= most for name, (least, most) in box.items())
