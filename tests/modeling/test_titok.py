"""TiTok's tokenizers against what the authors' code computed."""

import pytest
import torch

from hf_argen import RarProcessor, TitokConfig, TitokModel, convert_original
from hf_argen.modeling.conversion import load_presets
from hf_argen.modeling.tokenizers.titok.convert_titok import LATER, LEGACY

from ..helpers.goldens import assert_close, assert_same_image, golden
from ..helpers.tiny import maskgit_vq_config, titok_config

VQ = ["l32_like", "s128_like", "bl_vq8k_like"]
NAMES = [*VQ, "bl_vae_like"]


def convert(case, **changes):
    """The tokenizer of a case; its generator is left out."""
    config = {
        role: arguments
        for role, arguments in case.original_config().items()
        if role in ("tokenizer", "pixel_tokenizer") and arguments
    }
    if changes:
        given = config["tokenizer"]
        block = {**given["model"]["vq_model"], **changes}
        config["tokenizer"] = {**given, "model": {"vq_model": block}}
    return convert_original("titok", case.files("tokenizer"), config)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return golden("titok", request.param)


@pytest.fixture(scope="module")
def tokenizer(case):
    return convert(case)


def ours(image):
    """Pixels of the authors, in [0, 1], in our range."""
    return image * 2 - 1


def theirs(pixels):
    return pixels.add(1).mul(0.5)


def seen_by(layers, call):
    """The inputs of the first of some layers and the outputs of all, while `call` runs."""
    seen = []
    hooks = [layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))]
    hooks += [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output)) for layer in layers
    ]
    call()
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_encoder(case, tokenizer):
    tensors = case.tensors
    pixels = ours(tensors["image"])
    states = seen_by(tokenizer.encoder.layers, lambda: tokenizer.encode_latents(pixels))
    assert_close(states[0], tensors["enc_tokens"])
    for i, state in enumerate(states[1:]):
        assert_close(state, tensors[f"enc_block_{i}"])
    latents = tokenizer.encode_latents(pixels)
    assert_close(latents, tensors["latent"].squeeze(2))
    if "indices" in tensors:
        ids = tokenizer.encode(pixels)
        assert torch.equal(ids, tensors["indices"].squeeze(1))
        assert_close(tokenizer.quantizer.embed(ids).flatten(0, 1), tensors["entry"])
        codes = tokenizer.quantizer(latents.transpose(1, 2).unsqueeze(1))[0]
        assert_close(codes.squeeze(1).transpose(1, 2), tensors["quantized"].squeeze(2))
    else:
        assert_close(tokenizer.encode(pixels).transpose(1, 2), tensors["mean"].squeeze(2))
        torch.manual_seed(case.case["seeds"]["encode"])
        drawn = tokenizer.encode(pixels, sample=True)
        assert_close(drawn.transpose(1, 2), tensors["sample"].squeeze(2))


@torch.no_grad()
def test_decoder(case, tokenizer):
    tensors = case.tensors
    is_vq = "indices" in tensors
    tokens = tensors["indices"].squeeze(1) if is_vq else tensors["sample"].squeeze(2).transpose(1, 2)
    states = seen_by(tokenizer.decoder.layers, lambda: tokenizer.decode(tokens))
    assert_close(states[0], tensors["dec_tokens"])
    for i, state in enumerate(states[1:]):
        assert_close(state, tensors[f"dec_block_{i}"])
    codes = tokenizer.quantizer.embed(tokens) if is_vq else tokens
    assert_same_image(theirs(tokenizer.decode_latents(codes)), tensors["recon"])
    assert_same_image(theirs(tokenizer.decode(tokens)), tensors["recon"].clamp(0, 1))
    if is_vq:
        quantized = tensors["quantized"].squeeze(2).transpose(1, 2)
        expected = tensors["recon_from_quantized"].clamp(0, 1)
        assert_same_image(theirs(tokenizer.decode(quantized)), expected)
    else:
        mean = tensors["mean"].squeeze(2).transpose(1, 2)
        assert_same_image(theirs(tokenizer.decode(mean)), tensors["recon_mean"].clamp(0, 1))


