"""MaskGIT-VQGAN against what the authors' code computed."""

import pytest
import torch

from hf_argen import MaskGitVQModel, RarProcessor, convert_original

from ..helpers.goldens import assert_close, assert_same_image, golden
from ..helpers.tiny import maskgit_vq_config


@pytest.fixture(scope="module", params=["two_level", "two_res_blocks"])
def case(request):
    return golden("maskgit_vq", request.param)


@pytest.fixture(scope="module")
def tokenizer(case):
    return case.convert()


def ours(image):
    """Pixels of the authors, in [0, 1], in our range."""
    return image * 2 - 1


def theirs(pixels):
    return pixels.add(1).mul(0.5)


@torch.no_grad()
def test_encoder_and_ids(case, tokenizer):
    tensors = case.tensors
    image = tensors["image"]
    hidden_states = tokenizer.encoder.conv_in(image)
    assert_close(hidden_states, tensors["enc_conv_in"])
    for i, level in enumerate(tokenizer.encoder.down_blocks):
        hidden_states = level(hidden_states)
        if hasattr(level, "downsample"):
            hidden_states = level.downsample(hidden_states)
        assert_close(hidden_states, tensors[f"enc_down_{i}"])
    latents = tokenizer.encode_latents(ours(image))
    assert_close(latents, tensors["latent"])
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    assert_close(tokenizer.quantizer.distances(rows, tokenizer.quantizer.codes()), tensors["distances"])
    assert torch.equal(tokenizer.encode(ours(image)), tensors["indices"])


@torch.no_grad()
def test_pictures(case, tokenizer):
    tensors = case.tensors
    quantized = tensors["quantized"]
    hidden_states = tokenizer.decoder.conv_in(quantized)
    assert_close(hidden_states, tensors["dec_conv_in"])
    hidden_states = tokenizer.decoder.mid_block(hidden_states)
    for i, level in reversed(list(enumerate(tokenizer.decoder.up_blocks))):
        hidden_states = level(hidden_states)
        if hasattr(level, "upsample"):
            hidden_states = level.upsample(hidden_states)
        assert_close(hidden_states, tensors[f"dec_up_{i}"])
    assert_close(theirs(tokenizer.decode_latents(quantized)), tensors["recon_raw"])
    assert_same_image(theirs(tokenizer.decode(quantized)), tensors["recon"])
    ids = tensors["other_indices"]
    found = theirs(tokenizer.decode(ids.flatten(1), grid_size=ids.shape[1:]))
    assert_same_image(found, tensors["other_recon"])
    assert_same_image(theirs(tokenizer.reconstruct(ours(tensors["image"]))), tensors["recon"])


@torch.no_grad()
def test_pil_images_are_cut_not_rounded(case):
    tensors = case.tensors
    for image, expected in zip(
        RarProcessor.postprocess(tensors["recon"]), tensors["recon_uint8"], strict=True
    ):
        found = torch.tensor(list(image.tobytes())).view(expected.shape)
        assert torch.equal(found, expected)


def test_training(case):
    """The quantizer's loss, and gradients that pass straight through it."""
    model, tensors = case.convert().train(), case.tensors
    output = model(ours(tensors["image"]))
    assert_close(theirs(output.reconstruction), tensors["recon_raw"])
    assert_close(output.codebook_loss + output.commitment_loss, tensors["quant_loss"])
    expected = output.reconstruction_loss + output.codebook_loss + output.commitment_loss
    assert torch.equal(output.loss, expected)
    output.reconstruction_loss.backward()
    assert model.quantizer.embedding.weight.grad is None  # the picture does not move the codes
    assert model.encoder.conv_in.weight.grad.abs().max() > 0


def test_a_block_that_changes_the_width_drops_its_input():
    torch.manual_seed(0)
    block = MaskGitVQModel(maskgit_vq_config()).eval().encoder.down_blocks[1].resnets[0]
    with torch.no_grad():
        block.conv2.weight.zero_()
        assert not block(torch.randn(1, 8, 4, 4)).any()


def test_without_the_authors_arguments(case):
    model = case.convert(with_config=False)
    expected = case.convert().config.to_dict()
    assert model.config.to_dict() == expected


def test_grids_of_ids(case, tokenizer):
    height, width = case.tensors["other_indices"].shape[1:]
    ids = case.tensors["indices"]
    if height == width:
        assert torch.equal(tokenizer.decode(ids), tokenizer.decode(ids, grid_size=height))
    else:
        with pytest.raises(ValueError, match=f"{height * width} ids make no square"):
            tokenizer.decode(ids)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_res_blocks": 3}, "says num_res_blocks=3, but the weights say 1"),
        ({"channel_mult": [1, 1]}, r"says channel_mult=\[1, 1\], but the weights say \[1, 2\]"),
        ({"z_channels": 4}, "says z_channels=4, but the weights say 8"),
        ({"depth": 4}, "unknown argument 'depth'"),
    ],
)
def test_contradictions(change, message):
    case = golden("maskgit_vq", "two_level")
    config = {"tokenizer": {**case.original_config()["tokenizer"], **change}}
    with pytest.raises(ValueError, match=message):
        convert_original("maskgit_vq", case.files(), config)


def test_commitment_cost_weighs_the_codebook_term():
    """That is what the authors' code does under this name."""
    case = golden("maskgit_vq", "two_level")
    config = {"tokenizer": {**case.original_config()["tokenizer"], "commitment_cost": 0.5}}
    model = convert_original("maskgit_vq", case.files(), config)
    pixels = ours(case.tensors["image"])
    doubled, plain = model(pixels), case.convert()(pixels)
    assert_close(doubled.codebook_loss, 2 * plain.codebook_loss)
    assert torch.equal(doubled.commitment_loss, plain.commitment_loss)


def test_bad_configurations():
    with pytest.raises(ValueError, match="norm_num_groups=3 does not divide the width 8"):
        maskgit_vq_config(norm_num_groups=3)
    with pytest.raises(ValueError, match="num_res_blocks is 0"):
        maskgit_vq_config(num_res_blocks=0)
