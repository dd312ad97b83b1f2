"""
What the kernels cost, on shapes of released models.

For each shape: the bytes that have to move and the operations that have to run, and from them the floor, the time below
which a chip cannot do it. On a machine with a GPU also the time of the kernel, of the reference, of the compiled reference,
and of the library that one would take instead, as far as it is installed, each with its share of the measured copy
bandwidth.

    python scripts/benchmark_kernels.py                    # floors on an A100, an H100 and an MI300X
    python scripts/benchmark_kernels.py --resources        # registers, shared memory, instructions; compiles, needs no GPU
    python scripts/benchmark_kernels.py --write-dispatch   # also writes where a kernel loses, so that "auto" leaves it out

What the last one writes are the bounds of this GPU's architecture in the package (see `hf_argen.kernels.bounds`): around
every shape at which the reference is faster, sizes from a half to twice its own. Plain code is measured against the plain
reference, compiled code against the compiled one. Bounds of other chips stay as they are.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BFLOAT16 = 2
FLOAT32 = 4
DEVICE = "cuda"
REACH = 2  # a measured shape speaks for sizes from its half to its double
EQUAL = 1.05  # times this far apart count as equal
REFERENCES = {"plain": "reference", "compiled": "compiled reference"}  # by the kind of code


@dataclass(frozen=True)
class Speed:
    """
    What a chip's maker promises.

    Attributes:
        bandwidth: bytes per second.
        matrix: bfloat16 matrix operations per second.
        scalar: float32 operations per second.
    """

    bandwidth: float
    matrix: float
    scalar: float


CHIPS = {
    "A100 80GB": Speed(2.039e12, 312e12, 19.5e12),
    "H100 SXM": Speed(3.35e12, 989e12, 67e12),
    "MI300X": Speed(5.3e12, 1307e12, 163e12),
}


@dataclass(frozen=True)
class Shape:
    """
    One use of an operation.

    Attributes:
        sizes: what the choice between kernel and reference goes by, see `hf_argen.kernels.bounds.SIZES`.
        moved: bytes that are read and written at least once.
        matrix, scalar: operations of matrix products and of others, at least.
        make: on a GPU: what makes the inputs and gives the ways of computing, by name; "kernel" and "reference" among them.
    """

    operation: str
    label: str
    sizes: dict[str, int]
    moved: int
    matrix: int
    scalar: int
    make: Callable[[], dict[str, Callable[[], Any]]]

    def floor(self, chip: Speed) -> tuple[float, str]:
        """Seconds, and what they go to."""
        times = {
            "memory": self.moved / chip.bandwidth,
            "matrix products": self.matrix / chip.matrix,
            "arithmetic": self.scalar / chip.scalar,
        }
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound


def in_both(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> dict[str, Callable[[], Any]]:
    """A call as kernel, as reference, and as compiled reference."""
    import torch

    from hf_argen.kernels import use

    def run(mode: str) -> Any:
        with use(mode):
            return function(*arguments, **keywords)

    def reference() -> Any:
        return function(*arguments, **keywords)

    compiled = torch.compile(reference)

    def compiled_reference() -> Any:
        with use("reference"):
            return compiled()

    return {
        "kernel": lambda: run("triton"),
        "reference": lambda: run("reference"),
        "compiled reference": compiled_reference,
    }


def adaln_shape(label: str, batch: int, tokens: int, hidden: int, per_token: bool) -> Shape:
    """Residual in, update in, residual out, normed out; three modulations."""
    rows = batch * tokens
    modulations = 3 * (rows if per_token else batch) * hidden

    def make() -> dict[str, Callable[[], Any]]:
        import torch

        from hf_argen.kernels.adaln import adaln

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

        gate, scale, shift = random(batch, tokens if per_token else 1, 3, hidden).unbind(2)
        states, update = random(2, batch, tokens, hidden)
        return in_both(adaln, states, scale, shift, update=update, gate=gate)

    sizes = {"rows": rows, "hidden": hidden}
    moved = (4 * rows * hidden + modulations) * BFLOAT16
    return Shape("adaln", label, sizes, moved, 0, 12 * rows * hidden, make)


def qk_shape(
    label: str, batch: int, heads: int, n: int, head_dim: int, norm: str | None, turned: bool
) -> Shape:
    """Queries, keys and values in and out; the tables of the rotation."""
    values = batch * heads * n * head_dim

    def make() -> dict[str, Callable[[], Any]]:
        import torch

        from hf_argen.kernels.qk_norm_rope import Rotation, Slot, qk_norm_rope

        states = torch.randn(3, batch, n, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        query, key, value = states.transpose(2, 3).unbind()
        keys, cached = torch.zeros(2, batch, heads, 1024 + n, head_dim, device=DEVICE, dtype=torch.bfloat16)
        angles = torch.randn(1, n, head_dim // 2, device=DEVICE)
        rotation = Rotation.of(angles.cos(), angles.sin()) if turned else None
        slot = Slot(keys, cached, None, 1024)
        return in_both(qk_norm_rope, query, key, value, norm=norm, rotation=rotation, slot=slot)

    tables = n * head_dim * FLOAT32 if turned else 0
    sizes = {"rows": batch * heads * n, "head_dim": head_dim}
    return Shape("qk_norm_rope", label, sizes, 6 * values * BFLOAT16 + tables, 0, 2 * values * 9, make)


def sample_shape(label: str, rows: int, vocab: int, guided: bool) -> Shape:
    """Logits and noise in; the search for the bounds stays on the chip."""
    inputs = 3 if guided else 2

    def make() -> dict[str, Callable[[], Any]]:
        import torch

        from hf_argen.kernels.sample_logits import sample_logits

        logits = torch.randn(inputs, rows, vocab, device=DEVICE) * 4
        noise = torch.empty_like(logits[0]).exponential_()
        other = {"unconditional": logits[1], "guidance": 3.0} if guided else {}
        ways = in_both(
            sample_logits, logits[0], noise, **other, temperature=0.9, top_k=min(2000, vocab), top_p=0.95
        )
        try:
            import flashinfer
        except ImportError:
            return ways
        probs = logits[0].softmax(dim=-1)
        ways["flashinfer, from probabilities"] = lambda: flashinfer.sampling.top_k_top_p_sampling_from_probs(
            probs, 2000, 0.95
        )
        return ways

    sizes = {"rows": rows, "vocab": vocab}
    return Shape("sample_logits", label, sizes, inputs * rows * vocab * FLOAT32, 0, 40 * rows * vocab, make)


def attention_shape(
    label: str, batch: int, heads: int, key_heads: int, n: int, past: int, head_dim: int, block: bool
) -> Shape:
    """The cache is read once, whatever the number of nodes."""
    moved = 2 * batch * key_heads * (past + n) * head_dim + 2 * batch * heads * n * head_dim

    def make() -> dict[str, Callable[[], Any]]:
        import torch
        import torch.nn.functional as F

        from hf_argen.kernels.tree_attention import pack, tree_attention

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

        query, (keys, values) = (
            random(batch, heads, n, head_dim),
            random(2, batch, key_heads, past + n, head_dim),
        )
        seen = torch.ones(n, n, dtype=torch.bool, device=DEVICE)
        seen = seen if block else seen.tril()
        starts = torch.full((batch,), past, device=DEVICE)
        ways = in_both(tree_attention, query, keys, values, starts, pack(seen[None]), n)
        mask = torch.cat([seen.new_ones(n, past), seen], dim=1)
        additive = torch.zeros(mask.shape, device=DEVICE, dtype=torch.bfloat16).masked_fill(~mask, -1e30)[
            None, None
        ]
        ways["sdpa"] = lambda: F.scaled_dot_product_attention(query, keys, values, additive, enable_gqa=True)
        return {**ways, "FlexAttention": flex(query, keys, values, mask), **flash(query, keys, values, block)}

    flops = 4 * batch * heads * n * (past + n) * head_dim
    sizes = {"key_heads": batch * key_heads, "nodes": n, "columns": past + n, "head_dim": head_dim}
    scalar = 5 * batch * heads * n * (past + n)
    return Shape("tree_attention", label, sizes, moved * BFLOAT16, flops, scalar, make)


def flex(query: Any, keys: Any, values: Any, mask: Any) -> Callable[[], Any]:
    """The same by PyTorch's FlexAttention, compiled."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch: Any, head: Any, node: Any, column: Any) -> Any:
        return mask[node, column]

    blocks = create_block_mask(visible, None, None, *mask.shape, device=DEVICE)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, keys, values, block_mask=blocks, enable_gqa=True)


