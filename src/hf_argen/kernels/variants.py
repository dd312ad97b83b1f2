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
        num_stages: see [`stages`]; `None` is Triton's choice.
        unaligned: pointers into the middle of a tensor.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int | None = None
    unaligned: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Usage:
    """What a compiled variant takes: bytes of shared memory, registers of a thread, and of them those that were spilled."""

    shared_memory: int
    registers: int
    spilled: int


def compiled(variant: Variant, chip: Chip) -> Any:
    """
    Triton's compiled kernel for a chip that need not be there; see [`usage`] and [`instructions`].

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
    options = {"num_warps": variant.num_warps, **OPTIONS}
    if variant.num_stages is not None:
        options["num_stages"] = 1 if chip.backend == "hip" else variant.num_stages  # as `stages` has it
    return triton.compile(source, target=target, options=options)


def usage(kernel: Any) -> Usage:
    """
    Of what [`compiled`] gives. On NVIDIA's chips what lies on the stack counts as spilled, bytes of it: our kernels have no
    arrays of their own.
    """
    if "cubin" in kernel.asm:
        said = _cuobjdump(kernel.asm["cubin"], "-res-usage")
        registers, stack, local = (
            int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")
        )
        return Usage(kernel.metadata.shared, registers, stack + local)
    said = kernel.asm["amdgcn"]
    patterns = (r"\.vgpr_count:\s*(\d+)", r"\.vgpr_spill_count:\s*(\d+)", r"ScratchSize:\s*(\d+)")
    registers, spilled, scratch = (int(re.search(pattern, said)[1]) for pattern in patterns)
    return Usage(kernel.metadata.shared, registers, spilled + scratch)


def instructions(kernel: Any) -> int:
    """Of the compiled program, all paths together."""
    if "cubin" in kernel.asm:
        return len(
            re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", _cuobjdump(kernel.asm["cubin"], "-sass"), re.MULTILINE)
        )
    return len(re.findall(r"^\t(?:[sv]|ds|global|buffer)_", kernel.asm["amdgcn"], re.MULTILINE))


def _cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool says that comes with Triton."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def all_variants() -> dict[str, list[Variant]]:
    """The variants of every operation, by name."""
    from . import OPERATIONS

    package = __package__
    return {name: importlib.import_module(f"{package}.{name}.triton").variants() for name in OPERATIONS}
