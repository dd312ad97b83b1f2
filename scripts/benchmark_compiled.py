"""
Eager against compiled steps: `generate` with and without `compile_config`, whole pictures with pixels, guidance on, random
weights, in turn in one process.

Printed are, for each family and batch, the time of a picture, the ratio to eager, and what the first compiled picture
takes, in which everything is compiled. With "speculative", a LlamaGen of a quarter of the layers drafts for the other.

    python scripts/benchmark_compiled.py --layers 4
    python scripts/benchmark_compiled.py --family var llamagen --batch 1
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_llamagen
import benchmark_mar
import benchmark_var
import benchmarking
import torch
from benchmarking import Side, in_turn, seconds
from transformers.utils import logging as transformers_logging

FAMILIES = ("var", "llamagen", "mar", "speculative")


def load(name: str, options: argparse.Namespace, layers: int, folder: Path) -> Any:
    """A random model of the shape that the family's own benchmark has."""
    from hf_argen import AutoModelForImageGeneration

    own = {"var": benchmark_var, "mar": benchmark_mar}.get(name, benchmark_llamagen)
    shape = argparse.Namespace(
        reference=None,
        model="B",
        layers=layers,
        depth=layers,
        base_channels=160,
        head_steps=options.head_steps,
    )
    folder = folder / f"{name}-{layers}"
    own.prepare(shape, folder)
    dtype = getattr(torch, options.dtype)
    return AutoModelForImageGeneration.from_pretrained(folder, dtype=dtype).eval().to(options.device)


def request(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a family's `generate` is given beside the classes."""
    from hf_argen import Masked, SpeculativeDecoding

    if name == "var":
        return {"guidance_scale": benchmark_var.GUIDANCE, "do_sample": True, **benchmark_var.SAMPLING}
    if name == "mar":
        return {"guidance_scale": benchmark_mar.GUIDANCE, "decoding": Masked(num_steps=options.steps)}
    own = {
        "guidance_scale": benchmark_llamagen.GUIDANCE,
        "do_sample": True,
        "top_k": benchmark_llamagen.TOP_K,
    }
    if name == "llamagen":
        return own
    drafter = load("llamagen", options, max(options.layers // 4, 1), folder)
    return {**own, "decoding": SpeculativeDecoding(drafter=drafter)}


def side(name: str, model: Any, options: argparse.Namespace, more: dict[str, Any]) -> Side:
    """One way of drawing."""

    def draw(labels: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator(options.device).manual_seed(seed)
        return model.decode_images(model.generate(labels, generator=generator, **more))

    return Side(name, getattr(torch, options.dtype), draw, {})


def measure(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Prints the table of a family."""
    from transformers import CompileConfig

    model = load("llamagen" if name == "speculative" else name, options, options.layers, folder)
    more = request(name, options, folder)
    compiled = {**more, "compile_config": CompileConfig(backend=options.backend, mode=options.mode)}
    sides = [side("eager", model, options, more), side("compiled", model, options, compiled)]
    rows = []
    for batch in options.batch:
        labels = torch.arange(batch, device=options.device)
        first = seconds(lambda labels=labels: sides[1].draw(labels, 0))
        timings = in_turn(sides, labels, options.rounds)
        for one in sides:
            timing = timings[one.name]
            rows.append(
                [
                    batch,
                    one.name,
                    f"{statistics.median(timing.total):.2f} s",
                    f"{timing.over(timings['eager']):.2f}",
                    f"{first:.0f} s" if one.name == "compiled" else "",
                ]
            )
    benchmarking.table(
        f"{name}, {options.layers} layers, {options.dtype}: median of {options.rounds} rounds.",
        ["pictures", "side", "time", "of eager", "first time"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--family", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    add("--batch", type=int, nargs="+", default=[1, 4], help="pictures that are drawn at once")
    add("--layers", type=int, default=12, help="of the transformer; for VAR also a sixty-fourth of its width")
    add("--steps", type=int, default=16, help="sets of tokens that MAR draws")
    add("--head-steps", type=int, default=25, help="diffusion steps of MAR's head")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--backend", default="inductor", help="of torch.compile")
    add("--mode", default="reduce-overhead", help="of Inductor; this one records CUDA graphs")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=os.cpu_count())
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    transformers_logging.disable_progress_bar()
    benchmarking.report_machine(options)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.family:
            measure(name, options, Path(folder))


if __name__ == "__main__":
    main()
