"""
Trains the model that ships with the package: pictures of emoji, 64x64, drawn from words.

Two stages, each under `Trainer`: the multi-scale tokenizer on the 1,391 rendered emoji, then a text-conditional VAR on
its ids and the captions of `hf_argen.data.emoji`. A checkpoint is written every few minutes; a run that was killed goes
on from the last one when the same command is given again, and ends as it would have without the kill. Sheets of
reconstructions and of drawn prompts are written beside the checkpoints while it trains.

    python scripts/train_emoji.py --output runs/emoji-var

The result is the folder OUTPUT/model, which `from_pretrained` and `pipeline("text-to-image", ...)` open.
"""

import argparse
from pathlib import Path

import torch
from emoji_training import (
    DATA,
    Stage,
    begin,
    finish_run,
    lasting,
    parser,
    prompt_processor,
    train_generator,
    train_tokenizer,
)
from evaluate_emoji import Yardstick
from transformers import BertConfig

from hf_argen import MultiScaleVQConfig, MultiScaleVQModel, VarConfig, VarForImageGeneration, VarProcessor
from hf_argen.data.emoji import EmojiSet

TOKENIZER = {
    "codebook_size": 2048,
    "latent_channels": 8,
    "base_channels": 48,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "norm_num_groups": 16,
    "patch_size": 4,
    "attention_at_lowest": False,
    "patch_nums": [1, 2, 4, 8, 8],
    "num_residual_convs": 4,
}
VAR = {
    "condition_type": "text",
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "shared_adaln": True,
}
TEXT_ENCODER = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SAMPLING = {
    "do_sample": True,
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 0.95,
}

TOKENIZER_STAGE = Stage(epochs=80, learning_rate=1.4e-3, warmup_steps=200, weight_decay=0.0, batch_size=8)
VAR_STAGE = Stage(epochs=50, learning_rate=2e-3, warmup_steps=200, weight_decay=0.02, batch_size=32)


def model_card(yardstick: Yardstick, parameters: int) -> str:
    """README.md of the model folder."""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-image
tags: [hf_argen, var, emoji]
---

# Emoji VAR

Draws 64x64 pictures in the style of Noto Color Emoji from a few English words: next-scale prediction (VAR, arXiv
2404.02905) over the {len(TOKENIZER["patch_nums"])} scales of a multi-scale VQ tokenizer, with a small text encoder,
{parameters / 1e6:.1f} million parameters in all. It ships with hf_argen and is made to be run, tested and measured, not to be useful.

```python
from transformers import pipeline

import hf_argen

pipeline("text-to-image")("red apple", seed=0)["image"].save("apple.png")
```

{DATA}
## Numbers

{yardstick.table()}

Made by `scripts/train_emoji.py`, measured by `scripts/evaluate_emoji.py`. It has seen these pictures and no others: words
that name none of them give a mixture of those that share a word with them.
"""


def build_tokenizer() -> MultiScaleVQModel:
    """The tokenizer before its training."""
    return MultiScaleVQModel(MultiScaleVQConfig(**TOKENIZER))


def build_var(tokenizer: MultiScaleVQModel, processor: VarProcessor) -> VarForImageGeneration:
    """The generator before its training."""
    encoder = BertConfig(
        vocab_size=len(processor.tokenizer), pad_token_id=processor.tokenizer.pad_token_id, **TEXT_ENCODER
    )
    model = VarForImageGeneration(
        VarConfig(image_tokenizer_config=tokenizer.config, text_encoder_config=encoder, **VAR)
    )
    model.image_tokenizer.load_state_dict(tokenizer.state_dict())
    model.generation_config.update(**SAMPLING)
    return model


def train(
    emoji: EmojiSet, tokenizer_stage: Stage, var_stage: Stage, options: argparse.Namespace
) -> tuple[VarForImageGeneration, VarProcessor]:
    """Both stages."""
    tokenizer = train_tokenizer(build_tokenizer, emoji, tokenizer_stage, options)
    torch.manual_seed(options.seed)
    processor = prompt_processor(emoji, options.output / "processor")
    model = build_var(tokenizer, processor)
    train_generator(model, processor, emoji, var_stage, options, options.output / "training-var")
    return model, processor


def main() -> None:
    options = parser(__doc__, Path("runs/emoji-var")).parse_args()
    emoji = begin(options)
    model, processor = train(
        emoji,
        lasting(TOKENIZER_STAGE, options.tokenizer_epochs),
        lasting(VAR_STAGE, options.epochs),
        options,
    )
    finish_run(options.output / "model", model, processor, emoji, model_card)


if __name__ == "__main__":
    main()
