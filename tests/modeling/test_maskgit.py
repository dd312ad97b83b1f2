"""TiTok's generators against what the authors' code computed, their conversion, and bad input."""

import pytest
import torch
from safetensors.torch import load_file

from hf_argen import MaskGitConfig, MaskGitForImageGeneration, TitokModel, convert_original
from hf_argen.auto import new_processor
from hf_argen.modeling.conversion import load_presets
from hf_argen.modeling.maskgit.convert_maskgit import ANY_GENERATOR, key_map

from ..helpers.goldens import assert_close, golden
from ..helpers.tiny import kl_vae_config, maskgit_config, maskgit_vq_config, tiny_maskgit, titok_config

PRESETS = load_presets("hf_argen.modeling.maskgit")


@pytest.fixture(scope="module", params=["l32_like", "s128_like"])
def case(request):
    return golden("titok", request.param)


@pytest.fixture(scope="module")
def model(case):
    return case.convert()


def layers_of(model):
    """In the order in which they run."""
    inner = model.model
    if model.config.architecture == "bert":
        return list(inner.layers)
    return [*inner.in_layers, inner.mid_layer, *inner.out_layers]


@torch.no_grad()
def test_teacher_forced_pass(case, model):
    """Embeddings, the output of every layer, logits with and without class, the loss."""
    tensors, seen = case.tensors, []
    layers = layers_of(model)
    hooks = [layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda module, inputs, out: seen.append(out)) for layer in layers]
    given = {"input_ids": tensors["tokens"], "mask": tensors["mask"]}
    output = model(**given, class_labels=tensors["labels"], labels=tensors["tokens"])
    for hook in hooks:
        hook.remove()
    assert_close(seen[0], tensors["embed"])
    for i, state in enumerate(seen[1:]):
        assert_close(state, tensors[f"gen_block_{i}"])
    assert len(seen) == 1 + sum(name.startswith("gen_block") for name in tensors)
    assert_close(output.logits, tensors["cond_logits"])
    assert_close(output.loss, tensors["mlm_loss"])
    unconditional = model(**given, class_labels=torch.full_like(tensors["labels"], -1))
    assert_close(unconditional.logits, tensors["uncond_logits"])


def test_the_authors_seeds_hide_their_tokens(case, model):
    torch.manual_seed(case.case["seeds"]["masking"])
    mask = model.draw_mask(len(case.tensors["tokens"]), torch.device("cpu"))
    assert torch.equal(mask, case.tensors["mask"].bool())
    hidden = case.tensors["tokens"].masked_fill(mask, model.model.mask_id)
    assert torch.equal(hidden, case.tensors["masked_tokens"])


def test_labels_that_do_not_count():
    model = tiny_maskgit(label_smoothing=0.0, known_token_weight=0.0)
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]])
    labels = ids.clone()
    labels[0, 0] = -100
    output = model(input_ids=ids, class_labels=torch.tensor([1, 2]), labels=labels, mask=mask)
    counted = [(0, 2), (1, 1), (1, 4)]
    log_probs = output.logits.log_softmax(dim=-1)
    expected = -sum(log_probs[row, place, ids[row, place]] for row, place in counted) / 3
    assert_close(output.loss, expected)


# Conversion


def stored(case):
    path = case.files()["generator"]
    is_file = path.endswith(".bin")
    return torch.load(path, weights_only=True) if is_file else load_file(f"{path}/model.safetensors")


def test_keys_go_both_ways(case, model):
    config = model.config
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("image_tokenizer.")}
    rules = key_map(config.architecture, config.vocab_size, config.num_classes)
    found, expected = rules.revert(own), stored(case)
    assert found.keys() == expected.keys() and not ANY_GENERATOR.unknown(expected)
    for name, tensor in expected.items():
        if name.endswith("token_type_embeddings.weight"):  # of which the second row is never read
            found[name], tensor = found[name][:1], tensor[:1]
        assert torch.equal(found[name], tensor), name


def test_what_is_converted(case, model):
    """The same under the generators' own name, without the authors' arguments, without tokenizer, and the tokenizer alone."""
    assert type(model) is MaskGitForImageGeneration and type(model.image_tokenizer) is TitokModel
    config = case.original_config()
    again = convert_original("maskgit", case.files(), config)
    assert again.config.to_dict() == model.config.to_dict()
    heads = {"num_attention_heads": model.config.num_attention_heads}
    alone = convert_original("titok", case.files("generator"), {"generator": heads})
    labels = case.tensors["labels"]
    options = {"do_sample": False, "guidance_scale": 0.0, "return_dict_in_generate": True}
    output = alone.generate(labels, **options)
    assert output.images is None
    expected = model.generate(labels, **options, decoding=alone.generation_config.decoding)
    assert torch.equal(output.sequences, expected.sequences)
    config = {role: config[role] for role in ("tokenizer", "pixel_tokenizer")}
    assert type(convert_original("maskgit", case.files("tokenizer"), config)) is TitokModel


def test_the_recipe_goes_along(case, model):
    block = case.original_config()["generator"]["model"]["generator"]
    config = model.generation_config
    assert config.do_sample and config.guidance_scale == block["guidance_scale"]
    power = {"type": "power_cosine", "power": 3.0}
    assert config.guidance_schedule == (power if block["guidance_decay"] == "power-cosine" else "linear")
    decoding = config.decoding
    assert decoding["num_steps"] == block["num_steps"]
    assert decoding["randomize_temperature"] == block["randomize_temperature"]
    assert decoding["order"] == "confidence" and decoding["softmax_temperature_annealing"]


