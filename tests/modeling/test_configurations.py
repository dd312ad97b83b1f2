"""Configurations that describe no model."""

import pytest
import torch
from transformers import GPT2Config

from hf_argen import MultiScaleVQConfig, MultiScaleVQModel, VarConfig

from ..helpers.tiny import spread, tiny_var, tokenizer_config, var_config


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"patch_nums": [1, 2, 3]},
            r"patch_nums is \[1, 2, 3\] in the model and \[1, 2, 4\] in its image tok",
        ),
        ({"vocab_size": 17}, "vocab_size is 17 in the model and 16 in its image tokenizer; they must agree"),
        ({"codebook_dim": 5}, "codebook_dim is 5 in the model and 4"),
        ({"num_attention_heads": 3}, "hidden_size=32 is not a multiple of num_attention_heads=3"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number of at least 1"),
        ({"num_hidden_layers": 1.5}, r"num_hidden_layers is 1\.5"),
        ({"num_classes": "five"}, "num_classes is 'five'; it must be a whole number"),
        ({"condition_dropout": -0.1}, r"condition_dropout is -0\.1; it must lie in \[0, 1\]"),
        ({"hidden_dropout": 2}, r"hidden_dropout is 2; it must lie in \[0, 1\]"),
        ({"condition_type": "prompt"}, "condition_type is 'prompt'; it must be 'class' or 'text'"),
        ({"image_tokenizer_config": GPT2Config()}, "image_tokenizer_config is of type 'gpt2'"),
        ({"image_tokenizer_config": 3}, "A sub-configuration is 3; give a configuration or its dict"),
        ({"image_tokenizer_config": None}, "Without image_tokenizer_config, vocab_size has to be given"),
    ],
)
def test_var(changes, match):
    with pytest.raises(ValueError, match=match):
        tiny_var(**changes)


def test_activation_that_there_is_not():
    with pytest.raises(KeyError, match="function gelo not found"):
        tiny_var(hidden_act="gelo")


@pytest.mark.parametrize("config_class", [VarConfig, MultiScaleVQConfig])
@pytest.mark.parametrize(
    "scales, match",
    [
        ([], r"patch_nums is \[\]; give a list"),
        ("12", "patch_nums is '12'; give a list"),
        (3, "patch_nums is 3; give a list"),
        ([1, 0], r"holds the scale 0; a scale is n or \[height, width\], every side at least 1"),
        ([[1, 2, 3]], r"holds the scale \[1, 2, 3\]"),
        ([2.5], r"holds the scale 2\.5"),
        ([[1, 2.5]], r"holds the scale \[1, 2\.5\]"),
        ([True], "holds the scale True"),
    ],
)
def test_scales(config_class, scales, match):
    with pytest.raises(ValueError, match=match):
        config_class(patch_nums=scales)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"codebook_size": 0}, "codebook_size is 0; it must be a whole number of at least 1"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"channel_multiplier": []}, "channel_multiplier is empty"),
        ({"norm_num_groups": 3}, "norm_num_groups=3 does not divide the width 8"),
        ({"residual_conv_ratio": 1.5}, r"residual_conv_ratio is 1\.5; it must lie in \[0, 1\]"),
        ({"num_residual_convs": -1}, "num_residual_convs is -1; it must be 0 or above"),
        ({"quant_conv_kernel_size": 2}, "quant_conv_kernel_size is 2; it must be odd"),
    ],
)
def test_tokenizer(changes, match):
    with pytest.raises(ValueError, match=match):
        tokenizer_config(**changes)


def test_another_image_tokenizer(tmp_path):
    """Where its tokens are the same it takes the other's place, and the configuration follows."""
    model = tiny_var()
    other = spread(MultiScaleVQModel(tokenizer_config(base_channels=16, num_res_blocks=2))).train()
    model.image_tokenizer = other
    assert model.config.image_tokenizer_config is other.config
    assert not other.training and not any(parameter.requires_grad for parameter in other.parameters())
    ids = model.generate([1, 2], do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.generate([1, 2], do_sample=False), ids)
    assert torch.equal(loaded.decode_images(ids), other.decode(ids).add(1).mul(0.5))

    for changes, name in (
        ({"codebook_size": 8}, "vocab_size"),
        ({"patch_nums": [2, 4]}, "patch_nums"),
        ({"latent_channels": 8}, "codebook_dim"),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*; they must agree"):
            model.image_tokenizer = MultiScaleVQModel(tokenizer_config(**changes))
    assert model.image_tokenizer is other and model.config.image_tokenizer_config is other.config


def test_sizes_come_from_the_tokenizer():
    config = var_config()
    assert (config.vocab_size, config.codebook_dim, config.patch_nums) == (16, 4, [1, 2, 4])
