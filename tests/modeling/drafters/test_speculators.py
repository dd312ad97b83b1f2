"""EAGLE-3 in the form of the library speculators."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_argen
from hf_argen import Chain, Eagle, EagleConfig, SpeculativeDecoding
from hf_argen.modeling.checkpoints import ConversionError

from ...helpers.language_models import language_model, prompts

LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {**LAYER, "vocab_size": 40, "draft_vocab_size": 24, "has_embedding": False}
SWITCHES = [
    {},
    {"qk_norm": True, "norm_before_residual": True, "feature_layers": [1, 3, 5]},
    {"norm_before_fc": True, "norm_output": True, "rope_factor": 2.0},
    {"fc_norm": True, "attention_bias": False, "head_dim": 16, "has_embedding": True},
]


@pytest.fixture(scope="module")
def target():
    return language_model("llama", num_hidden_layers=7)


def new_eagle(**options):
    torch.manual_seed(0)
    eagle = Eagle(EagleConfig(version=3, **{**SIZES, **options})).eval()
    for name, parameter in eagle.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    if eagle.draft_ids is not None:
        ids = torch.randperm(40)[:24].sort().values
        eagle.d2t.copy_(ids - torch.arange(24))
    return eagle


def drafted(eagle):
    """Logits from features of the language model, and then from its own."""
    generator = torch.Generator().manual_seed(1)
    features, embeds = (torch.randn(2, 5, size, generator=generator) for size in (96, 32))
    with torch.no_grad():
        first = eagle(features, inputs_embeds=embeds)
        return first.logits, eagle(first.last_hidden_state, inputs_embeds=embeds).logits


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_round_trip(target, switches, tmp_path):
    eagle = new_eagle(**switches)
    eagle.save_speculators(tmp_path, target)
    again = Eagle.from_pretrained(str(tmp_path))
    for one, other in zip(drafted(eagle), drafted(again), strict=True):
        assert torch.equal(one, other)
    fields = ("qk_norm", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "feature_layers")
    for name in (*fields, "rope_factor", "rope_theta", "draft_vocab_size", "has_embedding", "head_dim"):
        assert getattr(again.config, name) == getattr(eagle.config, name), name
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["t2d"].nonzero()[:, 0].tolist() == eagle.draft_ids.tolist()
    inputs = {**prompts(), "max_new_tokens": 6, "do_sample": False}
    decoding = SpeculativeDecoding(again, Chain(2))
    assert torch.equal(hf_argen.generate(target, decoding, **inputs), target.generate(**inputs))


def by_hand(folder, **changes):
    """A folder as speculators writes it: only what differs from the layer's class is in its configuration."""
    config = {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": 24,
        "eagle_aux_hidden_state_layer_ids": None,
        "embed_requires_grad": False,
        "fc_norm": False,
        "norm_before_fc": False,
        "norm_before_residual": True,
        "norm_output": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": 5,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "meta-llama/Llama-3"},
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "target_hidden_size": None,
        "transformer_layer_config": {
            **LAYER,
            "model_type": "llama",
            "num_hidden_layers": 1,
            "vocab_size": 40,
            "rope_theta": 500.0,
            "head_dim": 8,
        },
    }
    shapes = {
        "embed_tokens": (40, 32),
        "fc": (32, 96),
        "layers.0.self_attn.q_proj": (32, 64),
        "layers.0.self_attn.k_proj": (16, 64),
        "layers.0.self_attn.v_proj": (16, 64),
        "layers.0.self_attn.o_proj": (32, 32),
        "layers.0.mlp.gate_proj": (48, 32),
        "layers.0.mlp.up_proj": (48, 32),
        "layers.0.mlp.down_proj": (32, 48),
        "layers.0.hidden_norm": (32,),
        "layers.0.input_layernorm": (32,),
        "layers.0.post_attention_layernorm": (32,),
        "norm": (32,),
        "lm_head": (24, 32),
    }
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()
    }
    ids = torch.arange(0, 40)[8:32]
    tensors["d2t"] = ids - torch.arange(24)
    tensors["t2d"] = torch.isin(torch.arange(40), ids)
    config["transformer_layer_config"] |= changes.pop("layer", {})
    tensors |= changes.pop("tensors", {})
    for name in changes.pop("without", ()):
        del tensors[name]
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_a_folder_of_theirs(target, tmp_path):
    tensors = by_hand(tmp_path)
    eagle = Eagle.from_pretrained(tmp_path)
    config = eagle.config
    assert (config.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (500.0, 1e-6, 2048)
    assert config.norm_before_residual and config.has_embedding and not config.qk_norm
    assert config.base_model_name_or_path == "meta-llama/Llama-3"
    assert eagle.draft_ids.tolist() == list(range(8, 32))
    assert torch.equal(eagle.midlayer.self_attn.k_proj.weight, tensors["layers.0.self_attn.k_proj.weight"])
    # One position by hand: with a single key, attention is the value.
    features, token = torch.randn(1, 1, 96), torch.tensor([[9]])

    def norm(x, name):
        weight = tensors[f"{name}.weight"]
        return x * (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T

    hidden = norm(linear(features, "fc"), "layers.0.hidden_norm")
    embeds = norm(tensors["embed_tokens.weight"][token], "layers.0.input_layernorm")
    value = linear(torch.cat([embeds, hidden], dim=-1), "layers.0.self_attn.v_proj")
    value = value.view(1, 1, 2, 8).repeat_interleave(2, dim=2).flatten(2)
    hidden = hidden + linear(value, "layers.0.self_attn.o_proj")
    inner = norm(hidden, "layers.0.post_attention_layernorm")
    gate = torch.nn.functional.silu(linear(inner, "layers.0.mlp.gate_proj"))
    hidden = hidden + linear(gate * linear(inner, "layers.0.mlp.up_proj"), "layers.0.mlp.down_proj")
    with torch.no_grad():
        output = eagle(features, token)
    assert torch.allclose(output.last_hidden_state, hidden, atol=1e-4)
    assert torch.allclose(output.logits, linear(norm(hidden, "norm"), "lm_head"), atol=1e-4)
    inputs = {**prompts(), "max_new_tokens": 6, "do_sample": False}
    expected = target.generate(**inputs)
    assert torch.equal(hf_argen.generate(target, SpeculativeDecoding(eagle), **inputs), expected)


def test_folders_that_are_refused(tmp_path):
    for changes, message in (
        ({"speculators_model_type": "mtp"}, "a speculator of the type 'mtp'; only 'eagle3' is known"),
        ({"layer": {"model_type": "gpt2"}}, "one of 'gpt2'; known are llama, qwen3"),
        ({"layer": {"num_hidden_layers": 2}}, "has 2 layers; EAGLE-3 has one"),
        ({"layer": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}}, "'dynamic'; only linear"),
        ({"without": ["d2t"]}, "d2t is missing"),
        ({"without": ["fc.weight"]}, r"fc.weight is missing, it should be \(32, 96\)"),
        ({"tensors": {"layers.0.mlp.up_proj.bias": torch.zeros(48)}}, "up_proj.bias is .*should be absent"),
    ):
        by_hand(tmp_path, **changes)
        with pytest.raises(ConversionError, match=message):
            Eagle.from_pretrained(tmp_path)


def test_what_cannot_be_written(target, tmp_path):
    first = Eagle(EagleConfig(version=1, **LAYER, vocab_size=40))
    with pytest.raises(ValueError, match="no form for version 1 of Eagle"):
        first.save_speculators(tmp_path, target)
    with pytest.raises(ValueError, match=r"reads the hidden states \[1, 2, 7\], the last of them after"):
        new_eagle(feature_layers=[1, 2, 7]).save_speculators(tmp_path, target)
    with pytest.raises(ValueError, match="norm_before_fc and fc_norm are both true"):
        new_eagle(norm_before_fc=True, fc_norm=True)
