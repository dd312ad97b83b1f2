"""The forms in which a kernel is compiled, and what a compiled form takes of a chip, without a GPU."""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OPTIONS = {"enable_fp_fusion": True}  # a * b + c in one rounding; Triton 3.9 asks to be told


def stages(number: int) -> int:
    """How many steps of a loop are under way at once: one on AMD's chips, which have little shared memory."""
    return 1 if torch.version.hip else number


@dataclass(frozen=True)
class Chip:
    """
    A GPU for which kernels are compiled.

    Attributes:
        backend, arch, warp_size: as in Triton's `GPUTarget`.
        shared_memory: bytes that one program may use.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int


CHIPS = {
    "sm_80": Chip("A100", "cuda", 80, 32, 163 * 1024),
    "sm_90": Chip("H100, H200", "cuda", 90, 32, 227 * 1024),
    "gfx942": Chip("MI300", "hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Variant:
    """
    A kernel with all that Triton compiles it for.

    Attributes:
        kernel: a `triton.jit` function.
        types: of the arguments that are no constants, in Triton's words ("*fp32", "i32").
        constants: the `tl.constexpr` arguments.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    unaligned: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Usage:
    """What a compiled variant takes: bytes of shared memory, registers of a thread, spilled bytes, instructions."""

    shared_memory: int
    registers: int
    spilled: int
    instructions: int


def compiled(variant: Variant, chip: Chip) -> Usage:
    """
    Compiles for a chip that need not be there.

    Raises:
        whatever Triton raises for a kernel that does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    # What Triton assumes of arguments when it runs: torch's memory starts at multiples of 16 bytes.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") and name not in variant.unaligned
    }
    source = ASTSource(variant.kernel, signature, dict(variant.constants), aligned)
    target = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    num_stages = 1 if chip.backend == "hip" else variant.num_stages
    options = {"num_warps": variant.num_warps, "num_stages": num_stages, **OPTIONS}
    result = triton.compile(source, target=target, options=options)
    read = _of_cubin if chip.backend == "cuda" else _of_amdgcn
    registers, spilled, instructions = read(result.asm)
    return Usage(result.metadata.shared, registers, spilled, instructions)


def _of_cubin(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    """As the tools that come with Triton see it; whatever lies on the stack was spilled, our kernels have no arrays."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", said, re.MULTILINE))


def _of_amdgcn(asm: Mapping[str, Any]) -> tuple[int, int, int]:
    text = asm["amdgcn"]

    def number(pattern: str) -> int:
        return int(re.search(pattern, text)[1])

    spilled = number(r"\.vgpr_spill_count:\s*(\d+)") + number(r"ScratchSize:\s*(\d+)")
    return (
        number(r"\.vgpr_count:\s*(\d+)"),
        spilled,
        len(re.findall(r"^\t(?:[sv]|ds|global|buffer)_", text, re.MULTILINE)),
    )


def all_variants() -> dict[str, list[Variant]]:
    """The variants of every operation, by name."""
    from . import OPERATIONS

    package = __package__
    return {name: importlib.import_module(f"{package}.{name}.triton").variants() for name in OPERATIONS}
