"""The released VAR-d16 at its exact size: 256x256 pixels, 680 tokens, the recipe behind the published FID."""

import importlib.util
import json

import pytest
import torch

from hf_argen import convert_original

from ..helpers.goldens import assert_close, assert_same_image, golden


@pytest.fixture(scope="module")
def case():
    return golden("var", "released_d16_256_recipe")


@pytest.fixture(scope="module")
def model(case, tmp_path_factory):
    """The files are too large to store; the case rebuilds them, number by number, from written seeds."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", case.path / "make_checkpoint.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    folder = tmp_path_factory.mktemp("released")
    names = {"transformer": "var_d16.pth", "tokenizer": "vae_ch160v4096z32.pth"}
    for name, state_dict in recipe.build(json.loads((case.path / "manifest.json").read_text())).items():
        torch.save(state_dict, folder / name)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield convert_original("var", {role: folder / name for role, name in names.items()})
    torch.set_num_threads(threads)
    for name in names.values():
        (folder / name).unlink()


@torch.no_grad()
def test_tokenizer_and_teacher_forced_pass(case, model):
    tensors = case.tensors
    image = tensors["tok.image_small"].repeat_interleave(8, 2).repeat_interleave(8, 3)
    latents = model.image_tokenizer.encode_latents(image)
    ids, feature_maps = model.image_tokenizer.quantizer.quantize(latents)
    assert_close(latents, tensors["tok.f"])
    assert torch.equal(ids, tensors["tok.ids"])
    assert_close(feature_maps[-1], tensors["tok.f_hat_last"])
    assert_same_image(model.image_tokenizer.decode(ids)[..., 3::8, 3::8], tensors["tok.recon_s8"])

    positions = tensors["tf.positions"]
    output = model(input_ids=ids, class_labels=tensors["tf.labels"], labels=ids, output_hidden_states=True)
    for layer in (0, 7, 15):
        assert_close(output.hidden_states[layer + 1][:, positions], tensors[f"tf.block{layer}"])
    assert_close(output.logits[:, positions], tensors["tf.logits"])
    assert_close(output.logits.logsumexp(dim=-1), tensors["tf.logsumexp"])
    assert torch.equal(output.logits.argmax(dim=-1), tensors["tf.argmax"])
    assert_close(output.loss.view(1), tensors["tf.loss"])


@pytest.mark.parametrize("tag", ["greedy", "sample"])
def test_generation(case, model, tag):
    recipe = dict(case.case["generation"][tag])
    output = model.generate(
        980,
        guidance_scale=recipe["cfg"],
        top_k=recipe["top_k"],
        top_p=recipe["top_p"],
        do_sample=True,
        generator=torch.Generator().manual_seed(recipe["g_seed"]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = case.tensors
    assert torch.equal(output.sequences, expected[f"{tag}.ids"])
    assert_same_image(output.images[..., 3::8, 3::8], expected[f"{tag}.image_s8"])
    assert_close(output.feature_maps[-1], expected[f"{tag}.f_hat"])
    assert_close(output.logits[:, expected["tf.positions"]], expected[f"{tag}.logits_pos"])
