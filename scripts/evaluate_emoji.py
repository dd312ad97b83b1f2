"""
The emoji yardstick: does a model draw the emoji that it was asked for?

Over 300 random emoji, the share of pictures whose nearest rendered emoji is the one asked for, once by Unicode name and
once by a caption that training never saw; and the mean PSNR of the whole set through the image tokenizer.

    python scripts/evaluate_emoji.py [MODEL] [--font NotoColorEmoji.ttf]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_argen.data.emoji import EmojiSet, accuracy, psnr


@dataclass
class Yardstick:
    """
    Attributes:
        by_name, by_held_out: accuracy in [0, 1].
        psnr: mean over the pictures of the set, dB.
        count: prompts of each kind.
    """

    by_name: float
    by_held_out: float
    psnr: float
    count: tuple[int, int]

    def table(self) -> str:
        """The three numbers as a Markdown table."""
        return (
            "| measure | value |\n| --- | --- |\n"
            f"| accuracy by Unicode name ({self.count[0]} prompts) | {self.by_name:.1%} |\n"
            f"| accuracy by held-out caption ({self.count[1]} prompts) | {self.by_held_out:.1%} |\n"
            f"| reconstruction PSNR, mean per picture | {self.psnr:.2f} dB |"
        )


@torch.no_grad()
def reconstruct(tokenizer: Any, pixel_values: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Pictures (n, 3, height, width) in [-1, 1] through an image tokenizer, in [0, 1], float32."""
    was_training = tokenizer.training
    tokenizer.eval()
    batches = [
        tokenizer.reconstruct(batch.to(tokenizer.device)).float().cpu()
        for batch in pixel_values.split(batch_size)
    ]
    tokenizer.train(was_training)
    return torch.cat(batches).add(1).mul(0.5)


@torch.no_grad()
def draw(
    model: Any, processor: Any, prompts: list[str], seed: int = 0, batch_size: int = 50, **options: Any
) -> torch.Tensor:
    """
    One picture per prompt, (n, 3, height, width) in [0, 1]. Each has a generator of its own.

    Args:
        options: for `model.generate`, in place of what the model's generation configuration says.
    """
    pictures = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="drawing", leave=False):
        chunk = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        ids = model.generate(**processor(chunk).to(model.device), generator=generators, **options)
        pictures.append(model.decode_images(ids).cpu())
    return torch.cat(pictures)


def evaluate(
    model: Any, processor: Any, emoji: EmojiSet, count: int = 300, seed: int = 0, **options: Any
) -> Yardstick:
    """The yardstick of a text-conditional model; `options` go to `model.generate`."""
    accuracies, counts = [], []
    for held_out in (False, True):
        targets, prompts = emoji.prompts(held_out=held_out, count=count, seed=seed)
        pictures = draw(model, processor, prompts, seed, **options)
        accuracies.append(accuracy(pictures, targets, emoji.font))
        counts.append(len(prompts))
    pixel_values = emoji.pixel_values()
    quality = psnr(
        reconstruct(model.image_tokenizer, pixel_values), pixel_values.add(1).mul(0.5), value_range=1.0
    )
    return Yardstick(*accuracies, quality.mean().item(), tuple(counts))


def main() -> None:
    from transformers import AutoProcessor

    from hf_argen import AutoModelForImageGeneration
    from hf_argen.assets import default_model

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or Hub repository; default: the shipped model")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, where it is not found by itself")
    parser.add_argument("--count", type=int, default=300, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    source = options.model or str(default_model())
    model = AutoModelForImageGeneration.from_pretrained(source, dtype=options.dtype).eval()
    processor = AutoProcessor.from_pretrained(source)
    emoji = EmojiSet.load(processor.image_size[0], font=options.font)
    print(evaluate(model, processor, emoji, options.count, options.seed).table())


if __name__ == "__main__":
    main()
