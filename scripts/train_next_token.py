"""
Trains the small next-token models on which decodings are measured: pictures of emoji, 64x64, drawn from words, token
after token.

First a VQ tokenizer of 16x16 tokens on the 1,391 rendered emoji, which the families share; then a text-conditional
LlamaGen or RAR on its ids and the captions of `hf_argen.data.emoji`. A checkpoint is written every few minutes; a run
that was killed goes on from the last one when the same command is given again, and ends as it would have without the
kill. Sheets of reconstructions and of drawn prompts are written beside the checkpoints while it trains.

    python scripts/train_next_token.py rar --output runs/emoji-next-token
    python scripts/train_next_token.py rar --start runs/emoji-next-token/emoji-rar --epochs 14 --learning-rate 2e-3 \
        --corruption 0.7 0.3 --output runs/emoji-next-token-2
    python scripts/train_next_token.py llamagen --output runs/emoji-next-token \
        --text-encoder runs/emoji-next-token/emoji-rar
    python scripts/train_next_token.py llamagen-drafter --output runs/emoji-next-token

The second goes on with a model that was trained. The last is a small model that drafts for both. As in the paper, LlamaGen
begins with a text encoder that knows its words: that of RAR, or of a checkpoint of its training. (RAR learns them from
nothing, since the caption modulates all its layers. LlamaGen has to attend to it, and hardly begins to while it means
nothing.) The results are the folders OUTPUT/emoji-FAMILY.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from emoji_training import (
    DATA,
    MAX_PROMPT_TOKENS,
    Corruption,
    Stage,
    begin,
    finish_run,
    lasting,
    parser,
    prompt_processor,
    text_encoder,
    train_generator,
    train_tokenizer,
)
from evaluate_emoji import Yardstick
from transformers import AutoProcessor, PreTrainedModel

from hf_argen import (
    AutoModelForImageGeneration,
    LlamaGenConfig,
    LlamaGenForImageGeneration,
    LlamaGenProcessor,
    LlamaGenVQConfig,
    LlamaGenVQModel,
    RarConfig,
    RarForImageGeneration,
    RarProcessor,
)
from hf_argen.data.emoji import EmojiSet
from hf_argen.processors.base import ImageGenerationProcessor
from hf_argen.training import RandomnessAnnealing

TOKENIZER = {
    "codebook_size": 512,
    "codebook_dim": 8,
    "latent_channels": 64,
    "base_channels": 16,
    "channel_multiplier": [1, 4, 4],
    "num_res_blocks": 1,
    "norm_num_groups": 8,
    "grid_size": 16,
}
LLAMAGEN = {
    "condition_type": "text",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 704,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "mlp_dropout": 0.0,
    "text_embed_dim": 128,
    "max_prompt_tokens": MAX_PROMPT_TOKENS,
    "freeze_text_encoder": False,
}
DRAFTER = {
    **LLAMAGEN,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 384,
    "text_embed_dim": 64,
}
RAR = {
    "condition_type": "text",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 576,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "text_embed_dim": 128,
}
ANNEALING = (0.05, 0.1)  # of the training; the paper's half and three quarters suit a longer one
CORRUPTION = Corruption(first=1.0, last=0.3)
TEXT_ENCODER = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 1,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
DRAFTER_TEXT_ENCODER = {**TEXT_ENCODER, "d_model": 64, "d_kv": 16, "d_ff": 256}
SAMPLING = {"do_sample": True, "guidance_scale": 2.0, "temperature": 0.7, "top_k": 0, "top_p": 0.95}

# Of `begin_attention`: first weights in those of transformers, the constant, and attention scores.
FIRST_STD, CONSTANT, AWAY, PLACES = 2.5, 0.5, 7.0, 2.0

REVIVAL_PICTURES = 128
TOKENIZER_STAGE = Stage(epochs=16, learning_rate=1.4e-3, warmup_steps=200, weight_decay=0.0, batch_size=8)
STAGES = {
    "llamagen": Stage(
        epochs=28, learning_rate=3e-3, warmup_steps=100, weight_decay=0.02, batch_size=16, muon=True
    ),
    "llamagen-drafter": Stage(
        epochs=20, learning_rate=3e-3, warmup_steps=100, weight_decay=0.02, batch_size=32
    ),
    "rar": Stage(
        epochs=28, learning_rate=3e-3, warmup_steps=100, weight_decay=0.02, batch_size=16, muon=True
    ),
}


def build_tokenizer() -> LlamaGenVQModel:
    """The tokenizer before its training."""
    return LlamaGenVQModel(LlamaGenVQConfig(**TOKENIZER))


def encoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The text encoder within a model of any family."""
    return next(part for name, part in model.named_modules() if name.endswith("text_encoder"))