def flash(query: Any, keys: Any, values: Any, block: bool) -> dict[str, Callable[[], Any]]:
    """The same by flash-attn, where it is installed; nodes see all columns, or those up to their own."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return {}
    query, keys, values = (one.transpose(1, 2).contiguous() for one in (query, keys, values))
    return {"flash-attn": lambda: flash_attn_func(query, keys, values, causal=not block).transpose(1, 2)}


def quantize_shape(label: str, count: int, size: int, channels: int) -> Shape:
    """Vectors and codes in, ids out."""

    def make() -> dict[str, Callable[[], Any]]:
        import torch

        from hf_argen.kernels.vector_quantize import nearest_codes

        vectors = torch.randn(count, channels, device=DEVICE)
        codes = torch.randn(size, channels, device=DEVICE)
        return in_both(nearest_codes, vectors, codes)

    moved = (count + size) * channels * FLOAT32 + count * 8
    sizes = {"rows": count, "codes": size, "channels": channels}
    # In float32 without matrix units, since ids have to be those of the reference.
    scalar = 2 * count * size * channels + 2 * count * size
    return Shape("vector_quantize", label, sizes, moved, 0, scalar, make)


def verify_shape(label: str, batch: int, n: int, vocab: int) -> Shape:
    """One rejection: the target twice, the draft's distribution, what is left out and in, the noise."""

    def make() -> dict[str, Callable[[], Any]]:
        import torch

        from hf_argen.kernels.verify_draft import verify_draft

        probs = torch.randn(2, batch, n + 1, vocab, device=DEVICE).softmax(dim=-1)
        tokens = torch.randint(vocab, (batch, n), device=DEVICE)
        noise = torch.empty(batch, vocab, device=DEVICE).exponential_()
        uniform = torch.rand(batch, n, device=DEVICE)
        return in_both(verify_draft, probs[0], tokens, probs[1, :, :n], uniform, noise)

    sizes = {"rows": batch, "nodes": n, "vocab": vocab}
    return Shape("verify_draft", label, sizes, 5 * batch * vocab * FLOAT32, 0, 6 * batch * vocab, make)