@pytest.mark.parametrize("name", PRESETS)
def test_released_sizes(name):
    preset = PRESETS[name]
    block = preset["original_config"]["generator"]["model"]["generator"]
    config = MaskGitConfig(
        image_tokenizer_config=None,
        num_image_tokens=block["image_seq_len"],
        architecture={"ViT": "bert", "UViT": "uvit"}[block["model_type"]],
        hidden_size=block["hidden_size"],
        num_hidden_layers=block["num_hidden_layers"],
        intermediate_size=block["intermediate_size"],
    )
    with torch.device("meta"):
        model = MaskGitForImageGeneration(config)
    # Counted from the authors' layers: 24 of 7.1 million each; 21 of 12.6 and 10 skips of 2.1; embeddings and head.
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(
        {"l-32": 177, "b-64": 177, "s-128": 295}[name.removeprefix("maskgit-titok-")], rel=0.02
    )
    assert preset["generation_config"]["decoding"]["num_steps"] == block["num_steps"]
    own = {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items() if "embed" in key}
    assert not ANY_GENERATOR.unknown(key_map(config.architecture, 4096, 1000).revert(own))


@pytest.mark.parametrize(
    "place, change, message",
    [
        (("model", "generator"), {"num_hidden_layers": 5}, "says num_hidden_layers=5, but the weights say 2"),
        (("model", "generator"), {"image_seq_len": 9}, "says image_seq_len=9, but the weights say 8"),
        (
            ("model", "generator"),
            {"condition_num_classes": 9},
            "says condition_num_classes=9, but the weights",
        ),
        (("model", "generator"), {"model_type": "UViT"}, "says model_type=UViT, but the weights say ViT"),
        (("model", "generator"), {"num_attention_heads": 5}, "num_attention_heads=5, which does not divide"),
        (("model", "generator"), {"guidance_decay": "cosine"}, "guidance_decay='cosine'; known are constant"),
        (("model", "generator"), {"depth": 5}, "unknown argument 'depth'"),
        (("model", "vq_model"), {"codebook_size": 9}, "says codebook_size=9, but the weights say 64"),
    ],
)
def test_contradictions(place, change, message):
    case = golden("titok", "l32_like")
    outer, inner = place
    config = case.original_config()["generator"]
    block = {**config[outer], inner: {**config[outer][inner], **change}}
    with pytest.raises(ValueError, match=message):
        convert_original("titok", case.files("generator"), {"generator": {**config, outer: block}})


def test_files_that_do_not_belong_together():
    one, other, vae = (golden("titok", name) for name in ("l32_like", "s128_like", "bl_vae_like"))

    def convert(tokens):
        config = {**tokens.original_config(), "generator": one.original_config()["generator"]}
        convert_original("titok", {**one.files("generator"), **tokens.files("tokenizer")}, config)

    with pytest.raises(ValueError, match="trained on 64 codes, but the tokenizer has 40"):
        convert(other)
    with pytest.raises(ValueError, match="latents without codes, but the generator draws codes"):
        convert(vae)
    with pytest.raises(ValueError, match="Unknown role 'generato'"):
        convert_original("titok", {**one.files("tokenizer"), "generato": "x"})
    with pytest.raises(ValueError, match="must hold the block model as a dict, not 3"):
        convert_original("titok", one.files("generator"), {"generator": {"model": 3}})


# Configurations


def test_tokens_come_from_the_tokenizer():
    row = maskgit_config()
    assert (row.vocab_size, row.num_image_tokens, row.grid_sizes, row.image_size) == (16, 5, [(1, 5)], [8, 8])
    grid = maskgit_config(image_tokenizer_config=maskgit_vq_config(), grid_size=[2, 4])
    assert (grid.vocab_size, grid.num_image_tokens, grid.image_size) == (16, 8, [4, 8])
    assert new_processor(row).image_size == (8, 8) and new_processor(grid).image_size == (4, 8)
    alone = maskgit_config(image_tokenizer_config=None)
    assert (alone.vocab_size, alone.num_image_tokens, alone.image_size) == (4096, 32, [256, 256])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "vit"}, "architecture is 'vit'; known are bert, uvit"),
        (
            {"architecture": "uvit", "num_hidden_layers": 3},
            "num_hidden_layers is 3; a uvit has as many layers",
        ),
        ({"hidden_size": 33}, "hidden_size=33 is not a multiple of num_attention_heads=2"),
        ({"grid_size": 4}, "grid_size is 4; the tokens of a 'titok' tokenizer are no grid"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must lie in"),
        (
            {"image_tokenizer_config": kl_vae_config()},
            "is of type 'kl_vae'; this model takes tokenizers of one row",
        ),
        (
            {
                "image_tokenizer_config": titok_config(
                    quantization="vae", legacy=False, pixel_decoder_config=None
                )
            },
            "quantization='vae', latents without codes",
        ),
        (
            {"image_tokenizer_config": maskgit_vq_config(), "grid_size": 4, "num_image_tokens": 5},
            "num_image_tokens is 5; the grid of 4x4 has 16",
        ),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        maskgit_config(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codebook_size": 17}, "vocab_size is 16 in the model and 17 in its image tokenizer"),
        ({"num_latent_tokens": 6}, "num_image_tokens is 5 in the model and 6 in its image tokenizer"),
    ],
)
def test_tokenizers_that_do_not_fit(change, message):
    model = tiny_maskgit()
    with pytest.raises(ValueError, match=message):
        model.image_tokenizer = TitokModel(titok_config(**change))
