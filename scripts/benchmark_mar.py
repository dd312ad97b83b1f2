"""
Time and memory of MAR against the authors' code: random weights, the same in both, whole pictures with pixels, 256x256,
guidance on.

Printed are ratios and the time of transformer, head and pixels. Without --reference, a checkout of github.com/LTH14/mar, whose
code needs timm and scipy, only our times. Ours in bfloat16 has its head in float32.

    python scripts/benchmark_mar.py --reference ../mar
    python scripts/benchmark_mar.py --reference ../mar --steps 64 --head-steps 100 --batch 1 --rounds 1
"""

import argparse
import contextlib
import io
import sys
from functools import partial
from pathlib import Path
from typing import Any

import benchmarking
import numpy as np
import torch
from benchmarking import Side

SIZES = {"B": (768, 12, 12, 6, 1024), "L": (1024, 16, 16, 8, 1280), "H": (1280, 20, 16, 12, 1536)}
GUIDANCE = 2.9
SCALE = 0.2325


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """Width, layers of encoder and decoder, heads, depth and width of the head, in the authors' words."""
    width, depth, heads, head_depth, head_width = SIZES[options.model]
    depth = options.layers or depth
    return {
        "encoder_embed_dim": width,
        "encoder_depth": depth,
        "encoder_num_heads": heads,
        "decoder_embed_dim": width,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "diffloss_d": options.layers or head_depth,
        "diffloss_w": head_width,
        "num_sampling_steps": str(options.head_steps),
    }


def load_theirs(reference: Path, options: argparse.Namespace, folder: Path | None) -> tuple[Any, Any]:
    """Their autoencoder and transformer, with the weights in `folder` or, where there is none, random ones."""
    sys.path.insert(0, str(reference))
    if options.device == "cpu":
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # they send every tensor to a GPU
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        from models.mar import MAR
        from models.vae import AutoencoderKL

        tokenizer = AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4))
        transformer = MAR(norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), **shape(options))
    if folder is None:
        randomize(transformer.diffloss)
    else:
        for model, name in ((tokenizer, "tokenizer"), (transformer, "transformer")):
            model.load_state_dict(torch.load(folder / f"{name}.pth", mmap=True)["model"], assign=True)
    return tokenizer.eval().to(options.device), transformer.eval().to(options.device)


def randomize(head: torch.nn.Module) -> None:
    """A new head answers zero, whatever it is asked."""
    with torch.no_grad():
        for parameter in head.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def theirs(options: argparse.Namespace, folder: Path) -> Side:
    """The authors' side: float32, on a GPU autocast to float16, as in their evaluation."""
    tokenizer, transformer = load_theirs(options.reference, options, folder)
    on_gpu = options.device == "cuda"

    def latents(labels: torch.Tensor, steps: int) -> torch.Tensor:
        with torch.autocast(options.device, torch.float16, enabled=on_gpu):
            return transformer.sample_tokens(len(labels), steps, GUIDANCE, "linear", labels)

    def draw(labels: torch.Tensor, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        np.random.seed(seed)
        found = latents(labels, options.steps)
        with torch.autocast(options.device, torch.float16, enabled=on_gpu):
            return tokenizer.decode(found / SCALE).clamp(-1, 1).add(1).mul(0.5)

    parts = {
        "transformer": [(transformer, "forward_mae_encoder"), (transformer, "forward_mae_decoder")],
        "head": [(transformer.diffloss, "sample")],
        "pixels": [(tokenizer, "decode")],
    }
    return Side("authors", torch.float16 if on_gpu else torch.float32, draw, parts, step=latents)


def ours(options: argparse.Namespace, folder: Path, dtype: torch.dtype) -> Side:
    """Our side."""
    from hf_argen import MarForImageGeneration, Masked

    model = MarForImageGeneration.from_pretrained(folder, dtype=dtype).eval().to(options.device)
    model.head.num_sampling_steps = options.head_steps  # a kept folder may have others

    def latents(labels: torch.Tensor, steps: int) -> torch.Tensor:
        decoding = Masked(num_steps=steps, order="numpy")
        return model.generate(labels, guidance_scale=GUIDANCE, decoding=decoding)

    def draw(labels: torch.Tensor, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        np.random.seed(seed)
        return model.decode_images(latents(labels, options.steps))

    parts = {
        "transformer": [(model.model, "forward")],
        "head": [(model.head, "sample")],
        "pixels": [(model, "decode_images")],
    }
    return Side(f"ours, {str(dtype).removeprefix('torch.')}", dtype, draw, parts, step=latents)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Writes the random model: ours, and with --reference the same weights in the authors' format."""
    if benchmarking.is_prepared(options, folder):
        return
    if options.reference is None:
        from hf_argen import MarConfig, MarForImageGeneration

        given = shape(options)
        torch.manual_seed(0)
        config = MarConfig(
            hidden_size=given["encoder_embed_dim"],
            num_hidden_layers=given["encoder_depth"],
            num_attention_heads=given["encoder_num_heads"],
            intermediate_size=4 * given["encoder_embed_dim"],
            head_config={
                "type": "diffusion",
                "width": given["diffloss_w"],
                "depth": given["diffloss_d"],
                "num_sampling_steps": options.head_steps,
            },
        )
        model = MarForImageGeneration(config)
        randomize(model.head)
        model.save_pretrained(folder)
        return
    from hf_argen import convert_original

    files = benchmarking.save_theirs(load_theirs(options.reference, options, None), folder, "model")
    convert_original("mar", files, {"transformer": shape(options)}).save_pretrained(folder)


def sides(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Name and loader of every side, the authors' first."""
    return benchmarking.sides(options, theirs, ours)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Prints everything."""
    found = sides(options)
    if not options.no_memory:
        benchmarking.measure_peaks(options, folder, [name for name, _ in found])
    if options.no_time:
        return
    loaded = [load(folder) for _, load in found]
    rates = benchmarking.Rates.measure(options.device, sorted({side.dtype for side in loaded}, key=str))
    title = f"MAR-{options.model}, {options.steps} steps of {options.head_steps} each"
    for batch in options.batch:
        labels = torch.arange(batch, device=options.device)
        benchmarking.report(title, loaded, labels, rates, options)
    if options.reference is not None:
        benchmarking.same_pictures(loaded[0], loaded[1], torch.arange(1, device=options.device))


def main() -> None:
    parser = benchmarking.parser(__doc__, [1, 4])
    parser.add_argument("--model", default="B", choices=SIZES, help="size of the model")
    parser.add_argument("--steps", type=int, default=16, help="sets of tokens")
    parser.add_argument("--head-steps", type=int, default=25, help="diffusion steps of the head")
    parser.add_argument("--layers", type=int, help="fewer layers than that size has, for a trial")
    benchmarking.run(parser.parse_args(), prepare, measure, sides)


if __name__ == "__main__":
    main()