SHAPES = [
    adaln_shape("VAR-d30, last scale, 4 guided pictures", 8, 256, 1920, per_token=False),
    adaln_shape("RAR-XL, 1 token, 4 guided pictures", 8, 1, 1280, per_token=True),
    adaln_shape("RAR-XL, training, 32 pictures", 32, 258, 1280, per_token=True),
    qk_shape("VAR-d30, last scale, 4 guided pictures", 8, 30, 256, 64, "l2", turned=False),
    qk_shape("LlamaGen-XXL, 1 token, 4 guided pictures", 8, 24, 1, 64, None, turned=True),
    sample_shape("VAR-d30, last scale, 4 pictures", 4 * 256, 4096, guided=True),
    sample_shape("LlamaGen-XXL, 4 pictures", 4, 16_384, guided=True),
    sample_shape("language model, 8 rows", 8, 262_144, guided=False),
    attention_shape("LlamaGen-XXL, 1 token, 4 guided pictures", 8, 24, 24, 1, 575, 64, block=False),
    attention_shape("VAR-d30, last scale, 4 guided pictures", 8, 30, 30, 256, 424, 64, block=True),
    attention_shape("EAGLE tree of 64 on an 8B model, 8192 places", 1, 32, 8, 64, 8192, 128, block=False),
    quantize_shape("VAR, last scale, 8 pictures", 8 * 256, 4096, 32),
    quantize_shape("LlamaGen, 8 pictures", 8 * 256, 16_384, 8),
    verify_shape("EAGLE chain of 8 on an 8B model, 4 rows", 4, 8, 128_256),
]


