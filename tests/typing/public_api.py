"""How people call the package, for the type checker; never run. `make check` verifies it in strict mode."""

from typing import assert_type

import torch
from PIL import Image
from transformers import PreTrainedModel, TrainingArguments

from hf_argen import (
    AutoModelForImageGeneration,
    CollaborativeNextScale,
    Decoding,
    LlamaGenForImageGeneration,
    MultiScaleVQModel,
    NextScale,
    VarConfig,
    VarForImageGeneration,
    VarProcessor,
    compatible_decodings,
    convert_original,
    generate,
)
from hf_argen.training import EpochCallback, TokenDataset, training_arguments


def convert() -> None:
    assert_type(
        convert_original("var", {"transformer": "var_d16.pth", "tokenizer": "vae.pth"}), PreTrainedModel
    )
    assert_type(
        VarForImageGeneration.from_original("FoundationVision/var", variant="d16"), VarForImageGeneration
    )
    assert_type(AutoModelForImageGeneration.from_config(VarConfig(hidden_size=512)), PreTrainedModel)


def draw(model: VarForImageGeneration, processor: VarProcessor) -> list[Image.Image]:
    ids = model.generate([207, 980], guidance_scale=4.0, decoding=NextScale(smooth=True), do_sample=True)
    generate(model, decoding=CollaborativeNextScale(refiner="small", draft_scales=8), class_labels=[1])
    assert_type(compatible_decodings(model), list[str])
    assert_type(Decoding.from_config(model.generation_config), Decoding | None)
    if isinstance(ids, torch.Tensor):
        return processor.postprocess(model.decode_images(ids))
    return []


def tokenize(tokenizer: MultiScaleVQModel, pixels: torch.Tensor) -> torch.Tensor:
    return tokenizer.decode(tokenizer.encode(pixels, patch_nums=[1, 2, [3, 4]]))


def train() -> TrainingArguments:
    return training_arguments("runs/var", from_pixels=True, max_steps=100)


def train_from_tokens(model: LlamaGenForImageGeneration) -> EpochCallback:
    rows = TokenDataset("tokens", seed=1)
    rows.check_fits(model)
    assert rows[0]["input_ids"].shape == rows[0]["labels"].shape
    names: list[str] | None = rows.class_names
    assert names is None or len(names) <= len(rows)
    return EpochCallback(rows)
