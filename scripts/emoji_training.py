"""
What the training scripts of the emoji models share: a tokenizer's stage and a generator's stage under `Trainer`, with
checkpoints by the clock, exact resume, sheets of what is drawn so far, and the words of the captions.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
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
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_argen import VarProcessor
from hf_argen.data.emoji import EmojiCaptions, EmojiSet, to_uint8
from hf_argen.processors.base import ImageGenerationProcessor
from hf_argen.training import EpochCallback, MuonWithAdamW, training_arguments

SIZE = 64
WORD_PARTS = 2048
MAX_PROMPT_TOKENS = 32

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
DATA = """## Data

The 1,391 single-code-point emoji of Noto Color Emoji, rendered with Debian's `fonts-noto-color-emoji`. The font is
copyright Google and licensed under the SIL Open Font License 1.1 (OFL-1.1). Captions: Unicode names, and short names
and keywords of the Unicode CLDR (Unicode License). A tenth of the captions was held out.
"""  # of the model cards


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage trains; with Muon for the matrices, or AdamW for all."""

    epochs: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    batch_size: int
    muon: bool = False


@dataclass(frozen=True)
class Corruption:
    """
    Random tokens in the pictures that a next-token model reads in training. Without them it soon knows its few pictures
    by their first tokens, hardly reads the caption, and does not find back from a token that it would not have drawn.

    Args:
        first, last: largest share of random tokens of a picture at the beginning and at the end, linear in between; the
            share itself is drawn for each picture anew.
    """

    first: float
    last: float

    def __call__(self, ids: torch.Tensor, vocab_size: int, progress: float) -> torch.Tensor:
        """Ids (batch, tokens) as they are read when a share `progress` of the training is done."""
        most = self.first + (self.last - self.first) * progress
        share = most * torch.rand(len(ids), 1)
        return torch.where(torch.rand(ids.shape) < share, torch.randint(vocab_size, ids.shape), ids)


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


