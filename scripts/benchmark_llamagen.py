"""
Time and memory of LlamaGen against the authors' code: random weights, the same in both, whole pictures with pixels,
256x256, guidance on.

Printed are ratios, the time of each part, and of one token the share of the measured memory bandwidth at which weights
are read, and what is not matrix work. Without --reference, a checkout of github.com/FoundationVision/LlamaGen, only our
times.

    python scripts/benchmark_llamagen.py --reference ../LlamaGen
"""

import argparse
import contextlib
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import benchmarking
import torch
from benchmarking import Side

SIZES = {"B": (12, 12, 768), "L": (24, 16, 1024)}  # layers, heads, width
TOP_K = 2000
GUIDANCE = 4.0
STEPS = 32  # tokens of which the cost of one is measured


def shape(options: argparse.Namespace) -> dict[str, int]:
    """Layers, heads and width, in the authors' words."""
    layers, heads, width = SIZES[options.model]
    return {"n_layer": options.layers or layers, "n_head": heads, "dim": width}


def load_theirs(reference: Path, options: argparse.Namespace, folder: Path | None) -> tuple[Any, Any]:
    """Their tokenizer and transformer, with the weights in `folder` or, where there is none, random ones."""
    sys.path.insert(0, str(reference))
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        from autoregressive.models.gpt import ModelArgs, Transformer
        from tokenizer.tokenizer_image.vq_model import VQ_models

        tokenizer = VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8)
        transformer = Transformer(ModelArgs(block_size=256, **shape(options)))
    if folder is None:
        torch.nn.init.normal_(transformer.output.weight, std=0.02)  # theirs starts with all logits equal
    else:
        for model, name in ((tokenizer, "tokenizer"), (transformer, "transformer")):
            weights = torch.load(folder / f"{name}.pth", mmap=True)
            model.load_state_dict(weights["model"], strict=False, assign=True)
    return tokenizer.eval(), transformer.eval()


def theirs(options: argparse.Namespace, folder: Path) -> Side:
    """The authors' side, float32."""
    tokenizer, transformer = load_theirs(options.reference, options, folder)
    from autoregressive.models.generate import generate

    def step(labels: torch.Tensor, tokens: int, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the deprecated switch of attention kernels, at every token
            return generate(
                transformer, labels, tokens, cfg_scale=GUIDANCE, temperature=1.0, top_k=TOP_K, top_p=1.0
            )

    def draw(labels: torch.Tensor, seed: int) -> torch.Tensor:
        ids = step(labels, 256, seed)
        pixels = tokenizer.decode_code(ids, [len(labels), 8, 16, 16])
        return pixels.clamp(-1, 1).add(1).mul(0.5)

    parts = {
        "blocks": [(layer, "forward") for layer in transformer.layers],
        "pixels": [(tokenizer, "decode_code")],
    }
    return Side("authors", torch.float32, draw, parts, bytes_per_token(transformer, "embedding"), step)


def bytes_per_token(model: torch.nn.Module, *left_out: str) -> int:
    """Size of the weights that every token reads: all but those whose name contains one of these."""
    left_out = ("embedd", "image_tokenizer", "embed_tokens", *left_out)
    named = model.named_parameters()
    return sum(weight.nbytes for name, weight in named if not any(part in name for part in left_out))


def ours(options: argparse.Namespace, folder: Path, dtype: torch.dtype) -> Side:
    """Our side."""
    from hf_argen import LlamaGenForImageGeneration

    model = LlamaGenForImageGeneration.from_pretrained(folder, dtype=dtype).eval()

    def generate(labels: torch.Tensor, seed: int, **more: Any) -> Any:
        torch.manual_seed(seed)
        return model.generate(labels, guidance_scale=GUIDANCE, do_sample=True, top_k=TOP_K, top_p=1.0, **more)

    def draw(labels: torch.Tensor, seed: int) -> torch.Tensor:
        return model.decode_images(generate(labels, seed))

    def step(labels: torch.Tensor, tokens: int) -> torch.Tensor:
        return generate(labels, 0, max_new_tokens=tokens)

    parts = {"blocks": [(model.model, "forward")], "pixels": [(model, "decode_images")]}
    name = f"ours, {str(dtype).removeprefix('torch.')}"
    return Side(name, dtype, draw, parts, bytes_per_token(model), step)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Writes the random model: ours, and with --reference the same weights in the authors' format."""
    if benchmarking.is_prepared(options, folder):
        return
    if options.reference is None:
        from hf_argen import LlamaGenConfig, LlamaGenForImageGeneration, LlamaGenVQConfig

        given = shape(options)
        torch.manual_seed(0)
        config = LlamaGenConfig(
            image_tokenizer_config=LlamaGenVQConfig(),
            hidden_size=given["dim"],
            num_hidden_layers=given["n_layer"],
            num_attention_heads=given["n_head"],
            intermediate_size=-(-(8 * given["dim"] // 3) // 256) * 256,
        )
        model = LlamaGenForImageGeneration(config)
        torch.nn.init.normal_(model.head.out_proj.weight, std=0.02)  # a new model's logits are all equal
        model.save_pretrained(folder)
        return
    from hf_argen import convert_original

    files = benchmarking.save_theirs(load_theirs(options.reference, options, None), folder, "model")
    convert_original("llamagen", files).save_pretrained(folder)


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
    rates = benchmarking.Rates.measure("cpu", sorted({side.dtype for side in loaded}, key=str))
    for batch in options.batch:
        labels = torch.arange(batch)
        benchmarking.report(f"LlamaGen-{options.model}", loaded, labels, rates, options)
        benchmarking.step_table(loaded, labels, STEPS, rates)
    if options.reference is not None:
        benchmarking.same_pictures(loaded[0], loaded[1], torch.arange(1))


def main() -> None:
    parser = benchmarking.parser(__doc__, [1, 4])
    parser.set_defaults(device="cpu")
    parser.add_argument("--model", default="B", choices=SIZES, help="size of the transformer")
    parser.add_argument("--layers", type=int, help="fewer layers than that size has, for a trial")
    benchmarking.run(parser.parse_args(), prepare, measure, sides)


if __name__ == "__main__":
    main()
