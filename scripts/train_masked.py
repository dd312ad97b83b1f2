"""
Trains the small masked models of continuous tokens on which heads and decodings are measured: pictures of emoji, 64x64,
drawn from words, several tokens at a time.

First a KL autoencoder of 8x8 latents on the 1,391 rendered emoji, which all share; then a text-conditional MAR on its
latents and the captions of `hf_argen.data.emoji`, with the head that is asked for. Heads other than `diffusion` learn
alone, on the transformer that was trained with it, where OUTPUT/emoji-mar-diffusion exists. `drafter` is a smaller
transformer with a smaller diffusion head, to draft for that model. A checkpoint is written every few minutes; a run that
was killed goes on from the last one when the same command is given again, and ends as it would have without the kill.
Sheets of reconstructions and of drawn prompts are written beside the checkpoints while it trains.

    python scripts/train_masked.py diffusion --text-encoder checkpoints/emoji-rar --output runs/emoji-masked
    python scripts/train_masked.py flow --output runs/emoji-masked

The results are the folders OUTPUT/emoji-mar-HEAD, each with `sheet.png`.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from emoji_training import (
    DATA,
    PROMPTS,
    AutoencoderTrainer,
    Stage,
    begin,
    begin_with_encoder,
    finish_run,
    lasting,
    parser,
    prompt_processor,
    sheet,
    text_encoder,
    train_generator,
    train_tokenizer,
)
from evaluate_emoji import Yardstick, draw
from transformers import PreTrainedModel

from hf_argen import (
    KlVaeConfig,
    KlVaeModel,
    LlamaGenProcessor,
    MarConfig,
    MarForImageGeneration,
    Masked,
)
from hf_argen.data.emoji import EmojiSet, to_uint8
from hf_argen.processors.base import ImageGenerationProcessor
from hf_argen.storage import write_whole

TOKENIZER = {
    "latent_channels": 16,
    "base_channels": 16,
    "channel_multiplier": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "encoder_attention_levels": [3],
    "norm_num_groups": 8,
    "grid_size": 8,
    "kl_loss_weight": 1e-5,
}
MAR = {
    "condition_type": "text",
    "text_embed_dim": 128,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "num_buffer_tokens": 8,
}
TEXT_ENCODER = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 1,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
# Steps with a stride leave out the last one of the training process. A step back from there multiplies errors by several
# hundred, so that small diffusion heads, which are trained for some thousand steps, lead nowhere.
HEADS: dict[str, dict[str, Any]] = {
    "diffusion": {"width": 256, "depth": 2, "num_sampling_steps": "ddim50", "batch_multiplier": 4},
    "flow": {"width": 256, "depth": 2, "num_sampling_steps": 16, "solver": "heun", "batch_multiplier": 4},
    "shortcut": {"width": 256, "depth": 2, "num_sampling_steps": 4, "batch_multiplier": 4},
    "mixture": {"width": 192, "depth": 1, "num_heads": 4, "num_components": 4, "num_candidates": 100},
    "energy": {"width": 256, "depth": 2, "batch_multiplier": 2},
    "drafter": {
        "type": "diffusion",
        "width": 128,
        "depth": 2,
        "num_sampling_steps": "ddim50",
        "batch_multiplier": 4,
    },
}
DRAFTER = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
}  # of a drafter, whose head is smaller, too
SAMPLING = {"do_sample": True, "guidance_scale": 3.0, "temperature": 1.0}
DECODING = {"type": "masked", "num_steps": 16}

TOKENIZER_STAGE = Stage(epochs=40, learning_rate=1.4e-3, warmup_steps=200, weight_decay=0.0, batch_size=8)
STAGE = Stage(epochs=120, learning_rate=2e-3, warmup_steps=100, weight_decay=0.02, batch_size=32, muon=True)
LATER_STAGE = lasting(STAGE, 40)  # of heads on a trained transformer


def build_tokenizer() -> KlVaeModel:
    """The autoencoder before its training."""
    return KlVaeModel(KlVaeConfig(**TOKENIZER))


@torch.no_grad()
def set_latent_scale(tokenizer: KlVaeModel, pictures: torch.Tensor) -> None:
    """One over the standard deviation of the latents of all pictures."""
    latents = [tokenizer.encode_latents(batch).mean for batch in pictures.split(128)]
    tokenizer.config.latent_scale = 1 / torch.cat(latents).std().item()


def build_model(
    tokenizer: KlVaeModel, processor: ImageGenerationProcessor, head: str
) -> MarForImageGeneration:
    """MAR before its training."""
    config = MarConfig(
        image_tokenizer_config=tokenizer.config,
        text_encoder_config=text_encoder(processor, TEXT_ENCODER),
        head_config={"type": head, **HEADS[head]},
        **{**MAR, **(DRAFTER if head == "drafter" else {})},
    )
    model = MarForImageGeneration(config)
    model.image_tokenizer.load_state_dict(tokenizer.state_dict())
    model.generation_config.update(**SAMPLING)
    Masked.from_dict(DECODING).store(model.generation_config)
    return model


def trained_transformer(output: Path, head: str) -> Path | None:
    """
    The folder of the model on whose transformer a head learns, if there was one when its run began; that is written down, so
    that a run that goes on does so as it began.
    """
    if head in ("diffusion", "drafter"):
        return None
    folder, record = output / "emoji-mar-diffusion", output / f"start-{head}.txt"
    if not record.is_file():
        found = folder.name if (folder / "config.json").is_file() else ""
        write_whole(record, lambda path: path.write_text(found, encoding="utf-8"))
    return folder if record.read_text(encoding="utf-8") else None


def model_card(head: str, yardstick: Yardstick, parameters: int) -> str:
    """README.md of the model folder."""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-image
tags: [hf_argen, mar, emoji]
---

# {"Small emoji MAR that drafts" if head == "drafter" else f"Emoji MAR with a {head} head"}

Draws 64x64 pictures in the style of Noto Color Emoji from a few English words: masked autoregressive generation (MAR, arXiv
2406.11838) of 8x8 continuous tokens, {parameters / 1e6:.1f} million parameters in all. It is made to measure heads and
decodings on, not to be useful.

{DATA}
## Numbers

{yardstick.table()}

Made by `scripts/train_masked.py`, measured by `scripts/evaluate_emoji.py`.
"""


