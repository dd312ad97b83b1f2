"""MAR against what the authors' code computed."""

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from hf_argen import MarConfig, MarForImageGeneration, convert_original
from hf_argen.auto import new_processor
from hf_argen.modeling.conversion import load_presets
from hf_argen.modeling.mar.convert_mar import TRANSFORMER

from ..helpers.goldens import assert_close, golden, states_equal
from ..helpers.tiny import kl_vae_config, llamagen_vq_config, mar_config, tiny_mar


@pytest.fixture(scope="module", params=["mar_tiny", "mar_tiny_patch2"])
def case(request):
    return golden("mar", request.param)


@pytest.fixture(scope="module")
def model(case):
    return case.convert()


def latents_of(case) -> torch.Tensor:
    """The recorded latents in our layout."""
    return case.tensors["latents"].flatten(2).transpose(1, 2)


def test_patches(case, model):
    latents = latents_of(case)
    assert torch.equal(model.to_tokens(latents), case.tensors["patchified"])
    assert torch.equal(model.from_tokens(model.to_tokens(latents)), latents)


@torch.no_grad()
def test_encoder_and_decoder(case, model):
    tensors = case.tensors
    mask = tensors["mask"].bool()
    visible = torch.argsort(mask.byte(), dim=1, stable=True)[:, : int((~mask[0]).sum())]
    tokens = tensors["patchified"]
    seen = tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    conditions = model.conditions(class_labels=tensors["labels"])
    assert_close(model.model.encode(seen, visible, **conditions), tensors["encoder_out"])
    assert_close(model.model(seen, visible, **conditions).last_hidden_state, tensors["z"])
    null = model.null_conditions(conditions)
    assert_close(model.model(seen, visible, **null).last_hidden_state, tensors["uncond.z"])
    nothing = (seen[:, :0], visible[:, :0])
    assert_close(model.model.encode(*nothing, **conditions), tensors["all_masked.encoder_out"])
    assert_close(model.model(*nothing, **conditions).last_hidden_state, tensors["all_masked.z"])
    output = model(latents=latents_of(case), class_labels=tensors["labels"], mask=mask)
    assert_close(output.last_hidden_state, tensors["z"])
    assert output.loss is None


@torch.no_grad()
def test_rows_of_unequal_length(case, model):
    """Padding changes nothing: every row is what it is alone."""
    tokens = case.tensors["patchified"][:2]
    total = tokens.shape[1]
    visible = torch.stack([torch.arange(5), torch.tensor([1, 3, total, total, total])])
    valid = visible < total
    seen = tokens.gather(1, visible.clamp(max=total - 1).unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    conditions = model.conditions(class_labels=case.tensors["labels"][:2])
    together = model.masked_hidden_states(seen, visible, conditions, valid)
    for row, count in enumerate((5, 2)):
        own = {name: value[row : row + 1] for name, value in conditions.items()}
        alone = model.masked_hidden_states(
            seen[row : row + 1, :count], visible[row : row + 1, :count], own, None
        )
        assert_close(together[row : row + 1], alone, 1e-5)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_loss_and_gradients(case, mode):
    """With the authors' seeds: numpy's for orders and share of hidden tokens, torch's for the rest."""
    model, tensors = case.convert().train(mode == "train"), case.tensors
    seed = case.case["seeds"][f"loss_{mode}"]
    np.random.seed(seed)
    torch.manual_seed(seed)
    latents = latents_of(case)
    output = model(latents=latents, class_labels=tensors["labels"], labels=latents)
    assert torch.equal(output.mask.long(), tensors[f"loss_{mode}.mask"])
    assert_close(output.loss, tensors[f"loss_{mode}.value"])
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = TRANSFORMER.revert(gradients)
    compared = [key for key in tensors if key.startswith(f"loss_{mode}.grad.")]
    assert len(compared) >= 2
    for key in compared:
        assert_close(theirs[key.removeprefix(f"loss_{mode}.grad.")], tensors[key], 2e-4)


def test_dropped_conditions(case):
    """The authors' uniform numbers decide."""
    model, tensors = case.convert().train(), case.tensors
    uniform = tensors["loss_train.label_drop_uniform"]
    torch.manual_seed(case.case["seeds"]["loss_train"])
    dropped = model.draw_dropped_conditions(len(uniform), torch.device("cpu"))
    assert torch.equal(dropped, uniform < model.config.condition_dropout)


# Conversion


def test_keys_go_both_ways(case, model):
    original = torch.load(case.files()["transformer"], weights_only=True)
    for name in ("model_ema", "model"):
        theirs = TRANSFORMER.revert(TRANSFORMER.apply(original[name]))
        assert theirs.keys() == original[name].keys()
        assert all(torch.equal(theirs[key], tensor) for key, tensor in original[name].items())


@torch.no_grad()
def test_wrapped_forms(case, model, tmp_path):
    """The average by default, the raw weights by their role; trainers' files, flat files and safetensors."""
    file = case.files()["transformer"]
    raw = convert_original(
        "mar", {"transformer_raw": file}, {"transformer": case.original_config()["transformer"]}
    )
    output = raw(
        latents=latents_of(case), class_labels=case.tensors["labels"], mask=case.tensors["mask"].bool()
    )
    if "raw.z" in case.tensors:
        assert_close(output.last_hidden_state, case.tensors["raw.z"])
    assert not states_equal(raw, model)
    content = torch.load(file, weights_only=True)
    trained = {**content, "optimizer": {}, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(trained, tmp_path / "trained.pth")
    torch.save(content["model_ema"], tmp_path / "flat.pth")
    save_file(content["model_ema"], tmp_path / "flat.safetensors")
    for name in ("trained.pth", "flat.pth", "flat.safetensors"):
        converted = convert_original("mar", {"transformer": str(tmp_path / name)}, case.original_config())
        assert states_equal(converted, model)
    torch.save({"model": content["model"]}, tmp_path / "raw.pth")
    converted = convert_original("mar", {"transformer": str(tmp_path / "raw.pth")}, case.original_config())
    assert states_equal(converted, raw)


def test_with_the_autoencoder(case, tmp_path):
    """Both in one model, from which the patch size follows; saved, loaded, and used in parts."""
    autoencoder = golden("mar", "kl16_vae_tiny")
    arguments = dict(case.original_config()["transformer"])
    del arguments["patch_size"], arguments["vae_embed_dim"], arguments["vae_stride"], arguments["img_size"]
    model = convert_original(
        "mar",
        {**case.files(), **autoencoder.files()},
        {"transformer": arguments, **autoencoder.original_config()},
    )
    expected = case.original_config()["transformer"]
    assert model.config.patch_size == expected["patch_size"]
    assert model.image_tokenizer.config.latent_scale == 0.2325
    assert model.image_tokenizer.config.grid_sizes == [model.config.latent_grid]
    model.save_pretrained(tmp_path)
    assert states_equal(MarForImageGeneration.from_pretrained(tmp_path), model)
    assert states_equal(AutoModel.from_pretrained(tmp_path), model.model)
    assert new_processor(model.config).image_size == (expected["img_size"],) * 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder_depth": 5}, "says encoder_depth=5, but the weights say 2"),
        ({"class_num": 3}, "says class_num=3"),
        ({"buffer_size": 3}, "says buffer_size=3"),
        ({"diffloss_w": 16}, "says diffloss_w=16"),
        ({"img_size": 64}, "says img_size=64"),
        ({"mlp_ratio": 2.0}, "says mlp_ratio=2.0"),
        ({"vae_embed_dim": 3}, "no square of latents with 3 channels"),
        ({"encoder_num_heads": 5}, "encoder_num_heads=5, which does not divide the width"),
        ({"norm_layer": "LayerNorm eps 1e-5"}, "layer norms with eps 1e-6"),
        ({"num_sampling_steps": "2000"}, "a training of 1000 steps has 1000 for 2000 of them"),
        ({"depth": 5}, "unknown argument 'depth'"),
    ],
)
def test_contradictions(case, change, message):
    config = {"transformer": {**case.original_config()["transformer"], **change}}
    with pytest.raises(ValueError, match=message):
        convert_original("mar", case.files(), config)


