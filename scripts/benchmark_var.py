"""
Time and memory of VAR against the authors' code: random weights, the same in both, whole pictures, guidance on.

On a CPU VAR-d16 in float32 and bfloat16, 1 and 4 pictures at once; on a GPU VAR-d30 in bfloat16, 8 at once, plain, by
`torch.compile`, and with CUDA graphs. Printed are ratios, the time of each part, and which share of the machine's
measured matrix rate is reached. Without --reference, a checkout of github.com/FoundationVision/VAR, only our times.

    python scripts/benchmark_var.py --reference ../VAR
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import benchmarking
import torch
from benchmarking import Side

SAMPLING = {"top_k": 900, "top_p": 0.95}
GUIDANCE = 4.0
MODES = {"": None, ", compiled": "default", ", CUDA graphs": "reduce-overhead"}


def load_theirs(reference: Path, options: argparse.Namespace, folder: Path | None) -> tuple[Any, Any]:
    """Their tokenizer and transformer, with the weights in `folder` or, where there is none, random ones."""
    sys.path.insert(0, str(reference))
    from models import build_vae_var

    # Their builder switches the initialisation of layers off for good, to save time before a checkpoint is loaded.
    layers = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm)
    kept = [layer.reset_parameters for layer in layers]
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer, transformer = build_vae_var(options.device, depth=options.depth, ch=options.base_channels)
    for layer, method in zip(layers, kept, strict=True):
        layer.reset_parameters = method
    if folder is None:
        for module in tokenizer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    else:
        for model, name in ((tokenizer, "tokenizer"), (transformer, "transformer")):
            weights = torch.load(folder / f"{name}.pth", mmap=True, map_location=options.device)
            model.load_state_dict(weights, assign=True)
    return tokenizer.eval(), transformer.eval()


def theirs(options: argparse.Namespace, folder: Path) -> Side:
    """The authors' side: float32, on a GPU autocast to bfloat16."""
    tokenizer, transformer = load_theirs(options.reference, options, folder)
    on_gpu = options.device == "cuda"

    def draw(labels: torch.Tensor, seed: int) -> torch.Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=on_gpu):
            return transformer.autoregressive_infer_cfg(
                len(labels), labels, g_seed=seed, cfg=GUIDANCE, **SAMPLING
            )

    blocks = [(block, "forward") for block in transformer.blocks]
    parts = {"blocks": blocks, "pixels": [(tokenizer, "fhat_to_img")]}
    return Side("authors", torch.bfloat16 if on_gpu else torch.float32, draw, parts)


def ours(options: argparse.Namespace, folder: Path, dtype: torch.dtype, mode: str = "") -> Side:
    """Our side; `mode` is one of `MODES`."""
    from hf_argen import VarForImageGeneration

    model = VarForImageGeneration.from_pretrained(folder, dtype=dtype).eval().to(options.device)
    if MODES[mode] is not None:
        torch._dynamo.config.recompile_limit = 64  # every scale has shapes of its own
        model.model.compile(mode=MODES[mode], dynamic=False)

    def draw(labels: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator(options.device).manual_seed(seed)
        return model.generate(
            labels,
            guidance_scale=GUIDANCE,
            do_sample=True,
            generator=generator,
            return_dict_in_generate=True,
            **SAMPLING,
        ).images

    # A compiled module is not called through `forward`; there the head counts as blocks.
    blocks = (model.model, "forward") if MODES[mode] is None else (model, "scale_logits")
    parts = {"blocks": [blocks], "pixels": [(model, "decode_partly")]}
    return Side(f"ours, {str(dtype).removeprefix('torch.')}{mode}", dtype, draw, parts)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Writes the random model: ours, and with --reference the same weights in the authors' format."""
    if benchmarking.is_prepared(options, folder):
        return
    torch.manual_seed(0)
    if options.reference is None:
        from hf_argen import MultiScaleVQConfig, VarConfig, VarForImageGeneration

        tokenizer = MultiScaleVQConfig(base_channels=options.base_channels)
        config = VarConfig(
            image_tokenizer_config=tokenizer,
            hidden_size=64 * options.depth,
            num_hidden_layers=options.depth,
            num_attention_heads=options.depth,
            intermediate_size=256 * options.depth,
        )
        VarForImageGeneration(config).save_pretrained(folder)
        return
    from hf_argen import convert_original

    files = benchmarking.save_theirs(load_theirs(options.reference, options, None), folder)
    convert_original("var", files).save_pretrained(folder)


def sides(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Name and loader of every side, the authors' first."""
    found: list[tuple[str, Any]] = []
    if options.reference is not None:
        found.append(("authors", lambda folder: theirs(options, folder)))
    modes = list(MODES) if options.device == "cuda" else [""]
    for name in options.dtype:
        for mode in modes:
            dtype = getattr(torch, name)
            found.append(
                (
                    f"ours, {name}{mode}",
                    lambda folder, dtype=dtype, mode=mode: ours(options, folder, dtype, mode),
                )
            )
    return found + benchmarking.mkl_sides(options, lambda *given: ours(*given, ""))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Prints everything."""
    found = sides(options)
    if not options.no_memory and options.device == "cpu":
        benchmarking.measure_peaks(options, folder, [name for name, _ in found])
    if options.no_time:
        return
    loaded = [load(folder) for _, load in found]
    rates = benchmarking.Rates.measure(options.device, sorted({side.dtype for side in loaded}, key=str))
    for batch in options.batch:
        labels = torch.arange(batch, device=options.device) % 1000
        benchmarking.report(f"VAR-d{options.depth}", loaded, labels, rates, options)
    if options.reference is not None and options.device == "cpu":
        benchmarking.same_pictures(loaded[0], loaded[1], torch.arange(1))


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = benchmarking.parser(__doc__, [8] if on_gpu else [1, 4])
    parser.add_argument("--depth", type=int, default=30 if on_gpu else 16, help="layers of the transformer")
    parser.add_argument("--base-channels", type=int, default=160, help="width of the image tokenizer")
    if on_gpu:
        parser.set_defaults(dtype=["bfloat16"])
    benchmarking.run(parser.parse_args(), prepare, measure, sides)


if __name__ == "__main__":
    main()
