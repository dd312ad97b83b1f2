"""The KL autoencoder against what MAR's code computed, and against diffusers."""

import pytest
import torch
from diffusers import AutoencoderKL

from hf_argen import KlVaeConfig, KlVaeModel, LlamaGenProcessor, convert_original
from hf_argen.modeling.conversion import load_presets
from hf_argen.modeling.tokenizers.kl_vae.convert_kl_vae import TOKENIZER

from ..helpers.goldens import assert_close, assert_same_image, golden
from ..helpers.tiny import kl_vae_config

PRESETS = "hf_argen.modeling.tokenizers.kl_vae"


@pytest.fixture(scope="module")
def case():
    return golden("mar", "kl16_vae_tiny")


@pytest.fixture(scope="module")
def tokenizer(case):
    return case.convert(family="kl_vae")


def in_rows(latent_map: torch.Tensor) -> torch.Tensor:
    """(batch, channels, h, w) as (batch, h * w, channels)."""
    return latent_map.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_encoder(case, tokenizer):
    tensors = case.tensors
    found = tokenizer.encode_latents(tensors["image"])
    assert_close(found.mean, tensors["mean"])
    assert_close(found.log_variance, tensors["logvar"])
    assert_close(found.divergence(), tensors["kl"])
    assert_close(torch.cat([found.mean, found.log_variance], dim=1), tensors["moments"])
    assert_close(tokenizer.encode(tensors["image"]), in_rows(tensors["mode"]) * 0.2325)
    rectangle = tokenizer.encode_latents(tensors["rect.image"])
    assert_close(torch.cat([rectangle.mean, rectangle.log_variance], dim=1), tensors["rect.moments"])


@torch.no_grad()
def test_drawn_latents(case, tokenizer):
    """The authors' seed, by the global generator and by one of our own."""
    tensors, seed = case.tensors, case.case["seeds"]["posterior_sample"]
    torch.manual_seed(seed)
    assert_close(tokenizer.encode(tensors["image"], sample=True), in_rows(tensors["latent_scaled"]))
    generator = torch.Generator().manual_seed(seed)
    found = tokenizer.encode_latents(tensors["image"]).sample(generator)
    assert_close(found, tensors["posterior_sample"])
    rows = [torch.Generator().manual_seed(i) for i in (3, 4)]
    together = tokenizer.encode(tensors["image"], sample=True, generator=rows)
    alone = tokenizer.encode(tensors["image"][1:], sample=True, generator=[torch.Generator().manual_seed(4)])
    assert torch.allclose(together[1:], alone, atol=1e-6)


@torch.no_grad()
def test_decoder(case, tokenizer):
    tensors = case.tensors
    assert_same_image(tokenizer.decode_latents(tensors["mode"]), tensors["reconstruction"])
    assert_same_image(tokenizer.decode_latents(tensors["generated_latent"]), tensors["generated_image"])
    scaled = in_rows(tensors["generated_latent_scaled"])
    expected = tensors["generated_image_from_scaled"]
    assert_same_image(tokenizer.decode(scaled), expected.clamp(-1, 1))
    assert_same_image(
        tokenizer.reconstruct(tensors["rect.image"]), tensors["rect.reconstruction"].clamp(-1, 1)
    )
    pictures = LlamaGenProcessor.postprocess(expected.add(1).mul(0.5))
    for picture, pixels in zip(pictures, tensors["generated_uint8"], strict=True):
        found = torch.tensor(list(picture.tobytes())).view(pixels.shape)
        assert torch.equal(found, pixels)


def test_keys_go_both_ways(case, tokenizer):
    original = torch.load(case.files()["tokenizer"], weights_only=True)["model"]
    theirs = TOKENIZER.revert(tokenizer.state_dict())
    assert theirs.keys() == original.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in original.items())


@pytest.mark.parametrize("kind", ["flat", "trainer"])
def test_other_files(case, tokenizer, tmp_path, kind):
    content = torch.load(case.files()["tokenizer"], weights_only=True)
    content = content["model"] if kind == "flat" else {**content, "epoch": 3}
    torch.save(content, tmp_path / "vae.ckpt")
    model = convert_original("kl_vae", {"tokenizer": str(tmp_path / "vae.ckpt")})
    expected = tokenizer.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("variational", [True, False])
def test_diffusers_computes_the_same(variational):
    """Another implementation of the same network; it has attention in the middle only."""
    torch.manual_seed(0)
    ours = KlVaeModel(
        kl_vae_config(encoder_attention_levels=[], variational=variational, num_res_blocks=2)
    ).eval()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4, **blocks
    ).eval()
    theirs.load_state_dict({diffusers_name(key): squeezed(key, t) for key, t in padded(ours).items()})
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    found = ours.encode_latents(pixels)
    expected = theirs.encode(pixels).latent_dist
    assert_close(found.mean, expected.mean)
    if variational:
        assert_close(found.log_variance, expected.logvar)
        assert_close(found.divergence(), expected.kl())
    assert_close(ours.decode_latents(found.mean), theirs.decode(expected.mean).sample)