class AutoencoderTrainer(Trainer):
    """Log error of each picture plus the term that `regularization` names."""

    regularization = "kl_loss"

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def reconstruct(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
        """Output of the training pass."""
        return model(**inputs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        output = self.reconstruct(model, inputs)
        error = (output.reconstruction.float() - inputs["pixel_values"]).square().flatten(1).mean(dim=1)
        loss = LOG_ERROR_WEIGHT * (error + 1e-4).log().mean() + output[self.regularization]
        return (loss, output) if return_outputs else loss


class TokenizerTrainer(AutoencoderTrainer):
    """
    For tokenizers with a codebook: codes that fall out of use are given a new place.

    The first steps leave the quantizer out, so that the codebook can start from latents that mean something.

    Args:
        revival_pictures: random pictures of the data set that new codes are taken from; `None`: those of the step.
    """

    regularization = "quantization_loss"

    def __init__(self, *args: Any, revival_pictures: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.revival_pictures = revival_pictures

    def reconstruct(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
        return model(**inputs, quantize=self.progress >= WARM_UP)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        if self.state.global_step % REVIVE_EVERY == 0 and WARM_UP <= self.progress < REVIVE_UNTIL:
            self._revive(inputs["pixel_values"])
        return super().training_step(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _revive(self, pixel_values: torch.Tensor) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.revival_pictures is not None:
            pictures = self.train_dataset.pictures
            pixel_values = pictures[torch.randperm(len(pictures))[: self.revival_pictures]]
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


def train_tokenizer(
    build: Callable[[], PreTrainedModel],
    emoji: EmojiSet,
    stage: Stage,
    options: argparse.Namespace,
    revival_pictures: int | None = None,
    trainer_class: type[AutoencoderTrainer] = TokenizerTrainer,
    finish: Callable[[PreTrainedModel, torch.Tensor], None] | None = None,
) -> PreTrainedModel:
    """
    The first stage; its result is kept in OUTPUT/tokenizer and taken from there when it exists.

    Args:
        build: makes the tokenizer.
        revival_pictures: see [`TokenizerTrainer`].
        trainer_class: how it is trained.
        finish: what is done to the trained tokenizer, given all pictures, before it is saved.
    """
    torch.manual_seed(options.seed)
    model = build()
    done = options.output / "tokenizer"
    if (done / "config.json").is_file():
        trained = type(model).from_pretrained(done).eval()
        trained.config.name_or_path = ""  # a folder of this machine, which models would be saved with
        return trained
    folder = options.output / "training-tokenizer"
    model.to(memory_format=torch.channels_last)
    pictures = emoji.pixel_values()
    shown = torch.linspace(0, len(emoji) - 1, 32).long()

    def draw() -> Image.Image:
        return sheet(
            np.concatenate([emoji.images[shown.numpy()], to_uint8(reconstruct(model, pictures[shown]))])
        )

    own = {"revival_pictures": revival_pictures} if issubclass(trainer_class, TokenizerTrainer) else {}
    trainer = trainer_class(
        model,
        arguments(folder, stage, options, from_pixels=True),
        train_dataset=Pictures(pictures),
        callbacks=[PeriodicCallback(options.save_minutes, draw, options.sheets)],
        **own,
    )
    run(trainer, folder)
    if finish is not None:
        finish(model.eval(), pictures)
    save(done, model)
    return model.eval()


def prompt_processor(emoji: EmojiSet, folder: Path, processor_class: type = VarProcessor) -> VarProcessor:
    """
    The processor with byte pairs of the training captions, kept in `folder`, since a resumed run needs the ids that it
    began with. (Word pieces would not do: their trainer breaks ties differently in every process.)
    """
    if folder.is_dir():
        return processor_class.from_pretrained(folder)
    pieces = Tokenizer(models.BPE(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator(
        (caption for captions in emoji.train for caption in captions),
        trainers.BpeTrainer(vocab_size=WORD_PARTS, special_tokens=["[PAD]", "[UNK]"], show_progress=False),
    )
    words = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]")
    processor = processor_class(tokenizer=words, image_size=(SIZE, SIZE), max_prompt_tokens=MAX_PROMPT_TOKENS)
    save(folder, processor)
    return processor


def text_encoder(processor: ImageGenerationProcessor, shape: dict[str, Any]) -> T5Config:
    """Configuration of the encoder of the captions."""
    words = processor.tokenizer
    return T5Config(vocab_size=len(words), pad_token_id=words.pad_token_id, **shape)


def train_generator(
    model: PreTrainedModel,
    processor: VarProcessor,
    emoji: EmojiSet,
    stage: Stage,
    options: argparse.Namespace,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    corruption: Corruption | None = None,
) -> PreTrainedModel:
    """
    The second stage: a text-conditional model on the ids or latents of its frozen tokenizer, in `folder`.

    Args:
        corruption: what is done to the ids that the model reads, not to those that it predicts.
    """
    tokenizer = model.image_tokenizer.eval()
    kind = "latents" if model.draws_latents else "input_ids"
    with torch.no_grad():
        tokens = torch.cat([tokenizer.encode(batch) for batch in emoji.pixel_values().split(128)])

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = torch.stack([row[kind] for row in rows])
        read = batch
        if corruption is not None:
            # By the epoch, which a resumed run knows before it reads its first batch.
            read = corruption(batch, tokenizer.config.codebook_size, captions.epoch / stage.epochs)
        return {kind: read, "labels": batch, **processor([row["caption"] for row in rows])}

    def draw() -> Image.Image:
        model.eval()
        generators = [torch.Generator(model.device).manual_seed(i) for i in range(len(PROMPTS))]
        drawn = model.generate(**processor(list(PROMPTS)).to(model.device), generator=generators)
        pictures = to_uint8(model.decode_images(drawn))
        model.train()
        return sheet(pictures)

    captions = EmojiCaptions(emoji, options.seed, pictures=tokens, key=kind)
    periodic = PeriodicCallback(options.save_minutes, draw, options.sheets)
    optimizer = MuonWithAdamW(model, stage.learning_rate, stage.weight_decay) if stage.muon else None
    trainer = Trainer(
        model,
        arguments(folder, stage, options, from_pixels=False),
        optimizers=(optimizer, None),
        train_dataset=captions,
        data_collator=collate,
        callbacks=[EpochCallback(captions), *callbacks, periodic],
    )
    run(trainer, folder)
    return model.eval()


def parser(description: str, output: Path) -> argparse.ArgumentParser:
    """The options that every training script takes."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--output", type=Path, default=output, help="folder of the run")
    options.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, where it is not found by itself")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--save-minutes", type=float, default=4.0, help="time between checkpoints")
    options.add_argument("--tokenizer-epochs", type=int, help="length of the first stage")
    options.add_argument("--epochs", type=int, help="length of the second stage")
    return options


def begin(options: argparse.Namespace, sheets: str = "sheets") -> EmojiSet:
    """The emoji of a run, and in its folder one for sheets, which `options.sheets` then names."""
    options.sheets = options.output / sheets
    options.sheets.mkdir(parents=True, exist_ok=True)
    return EmojiSet.load(SIZE, font=options.font, cache_dir=options.output)


def lasting(stage: Stage, epochs: int | None, learning_rate: float | None = None) -> Stage:
    """A stage with the length and the learning rate that options give, where they do."""
    return replace(stage, epochs=epochs or stage.epochs, learning_rate=learning_rate or stage.learning_rate)


def finish_run(
    folder: Path,
    model: PreTrainedModel,
    processor: ImageGenerationProcessor,
    emoji: EmojiSet,
    card: Callable[[Yardstick, int], str],
) -> None:
    """
    Measures a trained generator in bfloat16, prints the numbers, and saves it.

    Args:
        card: yardstick and number of parameters -> README.md of the folder.
    """
    model.to(torch.bfloat16)
    yardstick = evaluate(model, processor, emoji)
    print(yardstick.table())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    save(folder, model, processor, card=card(yardstick, parameters))
    print(f"Written: {folder}")


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
