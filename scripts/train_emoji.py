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
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate_emoji import Yardstick, evaluate, reconstruct
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_argen import MultiScaleVQConfig, MultiScaleVQModel, VarConfig, VarForImageGeneration, VarProcessor
from hf_argen.data.emoji import EmojiCaptions, EmojiSet, to_uint8
from hf_argen.training import training_arguments

SIZE = 64
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
WORD_PARTS = 2048
MAX_PROMPT_TOKENS = 32
SAMPLING = {
    "do_sample": True,
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 0.95,
}

PROMPTS = (
    "red apple", "grinning face", "dog face", "rocket", "hot beverage", "snowman", "guitar", "octopus",
    "purple banana", "two cats", "green heart", "happy sun", "blue car", "angry robot", "cheese", "rainbow fish",
)  # fmt: skip
# Weight of the mean log error against the quantization loss. The logarithm makes every picture count alike, which is
# what the mean PSNR measures; a plain mean squared error would spend itself on the busiest pictures.
LOG_ERROR_WEIGHT = 0.1
REVIVE_EVERY = 10  # steps
WARM_UP = 0.1  # of the training: the autoencoder alone, then the codebook starts from its latents
REVIVE_UNTIL = 0.8  # of the training; afterwards the codebook only settles


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage trains."""

    epochs: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    batch_size: int


TOKENIZER_STAGE = Stage(epochs=80, learning_rate=1.4e-3, warmup_steps=200, weight_decay=0.0, batch_size=8)
VAR_STAGE = Stage(epochs=50, learning_rate=2e-3, warmup_steps=200, weight_decay=0.02, batch_size=32)


class Pictures(Dataset):
    """The pictures alone, for the tokenizer."""

    def __init__(self, pictures: torch.Tensor):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pictures[index]}


class PeriodicCallback(TrainerCallback):
    """Saves a checkpoint every few minutes, and draws a sheet of samples with each."""

    def __init__(self, minutes: float, draw: Callable[[], Image.Image], folder: Path):
        self.seconds, self.draw, self.folder = minutes * 60, draw, folder
        self.last = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if time.monotonic() - self.last >= self.seconds or state.global_step == state.max_steps:
            control.should_save = True
            self.last = time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Drawing must not move the random numbers that training draws, or a resumed run would differ.
        with torch.random.fork_rng():
            self.draw().save(self.folder / f"step-{state.global_step:06d}.png")


class EpochCallback(TrainerCallback):
    """Tells the data set its epoch; in the epoch that a run resumes in, `Trainer` does not."""

    def __init__(self, dataset: EmojiCaptions):
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.set_epoch(state.global_step // (state.max_steps // int(args.num_train_epochs)))


class TokenizerTrainer(Trainer):
    """
    Log error of each picture plus quantization loss; codes that fall out of use are given a new place.

    The first steps leave the quantizer out, so that the codebook can start from latents that mean something.
    """

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        output = model(**inputs, quantize=self.progress >= WARM_UP)
        error = (output.reconstruction.float() - inputs["pixel_values"]).square().flatten(1).mean(dim=1)
        loss = LOG_ERROR_WEIGHT * (error + 1e-4).log().mean() + output.quantization_loss
        return (loss, output) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        if self.state.global_step % REVIVE_EVERY == 0 and WARM_UP <= self.progress < REVIVE_UNTIL:
            self._revive(inputs["pixel_values"])
        return super().training_step(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _revive(self, pixel_values: torch.Tensor) -> None:
        model = self.accelerator.unwrap_model(self.model)
        with self.compute_loss_context_manager():
            latents = model.encode_latents(pixel_values.to(model.device))
        revived = model.quantizer.revive_codes(latents)
        for name, moment in self.optimizer.state.get(model.quantizer.embedding.weight, {}).items():
            if name.startswith("exp_avg"):
                moment[revived] = 0


def sheet(pictures: np.ndarray, columns: int = 8) -> Image.Image:
    """Pictures (n, height, width, 3) uint8 side by side."""
    rows = -(-len(pictures) // columns)
    side = pictures.shape[1]
    canvas = np.full((rows * side, columns * side, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * side, i % columns * side
        canvas[top : top + side, left : left + side] = picture
    return Image.fromarray(canvas)


def arguments(
    folder: Path, stage: Stage, options: argparse.Namespace, from_pixels: bool
) -> TrainingArguments:
    """The training arguments of a stage."""
    return training_arguments(
        folder,
        from_pixels=from_pixels,
        num_train_epochs=stage.epochs,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        weight_decay=stage.weight_decay,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        adam_beta2=0.95,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=10**9,  # the callback decides, by the clock
        save_total_limit=2,
        logging_steps=50,
        report_to="none",
        seed=options.seed,
        dataloader_drop_last=True,
        dataloader_num_workers=0,
    )


def run(trainer: Trainer, folder: Path) -> None:
    """Trains, from the last checkpoint if there is one."""
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)


def train_tokenizer(emoji: EmojiSet, stage: Stage, options: argparse.Namespace) -> MultiScaleVQModel:
    """The first stage; its result is kept in OUTPUT/tokenizer and taken from there when it exists."""
    done = options.output / "tokenizer"
    if (done / "config.json").is_file():
        return MultiScaleVQModel.from_pretrained(done).eval()
    folder = options.output / "training-tokenizer"
    torch.manual_seed(options.seed)
    model = MultiScaleVQModel(MultiScaleVQConfig(**TOKENIZER))
    model.to(memory_format=torch.channels_last)
    pictures = emoji.pixel_values()
    shown = torch.linspace(0, len(emoji) - 1, 32).long()

    def draw() -> Image.Image:
        return sheet(
            np.concatenate([emoji.images[shown.numpy()], to_uint8(reconstruct(model, pictures[shown]))])
        )

    trainer = TokenizerTrainer(
        model,
        arguments(folder, stage, options, from_pixels=True),
        train_dataset=Pictures(pictures),
        callbacks=[PeriodicCallback(options.save_minutes, draw, options.sheets)],
    )
    run(trainer, folder)
    save(done, model)
    return model.eval()


def prompt_processor(emoji: EmojiSet, folder: Path) -> VarProcessor:
    """
    The processor with byte pairs of the training captions, kept in `folder`, since a resumed run needs the ids that it
    began with. (Word pieces would not do: their trainer breaks ties differently in every process.)
    """
    if folder.is_dir():
        return VarProcessor.from_pretrained(folder)
    pieces = Tokenizer(models.BPE(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator(
        (caption for captions in emoji.train for caption in captions),
        trainers.BpeTrainer(vocab_size=WORD_PARTS, special_tokens=["[PAD]", "[UNK]"], show_progress=False),
    )
    words = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]")
    processor = VarProcessor(tokenizer=words, image_size=(SIZE, SIZE), max_prompt_tokens=MAX_PROMPT_TOKENS)
    save(folder, processor)
    return processor


def train_var(
    emoji: EmojiSet, tokenizer: MultiScaleVQModel, stage: Stage, options: argparse.Namespace
) -> tuple[VarForImageGeneration, VarProcessor]:
    """The second stage."""
    folder = options.output / "training-var"
    torch.manual_seed(options.seed)
    processor = prompt_processor(emoji, options.output / "processor")
    encoder = BertConfig(
        vocab_size=len(processor.tokenizer), pad_token_id=processor.tokenizer.pad_token_id, **TEXT_ENCODER
    )
    model = VarForImageGeneration(
        VarConfig(image_tokenizer_config=tokenizer.config, text_encoder_config=encoder, **VAR)
    )
    model.image_tokenizer.load_state_dict(tokenizer.state_dict())
    model.generation_config.update(**SAMPLING)
    with torch.no_grad():
        ids = torch.cat([tokenizer.encode(batch) for batch in emoji.pixel_values().split(128)])

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        codes = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": codes, "labels": codes, **processor([row["caption"] for row in rows])}

    def draw() -> Image.Image:
        model.eval()
        generators = [torch.Generator(model.device).manual_seed(i) for i in range(len(PROMPTS))]
        drawn = model.generate(**processor(list(PROMPTS)).to(model.device), generator=generators)
        pictures = to_uint8(model.decode_images(drawn))
        model.train()
        return sheet(pictures)

    captions = EmojiCaptions(emoji, options.seed, pictures=ids, key="input_ids")
    trainer = Trainer(
        model,
        arguments(folder, stage, options, from_pixels=False),
        train_dataset=captions,
        data_collator=collate,
        callbacks=[EpochCallback(captions), PeriodicCallback(options.save_minutes, draw, options.sheets)],
    )
    run(trainer, folder)
    return model.eval(), processor


def save(folder: Path, *parts: Any, card: str | None = None) -> None:
    """Saves the parts beside `folder` and renames, so that it is whole or not there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in parts:
        part.save_pretrained(partial)
    if card is not None:
        (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


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

## Data

The 1,391 single-code-point emoji of Noto Color Emoji, rendered with Debian's `fonts-noto-color-emoji`. The font is
copyright Google and licensed under the SIL Open Font License 1.1 (OFL-1.1). Captions: Unicode names, and short names
and keywords of the Unicode CLDR (Unicode License). A tenth of the captions was held out.

## Numbers

{yardstick.table()}

Made by `scripts/train_emoji.py`, measured by `scripts/evaluate_emoji.py`. It has seen these pictures and no others: words
that name none of them give a mixture of those that share a word with them.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/emoji-var"), help="folder of the run")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, where it is not found by itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-minutes", type=float, default=4.0, help="time between checkpoints")
    parser.add_argument("--tokenizer-epochs", type=int, help="length of the first stage")
    parser.add_argument("--var-epochs", type=int, help="length of the second stage")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.sheets = options.output / "sheets"
    options.sheets.mkdir(parents=True, exist_ok=True)
    emoji = EmojiSet.load(SIZE, font=options.font, cache_dir=options.output)
    tokenizer_stage = replace(TOKENIZER_STAGE, epochs=options.tokenizer_epochs or TOKENIZER_STAGE.epochs)
    var_stage = replace(VAR_STAGE, epochs=options.var_epochs or VAR_STAGE.epochs)
    tokenizer = train_tokenizer(emoji, tokenizer_stage, options)
    model, processor = train_var(emoji, tokenizer, var_stage, options)
    model = model.to(torch.bfloat16)
    yardstick = evaluate(model, processor, emoji)
    print(yardstick.table())
    card = model_card(yardstick, sum(parameter.numel() for parameter in model.parameters()))
    save(options.output / "model", model, processor, card=card)
    print(f"Written: {options.output / 'model'}")


if __name__ == "__main__":
    main()