def test_pil_images_are_cut_not_rounded():
    tensors = golden("titok", "l32_like").tensors
    for image, expected in zip(
        RarProcessor.postprocess(tensors["sampled_image"]), tensors["sampled_uint8"], strict=True
    ):
        assert torch.equal(torch.tensor(list(image.tobytes())).view(expected.shape), expected)


def test_keys_go_both_ways(tokenizer):
    key_map = LEGACY if tokenizer.config.legacy else LATER
    state = tokenizer.state_dict()
    again = key_map.apply(key_map.revert(state))
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("name", load_presets("hf_argen.modeling.tokenizers.titok"))
def test_presets_name_whole_configurations(name):
    """With the sizes that the authors' names stand for."""
    preset = load_presets("hf_argen.modeling.tokenizers.titok")[name]
    block = preset["original_config"]["tokenizer"]["model"]["vq_model"]
    widths = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
    encoder, decoder = widths[block["vit_enc_model_size"]], widths[block["vit_dec_model_size"]]
    config = TitokConfig(
        num_latent_tokens=block["num_latent_tokens"],
        latent_channels=block["token_size"],
        quantization=block.get("quantize_mode", "vq"),
        codebook_size=block.get("codebook_size", 4096),
        legacy=block.get("is_legacy", True),
        hidden_size=encoder[0],
        num_hidden_layers=encoder[1],
        num_attention_heads=encoder[2],
        decoder_hidden_size=decoder[0],
        decoder_num_hidden_layers=decoder[1],
        decoder_num_attention_heads=decoder[2],
    )
    with torch.device("meta"):
        model = TitokModel(config)
    letters = name.split("-")[1]
    assert letters in (block["vit_enc_model_size"][0] + block["vit_dec_model_size"][0], letters[0])
    assert model.latent_embedding.weight.shape == (int(name.split("-")[2]), encoder[0])


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_latent_tokens": 3}, "says num_latent_tokens=3, but the weights say 8"),
        ({"codebook_size": 3}, "says codebook_size=3, but the weights say 64"),
        ({"is_legacy": False}, "says is_legacy=False, but the weights say True"),
        ({"vit_enc_patch_size": 8}, "says vit_enc_patch_size=8, but the weights say 4"),
        ({"quantize_mode": "vae"}, "says quantize_mode=vae, but the weights say vq"),
        ({"vit_enc_num_heads": 5}, "vit_enc_num_heads=5, which does not divide the width 32"),
        ({"depth": 5}, "unknown argument 'depth'"),
    ],
)
def test_contradictions(change, message):
    with pytest.raises(ValueError, match=message):
        convert(golden("titok", "l32_like"), **change)


def test_what_the_weights_do_not_tell():
    with pytest.raises(ValueError, match=r"give original_config\['tokenizer'\]\['vit_enc_num_heads'\]"):
        convert_original("titok", golden("titok", "l32_like").files("tokenizer"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 9}, "image_size=9 is not a multiple of patch_size=2"),
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of num_attention_heads=2"),
        ({"quantization": "lfq"}, "quantization is 'lfq'; it must be 'vq' or 'vae'"),
        ({"legacy": False}, "pixel_decoder_config is given, but only legacy=True"),
        ({"pixel_decoder_config": maskgit_vq_config(channel_multiplier=[1, 1, 1])}, "draws 4 pixels a side"),
        ({"latent_scale": 0.0}, "latent_scale is 0.0"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        titok_config(**change)


def test_latents_have_no_codes():
    config = titok_config(quantization="vae", legacy=False, pixel_decoder_config=None)
    with pytest.raises(ValueError, match="has no codes to look up"):
        TitokModel(config).decode(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected \(batch, 5, 4\)"):
        TitokModel(config).decode(torch.zeros(1, 4, 4))
