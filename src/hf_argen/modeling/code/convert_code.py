"""Conversion of CoDe (github.com/czg1225/CoDe, arXiv 2411.17787): two VARs and their tokenizer."""

from collections.abc import Mapping
from typing import Any

from ..checkpoints import ConversionError
from ..conversion import ConversionPlan, Converter
from ..key_map import StateDict
from ..tokenizers.multiscale_vq.convert_multiscale_vq import TOKENIZER, tokenizer_config
from ..var.configuration_var import VarConfig
from ..var.convert_var import TRANSFORMER, check_same_codes, transformer_config
from .configuration_code import CodeConfig


def _plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    from .modeling_code import CodeForImageGeneration

    for role in ("tokenizer", "drafter", "refiner"):
        if role not in weights:
            raise ConversionError(f"The role {role!r} is missing; code needs tokenizer, drafter and refiner.")
    drafter = transformer_config(weights["drafter"], original_config, "drafter")
    refiner = transformer_config(weights["refiner"], original_config, "refiner")
    for name in ("patch_nums", "num_classes"):
        if drafter[name] != refiner[name]:
            raise ConversionError(
                f"The drafter has {name} {drafter[name]}, the refiner {refiner[name]}; give a pair."
            )
    tokenizer = tokenizer_config(weights["tokenizer"], original_config, drafter["patch_nums"])
    check_same_codes(drafter, tokenizer, "drafter")
    check_same_codes(refiner, tokenizer, "refiner")
    return ConversionPlan(
        model_class=CodeForImageGeneration,
        config=CodeConfig(
            image_tokenizer_config=tokenizer,
            refiner_config=VarConfig(image_tokenizer_config=None, **refiner),
            **drafter,
        ),
        key_maps={
            "tokenizer": TOKENIZER.under("image_tokenizer."),
            "drafter": TRANSFORMER,
            "refiner": TRANSFORMER.under("refiner."),
        },
        generation={
            "do_sample": True,
            "guidance_scale": 1.5,
            "top_k": 0,
            "top_p": 1.0,
            "decoding": {"type": "collaborative_next_scale"},
        },
    )


CONVERTER = Converter(
    family="code",
    roles={"tokenizer": TOKENIZER, "drafter": TRANSFORMER, "refiner": TRANSFORMER},
    plan=_plan,
)
