"""LlamaGen's tokenizer against what the authors' code computed."""

import pytest
import torch

from hf_argen import convert_original
from hf_argen.modeling.tokenizers.llamagen_vq.convert_llamagen_vq import key_map

from ..helpers.goldens import assert_close, assert_same_image, golden


@pytest.fixture(scope="module")
def case():
    return golden("llamagen", "vq_tiny")


@pytest.fixture(scope="module")
def tokenizer(case):
    return case.convert()


@torch.no_grad()
def test_encoder_and_ids(case, tokenizer):
    tensors = case.tensors
    assert_close(tokenizer.encoder(tensors["image"]), tensors["enc_out"])
    assert_close(tokenizer.encode_latents(tensors["image"]), tensors["pre_quant"])
    ids = tokenizer.encode(tensors["image"])
    assert torch.equal(ids.flatten(), tensors["indices"])
    assert torch.equal(tokenizer.encode(tensors["image_b"]).flatten(), tensors["indices_b"])
    assert_close(tokenizer.quantizer.embed(tensors["codes"]).flatten(0, 1), tensors["codebook_lookup"])


@torch.no_grad()
def test_pictures(case, tokenizer):
    tensors = case.tensors
    ids = tensors["indices"].view(2, -1)
    for codes, name in ((ids, "recon_from_indices"), (tensors["codes"], "image_from_codes")):
        assert_same_image(tokenizer.decode(codes), tensors[name].clamp(-1, 1))
    assert_close(tokenizer.decode_latents(tensors["quant"]), tensors["recon"])
    wide = tokenizer.decode(tensors["indices_b"][None], grid_size=(3, 5))
    assert_same_image(wide, tensors["recon_b"].clamp(-1, 1))
    assert torch.equal(tokenizer.reconstruct(tensors["image_b"]), wide)
    with pytest.raises(ValueError, match="15 ids make no square"):
        tokenizer.decode(tensors["indices_b"][None])


def test_training(case):
    model, tensors = case.convert().train(), case.tensors
    output = model(tensors["image"])
    assert_close(output.reconstruction, tensors["train_recon"])
    assert_close(output.codebook_loss, tensors["train_vq_loss"])
    assert_close(output.commitment_loss, tensors["train_commit_loss"])
    assert_close(output.entropy_loss, tensors["train_entropy_loss"])
    assert_close(output.loss, tensors["train_total"])
    output.loss.backward()
    gradients = key_map(2).revert({name: p.grad for name, p in model.named_parameters()})
    for name, key in (
        ("encoder_conv_in", "encoder.conv_in.weight"),
        ("codebook", "quantize.embedding.weight"),
        ("decoder_conv_out", "decoder.conv_out.weight"),
    ):
        assert_close(gradients[key], tensors[f"train_grad_{name}"], relative=2e-4)


@torch.no_grad()
def test_both_weights_of_a_training_checkpoint():
    case = golden("llamagen", "vq_train_ckpt_ema")
    file = case.files()["tokenizer"]
    for role, name in (("tokenizer", "model"), ("tokenizer_ema", "ema")):
        tokenizer = convert_original("llamagen", {role: file}, case.original_config())
        ids = tokenizer.encode(case.tensors["image"])
        assert torch.equal(ids.flatten(), case.tensors[f"indices_{name}"])
        assert_same_image(tokenizer.decode(ids), case.tensors[f"recon_{name}"].clamp(-1, 1))


def test_a_codebook_of_another_size():
    """Transformer and tokenizer that were not made for each other."""
    transformer, tokenizer = golden("llamagen", "c2i_fsdp_flat"), golden("llamagen", "vq_tiny")
    with pytest.raises(ValueError, match="trained on 100 codes, but the tokenizer has 128"):
        convert_original("llamagen", {**transformer.files(), **tokenizer.files()})
