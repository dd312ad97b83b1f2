"""The multi-scale tokenizer against what the authors' code computed."""

import pytest
import torch

from hf_argen import MultiScaleVQModel

from ..helpers.goldens import assert_close, assert_same_image, golden
from ..helpers.tiny import tokenizer_config

CASES = ["d2_adaln_l2_q4", "d3_saln_l2_q0", "d2_adaln_nol2_q1", "tok_ch8_q4_rect"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return golden("var", request.param)


@pytest.fixture(scope="module")
def tokenizer(case):
    return case.convert("tokenizer") if case.name == "tok_ch8_q4_rect" else case.convert().image_tokenizer


@torch.no_grad()
def test_encoder_and_ids(case, tokenizer):
    image = case.tensors["tok.image"]
    assert_close(tokenizer.encoder(image), case.tensors["tok.encoder_out"])
    latents = tokenizer.encode_latents(image)
    assert_close(latents, case.tensors["tok.f"])
    ids, feature_maps = tokenizer.quantizer.quantize(latents)
    assert torch.equal(ids, case.tensors["tok.ids"])
    assert torch.equal(tokenizer.encode(image), case.tensors["tok.ids"])
    assert_close(torch.stack(feature_maps), case.tensors["tok.f_hats"])


@torch.no_grad()
def test_teacher_forcing_input(case, tokenizer):
    ids = case.tensors["tok.ids"]
    assert_close(tokenizer.quantizer.scale_inputs(ids), case.tensors["tok.var_input"])
    last = tokenizer.quantizer.embed(tokenizer.quantizer.split(ids)[-1])
    assert_close(last, case.tensors["tok.codebook_lookup"])


@torch.no_grad()
def test_scale_inputs_of_the_first_scales(case, tokenizer):
    ids, inputs = case.tensors["tok.ids"], case.tensors["tok.var_input"]
    lengths = [h * w for h, w in tokenizer.config.grid_sizes]
    for stop in range(1, len(lengths)):
        part = tokenizer.quantizer.scale_inputs(ids[:, : sum(lengths[:stop])])
        assert_close(part, inputs[:, : part.shape[1]]) if stop > 1 else None
        assert part.shape[1] == sum(lengths[1:stop])


@torch.no_grad()
def test_pictures(case, tokenizer):
    ids, tensors = case.tensors["tok.ids"], case.tensors
    assert_same_image(tokenizer.reconstruct(tensors["tok.image"]), tensors["tok.recon_last"])
    assert_same_image(tokenizer.decode(ids)[..., 1::4, 1::4], tensors["tok.ids_to_img_s4"])
    pictures = tokenizer.decode_scales(ids)
    assert_same_image(pictures[0][..., 1::4, 1::4], tensors["tok.recon_scale0_s4"])
    assert_same_image(pictures[len(pictures) // 2][..., 1::4, 1::4], tensors["tok.recon_scale_mid_s4"])
    assert torch.equal(pictures[-1], tokenizer.decode(ids))
    raw = tokenizer.decode_latents(tokenizer.quantizer.feature_maps(ids)[-1])
    assert_close(raw[..., 1::4, 1::4], tensors["tok.decoder_raw_s4"])


@torch.no_grad()
def test_progressive_previews(case, tokenizer):
    maps = tokenizer.quantizer.feature_maps(case.tensors["tok.ids"], progressive=True)
    assert_close(maps[-1], case.tensors["tok.fhats_not_same_shape_last"])
    pictures = tokenizer.decode_scales(case.tensors["tok.ids"], progressive=True)
    assert_same_image(pictures[1], case.tensors["tok.ids_to_img_native_s1"])
    factor = tokenizer.config.downsampling_factor
    sizes = [(height * factor, width * factor) for height, width in tokenizer.config.grid_sizes]
    assert [tuple(picture.shape[-2:]) for picture in pictures] == sizes


@torch.no_grad()
def test_training_loss(case, tokenizer):
    image = case.tensors["tok.image"]
    output = tokenizer(image)
    assert_close(output.reconstruction[..., 1::4, 1::4], case.tensors["tok.train_recon_s4"])
    assert_close(output.quantization_loss.view(1), case.tensors["tok.train_vq_loss"])
    assert output.loss.item() == pytest.approx(
        (output.reconstruction_loss + output.quantization_loss).item(), rel=1e-6
    )
    cells = image.shape[0] * tokenizer.config.grid_sizes[-1][0] * tokenizer.config.grid_sizes[-1][1]
    assert tokenizer.quantizer.usage_percent(cells) == pytest.approx(
        case.tensors["tok.train_usages"].tolist()
    )


@torch.no_grad()
def test_non_square_picture():
    case = golden("var", "tok_ch8_q4_rect")
    tokenizer, scales = case.convert("tokenizer"), [(1, 1), (1, 2), (2, 3), (4, 6)]
    ids = tokenizer.encode(case.tensors["tok.rect_image"], patch_nums=scales)
    assert torch.equal(ids, case.tensors["tok.rect_ids"])
    assert_same_image(tokenizer.decode(ids, patch_nums=scales), case.tensors["tok.rect_recon"])
    assert_same_image(tokenizer.decode_scales(ids, scales)[-1], case.tensors["tok.rect_recon"])
    assert tokenizer.decode_scales(ids, scales, progressive=True)[2].shape == (1, 3, 32, 48)


def test_patches_in_place_of_levels():
    """A patch of pixels as one cell gives the same grid as levels that halve the resolution."""
    config = tokenizer_config(patch_size=4, channel_multiplier=[1], num_res_blocks=1)
    tokenizer = MultiScaleVQModel(config).eval()
    assert config.downsampling_factor == tokenizer_config().downsampling_factor == 4
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = tokenizer.encode(image)
    assert ids.shape == (2, 21)
    assert tokenizer.decode(ids).shape == image.shape
    assert tokenizer.encoder.conv_in.in_channels == 48


def _collapsed(codes_in_use: int = 2):
    """A quantizer whose training drew only the first codes, and latents that it explains badly."""
    torch.manual_seed(0)
    model = MultiScaleVQModel(tokenizer_config(codebook_size=64))
    quantizer = model.quantizer
    quantizer.code_usage.zero_()
    quantizer.code_usage[:, :codes_in_use] = 10.0
    with torch.no_grad():
        quantizer.embedding.weight[codes_in_use:] = 1e3  # far from every latent
    return quantizer, torch.randn(32, 4, 4, 4)


def test_dead_codes_are_revived_from_residuals():
    quantizer, latents = _collapsed()
    before = quantizer.embedding.weight.detach().clone()
    revived = quantizer.revive_codes(latents)
    assert revived.tolist() == list(range(2, 64))
    assert torch.equal(quantizer.embedding.weight[:2], before[:2])
    ids, feature_maps = quantizer.quantize(latents)
    assert len(ids.unique()) > 32
    error = (latents - feature_maps[-1]).square().mean()
    assert error < 0.5 * latents.square().mean()
    # A new code is left in peace until training has had time to draw it.
    assert len(quantizer.revive_codes(latents)) == 0


def test_codes_in_use_are_left_alone():
    quantizer, latents = _collapsed(codes_in_use=64)
    before = quantizer.embedding.weight.detach().clone()
    assert len(quantizer.revive_codes(latents)) == 0
    assert torch.equal(quantizer.embedding.weight, before)


def test_few_latents_revive_few_codes():
    quantizer, latents = _collapsed()
    revived = quantizer.revive_codes(latents[:1])
    assert 0 < len(revived) <= 1 + 4 + 16


def test_training_without_the_quantizer():
    model = MultiScaleVQModel(tokenizer_config())
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(pictures, quantize=False)
    assert output.quantization_loss == 0 and output.loss == output.reconstruction_loss
    assert torch.equal(output.reconstruction, model.decode_latents(model.encode_latents(pictures)))
    output.loss.backward()
    assert model.quantizer.embedding.weight.grad is None
