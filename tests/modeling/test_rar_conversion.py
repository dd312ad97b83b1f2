"""Conversion of RAR: what the weights tell, what is left behind, contradictions, released sizes."""

import pytest
import torch

from hf_argen import convert_original
from hf_argen.modeling.conversion import load_presets
from hf_argen.modeling.key_map import Rows
from hf_argen.modeling.rar.convert_rar import CONVERTER, key_map

from ..helpers.goldens import golden


@pytest.fixture(scope="module", params=["b_like", "nonsquare_mlp"])
def case(request):
    return golden("rar", request.param)


@pytest.fixture(scope="module")
def model(case):
    return case.convert()


def test_without_the_authors_arguments(case):
    found, expected = case.convert(with_config=False).config, case.convert().config
    assert found.to_dict() == expected.to_dict()


@torch.no_grad()
def test_without_tokenizer(case, model):
    alone = convert_original("rar", case.files("transformer"), case.original_config())
    labels = case.tensors["labels"]
    output = alone.generate(labels, do_sample=False, return_dict_in_generate=True)
    assert output.images is None
    assert torch.equal(output.sequences, model.generate(labels, do_sample=False))


def test_rows_that_nothing_reads_are_not_kept(case, model):
    config = model.config
    sizes = {
        name: module.num_embeddings
        for name, module in model.model.named_children()
        if hasattr(module, "num_embeddings")
    }
    tokens = config.num_image_tokens
    assert sizes == {
        "embed_tokens": config.vocab_size,
        "class_embedding": config.num_classes + 1,
        "cls_embedding": 1,
        "position_embedding": tokens + 2,
        "target_position_embedding": tokens,
        "step_embedding": tokens + 2,
    }
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("image_tokenizer.")}
    found = key_map(config.vocab_size, config.num_classes, tokens).revert(own)
    expected = torch.load(case.files()["transformer"], weights_only=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        kept = found[name] != 0
        assert torch.equal(found[name][kept], tensor[kept]), name
        assert (
            kept.all()
            or name in ("embeddings.weight", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings")
            or not tensor[~kept].any()
        )


def test_rows_of_a_table():
    rule = Rows("table", 6, {"first": (0, 2), "last": (3, 5)}, is_batched=True)
    table = torch.arange(12.0).view(1, 6, 2)
    parts = rule.forward(table)
    assert [part.tolist() for part in parts] == [[[0, 1], [2, 3]], [[6, 7], [8, 9]]]
    back = rule.backward(parts)
    assert torch.equal(back[:, [0, 1, 3, 4]], table[:, [0, 1, 3, 4]]) and not back[:, [2, 5]].any()
    with pytest.raises(ValueError, match="must have 6 rows"):
        rule.forward(table[:, 1:])


@pytest.mark.parametrize(
    "block, change, message",
    [
        ("generator", {"num_hidden_layers": 4}, "says num_hidden_layers=4, but the weights say 3"),
        ("generator", {"image_seq_len": 9}, "says image_seq_len=9, but the weights say 16"),
        ("generator", {"intermediate_size": 100}, "says intermediate_size=100, but the weights say 128"),
        ("generator", {"condition_num_classes": 11}, "says condition_num_classes=11, but the weights say 10"),
        ("generator", {"depth": 4}, "unknown argument 'depth'"),
        ("vq_model", {"codebook_size": 32}, "says codebook_size=32, but the weights say 64"),
        ("vq_model", {"num_latent_tokens": 9}, "says num_latent_tokens=9, but the weights say 16"),
    ],
)
def test_contradictions(block, change, message):
    case = golden("rar", "b_like")
    config = case.original_config()["transformer"]
    config = {"transformer": {**config, block: {**config[block], **change}}}
    with pytest.raises(ValueError, match=message):
        convert_original("rar", case.files(), config)


def test_files_that_do_not_belong_together():
    one, other = golden("rar", "b_like"), golden("rar", "nonsquare_mlp")
    with pytest.raises(ValueError, match="trained on 64 codes, but the tokenizer has 32"):
        convert_original("rar", {**one.files("transformer"), **other.files("tokenizer")})
    with pytest.raises(ValueError, match="Unknown role 'experimen'"):
        convert_original("rar", one.files(), {"experimen": {}})
    with pytest.raises(ValueError, match=r"\['generator'\] must be a dict of arguments, not 24"):
        convert_original("rar", one.files(), {"transformer": {"generator": 24}})


def test_the_authors_sampling_options_are_kept():
    case = golden("rar", "b_like")
    config = case.original_config()
    generator = {
        **config["transformer"]["generator"],
        "randomize_temperature": 1.02,
        "guidance_scale": 6.9,
        "guidance_scale_pow": 1.5,
        "randomness_anneal_start": 10,
    }
    model = convert_original(
        "rar", case.files(), {**config, "transformer": {**config["transformer"], "generator": generator}}
    )
    found = model.generation_config
    assert (found.temperature, found.guidance_scale, found.do_sample) == (1.02, 6.9, True)
    assert found.guidance_schedule == {"type": "power_cosine", "power": 1.5}


@pytest.mark.parametrize("name", load_presets("hf_argen.modeling.rar"))
def test_released_sizes(name):
    """A file with the keys and shapes that the authors' arguments imply fills the model of the preset."""
    preset = load_presets("hf_argen.modeling.rar")[name]
    arguments = preset["original_config"]["transformer"]["generator"]
    width, mlp, heads = (
        arguments[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    shapes = {
        "cls_token": (1, 1, width),
        "embeddings.weight": (1024 + 1 + 1000 + 1, width),
        "pos_embed": (1, 256 + 1024, width),
        "target_aware_pos_embed": (1, 256 + 1024, width),
        "timesteps_embeddings": (1, 256 + 100, width),
    }
    linear = {"adaln_before_head.adaLN_modulation.1": (2 * width, width), "lm_head": (1024, width)}
    for i in range(arguments["num_hidden_layers"]):
        linear |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (mlp, width),
            f"blocks.{i}.mlp.fc2": (width, mlp),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
        norms = {"norm1": width, "norm2": width, "attn.q_norm": width // heads, "attn.k_norm": width // heads}
        for norm, size in norms.items():
            shapes |= {f"blocks.{i}.{norm}.weight": (size,), f"blocks.{i}.{norm}.bias": (size,)}
    for key, shape in linear.items():
        shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    plan = CONVERTER.plan({"transformer": weights}, preset["original_config"])
    with torch.device("meta"):
        expected = plan.model_class(plan.config).state_dict()
    found = plan.key_maps["transformer"].apply(weights)
    assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in expected.items()}
    assert plan.generation["guidance_schedule"]["power"] == 0.0