def test_what_the_weights_do_not_tell(case):
    with pytest.raises(ValueError, match=r"do not tell its attention heads; give .*\['encoder_num_heads'\]"):
        convert_original("mar", case.files())


@pytest.mark.parametrize("name, millions", [("base", 208), ("large", 479), ("huge", 943)])
def test_released_sizes(name, millions):
    """The presets' arguments give models of the size that the paper states."""
    arguments = load_presets("hf_argen.modeling.mar")[f"mar-{name}"]["original_config"]["transformer"]
    config = MarConfig(
        image_tokenizer_config=None,
        hidden_size=arguments["encoder_embed_dim"],
        num_hidden_layers=arguments["encoder_depth"],
        num_attention_heads=arguments["encoder_num_heads"],
        intermediate_size=arguments["encoder_embed_dim"] * arguments["mlp_ratio"],
        head_config={
            "type": "diffusion",
            "width": arguments["diffloss_w"],
            "depth": arguments["diffloss_d"],
        },
    )
    with torch.device("meta"):
        model = MarForImageGeneration(config)
    found = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert abs(found - millions) < 1


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_config": {"type": "diffusoin"}}, r"the type 'diffusoin' \(did you mean 'diffusion'\?\)"),
        ({"head_config": {"width": 8}}, "give the head's name as 'type'"),
        ({"head_config": {"type": "diffusion", "layers": 2}}, "A diffusion head has no option layers"),
        ({"head_config": {"type": "diffusion", "depth": 0}}, "depth of the diffusion head is 0"),
        ({"head_config": {"type": "diffusion", "num_sampling_steps": 1001}}, "1000 steps has 1000 for 1001"),
        ({"image_tokenizer_config": llamagen_vq_config()}, "takes tokenizers with a grid of latents"),
        ({"hidden_size": 33}, "hidden_size=33 is not a multiple of num_attention_heads=2"),
        ({"decoder_hidden_size": 31}, "decoder_hidden_size=31 is not a multiple of decoder_num"),
        ({"min_mask_ratio": 1.5}, "min_mask_ratio is 1.5"),
        ({"patch_size": 0}, "patch_size is 0"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        MarForImageGeneration(mar_config(**change))


def test_head_and_checkpoint_do_not_match(tmp_path):
    model = tiny_mar()
    model.save_pretrained(tmp_path)
    other = mar_config(head_config={**model.config.head_config, "depth": 2})
    with pytest.raises(ValueError, match=r"do not fit MarForImageGeneration: missing head\.net\.blocks\.1"):
        MarForImageGeneration.from_pretrained(tmp_path, config=other)


def test_tokenizers_that_do_not_fit():
    model = tiny_mar()
    fitting = type(model.image_tokenizer)(kl_vae_config())
    model.image_tokenizer = fitting
    assert fitting.config.grid_size == 4
    for change, message in (
        ({"latent_channels": 8}, "latent_channels is 4 in the model and 8 in its image tokenizer"),
        ({"grid_size": 8}, r"is \(4, 4\) in the model and \(8, 8\) in its image tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            model.image_tokenizer = type(fitting)(kl_vae_config(**change))