def padded(model) -> dict[str, torch.Tensor]:
    """Weights with the variance that a model without does not have, as zeros."""
    state = model.state_dict()
    if not model.config.variational:
        for key in ("quant_conv.weight", "quant_conv.bias"):
            state[key] = torch.cat([state[key], torch.zeros_like(state[key])])
    return state


def diffusers_name(key: str) -> str:
    """The name that diffusers gives one of our weights."""
    part, _, rest = key.partition(".")
    words = rest.split(".")
    if words[0] == "up_blocks":
        words[1] = str(1 - int(words[1]))
    renamed = {
        "downsample": "downsamplers.0.conv",
        "upsample": "upsamplers.0.conv",
        "shortcut": "conv_shortcut",
        "resnet_1": "resnets.0",
        "resnet_2": "resnets.1",
        "attention": "attentions.0",
        "norm_out": "conv_norm_out",
    }
    inner = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}
    if "attention" in words:
        words[-2] = inner[words[-2]]
    return ".".join([part, *(renamed.get(word, word) for word in words)])


def squeezed(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Its attention has linear layers where ours has 1x1 convolutions."""
    return tensor[:, :, 0, 0] if ".attention." in key and tensor.ndim == 4 else tensor


def test_training_terms():
    torch.manual_seed(0)
    model = KlVaeModel(kl_vae_config(kl_loss_weight=0.1)).eval()
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    output = model(pixels)
    found = model.encode_latents(pixels)
    assert torch.allclose(output.reconstruction, model.decode_latents(found.mean))
    assert torch.allclose(output.kl_loss, 0.1 * found.divergence().sum() / found.mean.numel())
    normal = torch.distributions.Normal(found.mean, (0.5 * found.log_variance).exp())
    unit = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(normal, unit).sum(dim=(1, 2, 3))
    assert torch.allclose(found.divergence(), expected, rtol=1e-4)
    assert torch.equal(output.loss, output.reconstruction_loss + output.kl_loss)
    model.train()
    assert not torch.equal(model(pixels).reconstruction, model(pixels).reconstruction)


# Bad input


def test_no_latent_scale(case):
    model = KlVaeModel(kl_vae_config(latent_scale=None)).eval()
    assert torch.isfinite(model(torch.zeros(1, 3, 8, 8)).loss)  # trains all the same
    for call in (lambda: model.encode(torch.zeros(1, 3, 8, 8)), lambda: model.decode(torch.zeros(1, 16, 4))):
        with pytest.raises(
            ValueError, match="has no latent_scale; set it to one over the standard deviation"
        ):
            call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latent_scale": 0}, "latent_scale is 0; it must be a number above 0"),
        ({"encoder_attention_levels": [2]}, "names level 2; there are the levels 0 to 1"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"base_channels": 6}, "norm_num_groups=4 does not divide"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        kl_vae_config(**change)


@pytest.mark.parametrize(
    "latents, message",
    [
        (torch.zeros(1, 16, 3), r"have the shape \(1, 16, 3\); a grid of 4x4 needs \(batch, 16, 4\)"),
        (torch.zeros(1, 15, 4), r"a grid of 3x3 needs \(batch, 9, 4\)"),
        (torch.zeros(1, 4, 4, 4), "have the shape"),
        (torch.zeros(1, 16, 4, dtype=torch.long), "has no codes to look up"),
    ],
)
def test_bad_latents(latents, message):
    with pytest.raises(ValueError, match=message):
        KlVaeModel(kl_vae_config()).decode(latents)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ch_mult": [1, 1]}, r"says ch_mult=\[1, 1\], but the weights say \[1, 2\]"),
        ({"embed_dim": 8}, "says embed_dim=8, but the weights say 4"),
        ({"use_variational": False}, "says use_variational=False, but the weights say True"),
        ({"encoder_attn_resolutions": []}, r"there is attention in the levels \[1\]"),
        ({"depth": 4}, "unknown argument 'depth'"),
        ({"norm_num_groups": 7}, "not a multiple of norm_num_groups=7"),
    ],
)
def test_contradictions(case, change, message):
    config = {"tokenizer": {**case.original_config()["tokenizer"], **change}}
    with pytest.raises(ValueError, match=message):
        convert_original("kl_vae", case.files(), config)


def test_without_the_authors_arguments(case, tokenizer):
    assert case.convert(family="kl_vae", with_config=False).config.to_dict() == tokenizer.config.to_dict()


def test_the_released_size():
    """Of the preset, on the meta device: the parameters of a file of 254 MB in float32."""
    arguments = load_presets(PRESETS)["kl-vae-16"]["original_config"]["tokenizer"]
    with torch.device("meta"):
        model = KlVaeModel(KlVaeConfig(latent_scale=0.2325))
    assert model.config.channel_multiplier == arguments["ch_mult"]
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert abs(size / 2**20 - 254) < 2