def build_llamagen(
    tokenizer: LlamaGenVQModel, processor: ImageGenerationProcessor
) -> LlamaGenForImageGeneration:
    """LlamaGen before its training."""
    encoder = text_encoder(processor, TEXT_ENCODER)
    config = LlamaGenConfig(image_tokenizer_config=tokenizer.config, text_encoder_config=encoder, **LLAMAGEN)
    return LlamaGenForImageGeneration(config)


@torch.no_grad()
def begin_attention(model: LlamaGenForImageGeneration) -> None:
    """
    First weights with which attention tells caption and tokens apart. The caption has no rotary position, so that its
    keys are zero (as the authors have it), and at their small first weights all heads see the mean of everything. Here
    the embeddings of tokens share a constant first channel. By it the first head of each layer turns away from tokens, to
    the caption, and the other heads begin with preferences among the places around.
    """
    head_dim, width = model.config.head_dim, model.config.hidden_size
    std = FIRST_STD * model.config.initializer_range
    model.model.embed_tokens.weight.mul_(FIRST_STD)
    model.model.embed_tokens.weight[:, 0] = CONSTANT
    # What the first norm makes of the constant.
    normed = CONSTANT / (((width - 1) * std**2 + CONSTANT**2) / width) ** 0.5
    # The slowest quarter of the rotary pairs of each axis hardly turns within a picture.
    pairs = head_dim // 4
    slow = [2 * pair for end in (pairs, 2 * pairs) for pair in range(end - max(pairs // 4, 1), end)]
    away = (AWAY * head_dim**0.5 / (normed**2 * len(slow))) ** 0.5
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(FIRST_STD)
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        for weight, sign in ((query, 1), (key, -1)):
            weight[:, 0].normal_(std=PLACES**0.5 / normed)
            weight[:head_dim, 0] = 0
            weight[slow, 0] = sign * away


def build_drafter(
    tokenizer: LlamaGenVQModel, processor: ImageGenerationProcessor
) -> LlamaGenForImageGeneration:
    """A small LlamaGen with the same tokens."""
    encoder = text_encoder(processor, DRAFTER_TEXT_ENCODER)
    config = LlamaGenConfig(image_tokenizer_config=tokenizer.config, text_encoder_config=encoder, **DRAFTER)
    return LlamaGenForImageGeneration(config)


def build_rar(tokenizer: LlamaGenVQModel, processor: ImageGenerationProcessor) -> RarForImageGeneration:
    """RAR on the same tokens, before its training."""
    encoder = text_encoder(processor, TEXT_ENCODER)
    return RarForImageGeneration(
        RarConfig(image_tokenizer_config=tokenizer.config, text_encoder_config=encoder, **RAR)
    )


TITLES = {
    "llamagen": ("LlamaGen", "arXiv 2406.06525"),
    "llamagen-drafter": ("LlamaGen drafter", "arXiv 2406.06525"),
    "rar": ("RAR", "arXiv 2411.00776"),
}
BUILDERS = {
    "llamagen": (build_llamagen, LlamaGenProcessor),
    "llamagen-drafter": (build_drafter, LlamaGenProcessor),
    "rar": (build_rar, RarProcessor),
}


def model_card(family: str, yardstick: Yardstick, parameters: int) -> str:
    """README.md of the model folder."""
    title, paper = TITLES[family]
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-image
tags: [hf_argen, {family}, emoji]
---

# Emoji {title}

Draws 64x64 pictures in the style of Noto Color Emoji from a few English words: next-token prediction ({title}, {paper})
over 16x16 tokens, {parameters / 1e6:.1f} million parameters in all. It is made to measure decodings on, not to be useful.

{DATA}
## Numbers

{yardstick.table()}

Made by `scripts/train_next_token.py`, measured by `scripts/evaluate_emoji.py`.
"""


def new_model(
    family: str, emoji: EmojiSet, tokenizer_stage: Stage, options: argparse.Namespace
) -> tuple[PreTrainedModel, ImageGenerationProcessor]:
    """A model before its training, on the trained tokenizer, which all families share."""
    build, processor_class = BUILDERS[family]
    tokenizer = train_tokenizer(build_tokenizer, emoji, tokenizer_stage, options, REVIVAL_PICTURES)
    torch.manual_seed(options.seed)
    processor = prompt_processor(emoji, options.output / f"processor-{family}", processor_class)
    model = build(tokenizer, processor)
    if family == "llamagen":
        begin_attention(model)
    if options.text_encoder:
        trained = AutoModelForImageGeneration.from_pretrained(options.text_encoder)
        encoder_of(model).load_state_dict(encoder_of(trained).state_dict())
    model.image_tokenizer.load_state_dict(tokenizer.state_dict())
    model.generation_config.update(**SAMPLING)
    return model, processor


def train(
    family: str,
    emoji: EmojiSet,
    tokenizer_stage: Stage,
    stage: Stage,
    options: argparse.Namespace,
) -> tuple[PreTrainedModel, ImageGenerationProcessor]:
    """All stages of a family, or a further one of a trained model."""
    if options.start:
        torch.manual_seed(options.seed)
        model = AutoModelForImageGeneration.from_pretrained(options.start, dtype="float32")
        processor = AutoProcessor.from_pretrained(options.start)
    else:
        model, processor = new_model(family, emoji, tokenizer_stage, options)
    callbacks = []
    if family == "rar":
        steps = stage.epochs * (len(emoji) // stage.batch_size)
        order = (0.0, 0.0) if options.start else ANNEALING
        callbacks.append(RandomnessAnnealing(*(int(share * steps) for share in order)))
    folder = options.output / f"training-{family}"
    # A drafter reads what the model draws that it drafts for.
    corruption = None if family.endswith("drafter") else CORRUPTION
    if options.corruption:
        corruption = Corruption(*options.corruption)
    train_generator(model, processor, emoji, stage, options, folder, callbacks, corruption)
    return model, processor


def main() -> None:
    options = parser(__doc__, Path("runs/emoji-next-token"))
    options.add_argument("family", choices=sorted(BUILDERS))
    add = options.add_argument
    add("--start", help="a trained model of this family that is trained further, into another --output")
    add("--learning-rate", type=float, help="of the second stage")
    add("--corruption", type=float, nargs=2, help="largest share of random tokens, at first and in the end")
    add("--text-encoder", help="a trained model with whose text encoder this one begins")
    options = options.parse_args()
    emoji = begin(options, f"sheets-{options.family}")
    model, processor = train(
        options.family,
        emoji,
        lasting(TOKENIZER_STAGE, options.tokenizer_epochs),
        lasting(STAGES[options.family], options.epochs, options.learning_rate),
        options,
    )
    folder = options.output / f"emoji-{options.family}"
    finish_run(folder, model, processor, emoji, partial(model_card, options.family))


if __name__ == "__main__":
    main()