def row(*cells: Any) -> None:
    """Prints one line of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_floors() -> None:
    """What has to be done, and how long that takes at least."""
    row("operation", "shape", "MB moved", "GFLOP", *(f"floor on {name}, µs" for name in CHIPS), "bound by")
    row(*["---"] * (5 + len(CHIPS)))
    for shape in SHAPES:
        floors = [shape.floor(chip) for chip in CHIPS.values()]
        times = [f"{1e6 * seconds:.1f}" for seconds, _ in floors]
        bounds = ", ".join(sorted({bound for _, bound in floors}))
        work = (shape.matrix + shape.scalar) / 1e9
        row(shape.operation, shape.label, f"{shape.moved / 1e6:.2f}", f"{work:.2f}", *times, bounds)


@dataclass(frozen=True)
class Measured:
    """Seconds that a shape took, by way."""

    shape: Shape
    times: dict[str, float]

    def loses(self, reference: str) -> bool:
        """Whether the kernel is slower than a reference."""
        return self.times["kernel"] > EQUAL * self.times[reference]


def losing_bounds(measured: list[Measured], reference: str) -> dict[str, list[dict[str, list[int]]]]:
    """
    By operation, the bounds within which a reference is faster: around each shape at which it is, as far as `REACH`, and no
    farther than the shape itself where that would take in one at which the kernel is faster.
    """
    from hf_argen.kernels.bounds import holds

    found: dict[str, list[dict[str, list[int]]]] = {}
    for one in measured:
        if not one.loses(reference):
            continue
        operation, sizes = one.shape.operation, one.shape.sizes
        others = [other for other in measured if other.shape.operation == operation]
        winners = [other.shape.sizes for other in others if not other.loses(reference)]
        around = {name: [-(-size // REACH), size * REACH] for name, size in sizes.items()}
        alone = {name: [size, size] for name, size in sizes.items()}
        box = next((box for box in (around, alone) if not any(holds(box, one) for one in winners)), None)
        if box is None:
            print(f"{operation}, {one.shape.label}: another form of these sizes takes the kernel, so all do.")
        else:
            found.setdefault(operation, []).append(box)
    return found


def write_bounds(measured: list[Measured], chip: str, facts: dict[str, str], path: Path) -> None:
    """Writes the bounds of a chip into a table, in place of older ones; the file is whole at any time."""
    from hf_argen.storage import write_whole

    table = json.loads(path.read_text(encoding="utf-8"))
    bounds = {kind: losing_bounds(measured, reference) for kind, reference in REFERENCES.items()}
    table[chip] = {"measured": facts, **bounds}
    text = json.dumps(dict(sorted(table.items())), indent=1) + "\n"
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))


def print_times(rounds: int) -> list[Measured]:
    """Medians of the ways to compute each shape, in turn, and which share of the copy bandwidth each reaches."""
    import torch
    from triton.testing import do_bench

    memory = torch.empty(2**28, device=DEVICE)
    bandwidth = 2 * memory.nbytes / (1e-3 * do_bench(memory.clone, return_mode="median"))
    print(f"\n{torch.cuda.get_device_name()}: copies {bandwidth / 1e12:.2f} TB/s\n")
    row("operation", "shape", "way", "µs", "of the kernel", "of the copy bandwidth")
    row(*["---"] * 6)
    measured = []
    for shape in SHAPES:
        times = {
            name: do_bench(call, rep=rounds, return_mode="median") * 1e-3
            for name, call in shape.make().items()
        }
        for name, seconds in times.items():
            share = f"{100 * shape.moved / seconds / bandwidth:.0f} %"
            ratio = f"{seconds / times['kernel']:.2f}"
            row(shape.operation, shape.label, name, f"{1e6 * seconds:.1f}", ratio, share)
        measured.append(Measured(shape, times))
    return measured


def write_dispatch(measured: list[Measured], path: Path) -> None:
    """Writes what was measured on this machine's GPU."""
    import torch
    import triton

    from hf_argen.kernels.bounds import chip_of

    device = torch.cuda.current_device()
    facts = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    write_bounds(measured, chip_of(device), facts, path)
    print(f"\nWrote the bounds of {chip_of(device)} to {path}.")


def print_resources() -> None:
    """What every compiled form takes of each chip."""
    from hf_argen.kernels.variants import CHIPS as TARGETS
    from hf_argen.kernels.variants import all_variants, compiled, instructions, usage

    row("operation", "form", *(f"{target}: {chip.name}" for target, chip in TARGETS.items()))
    row(*["---"] * (2 + len(TARGETS)))
    for operation, variants in all_variants().items():
        for variant in variants:
            cells = []
            for chip in TARGETS.values():
                kernel = compiled(variant, chip)
                taken = usage(kernel)
                spilled = f", {taken.spilled} spilled" if taken.spilled else ""
                cells.append(f"{taken.shared_memory}, {taken.registers}, {instructions(kernel)}{spilled}")
            row(f"`{operation}`", variant.label, *cells)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--resources", action="store_true", help="compile for chips and print what kernels take"
    )
    parser.add_argument(
        "--write-dispatch",
        nargs="?",
        type=Path,
        const=True,
        metavar="FILE",
        help="on a GPU: write where the reference is faster, into the package or another table",
    )
    parser.add_argument("--rounds", type=int, default=100, help="milliseconds to measure each way")
    options = parser.parse_args(arguments)
    if options.resources:
        if os.environ.get("TRITON_INTERPRET") == "1":
            sys.exit("TRITON_INTERPRET is 1, but kernels have to be compiled; unset it.")
        print_resources()
        return
    import torch

    if options.write_dispatch and not torch.cuda.is_available():
        sys.exit(
            "--write-dispatch measures kernels, but torch finds no GPU; run it on a machine that has one."
        )
    print_floors()
    if torch.cuda.is_available():
        measured = print_times(options.rounds)
        if options.write_dispatch:
            from hf_argen.kernels.bounds import PATH

            write_dispatch(measured, PATH if options.write_dispatch is True else options.write_dispatch)


if __name__ == "__main__":
    main()