def train(
    head: str, emoji: EmojiSet, tokenizer_stage: Stage, stage: Stage, options: argparse.Namespace
) -> tuple[PreTrainedModel, ImageGenerationProcessor]:
    """Both stages of a model; the autoencoder's is shared, and so are the words."""
    tokenizer = train_tokenizer(
        build_tokenizer,
        emoji,
        tokenizer_stage,
        options,
        trainer_class=AutoencoderTrainer,
        finish=set_latent_scale,
    )
    torch.manual_seed(options.seed)
    processor = prompt_processor(emoji, options.output / "processor", LlamaGenProcessor)
    model = build_model(tokenizer, processor, head)
    if options.text_encoder:
        begin_with_encoder(model, options.text_encoder)
    start = trained_transformer(options.output, head)
    if start is not None:
        trained = MarForImageGeneration.from_pretrained(start, dtype=torch.float32)
        model.model.load_state_dict(trained.model.state_dict())
        # It stays as it is: so heads differ in nothing else, and a step takes half the time.
        model.model.requires_grad_(False)
    train_generator(model, processor, emoji, stage, options, options.output / f"training-{head}")
    return model, processor


def main() -> None:
    command = parser(__doc__, Path("runs/emoji-masked"))
    command.add_argument("head", choices=list(HEADS))
    command.add_argument("--text-encoder", help="a trained model with whose text encoder this one begins")
    options = command.parse_args()
    emoji = begin(options, f"sheets-{options.head}")
    stage = STAGE if trained_transformer(options.output, options.head) is None else LATER_STAGE
    model, processor = train(
        options.head,
        emoji,
        lasting(TOKENIZER_STAGE, options.tokenizer_epochs),
        lasting(stage, options.epochs),
        options,
    )
    folder = options.output / f"emoji-mar-{options.head}"
    finish_run(folder, model, processor, emoji, partial(model_card, options.head))
    sheet(to_uint8(draw(model, processor, list(PROMPTS)))).save(folder / "sheet.png")


if __name__ == "__main__":
    main()
