"""`hf_argen.generate`, the entry for every model, and `custom_generate=` of transformers."""

import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

import hf_argen
from hf_argen import Decoding, MultiScaleVQModel, NextScale, compatible_decodings

from ..helpers.tiny import NEXT_TOKEN_FAMILIES, tiny_next_token, tiny_var, tokenizer_config

PROMPTS = torch.tensor([[1, 2, 3], [4, 5, 6]])
OPTIONS = {
    "input_ids": PROMPTS,
    "attention_mask": torch.ones_like(PROMPTS),
    "max_new_tokens": 4,
    "do_sample": False,
}
NO_FIT = "GPT2LMHeadModel cannot be decoded by 'next_scale'; it can by "


@pytest.fixture
def language_model():
    config = GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11, n_positions=16, bos_token_id=0)
    config.eos_token_id = config.pad_token_id = 10
    return GPT2LMHeadModel(config).eval()


def test_plain_decoding_of_a_language_model(language_model):
    expected = language_model.generate(**OPTIONS)
    assert torch.equal(hf_argen.generate(language_model, **OPTIONS), expected)


def test_decodings_that_do_not_fit_a_language_model(language_model):
    """Named, stored in a configuration or given to transformers: refused, never ignored."""
    assert "next_scale" not in compatible_decodings(language_model)
    for decoding in ("next_scale", NextScale(), {"type": "next_scale"}):
        with pytest.raises(ValueError, match=NO_FIT):
            hf_argen.generate(language_model, decoding, **OPTIONS)
    with pytest.raises(ValueError, match=NO_FIT):
        language_model.generate(**OPTIONS, custom_generate=NextScale())
    config = GenerationConfig(decoding={"type": "next_scale"})
    with pytest.raises(ValueError, match=NO_FIT):
        hf_argen.generate(language_model, generation_config=config, **OPTIONS)
    NextScale().store(language_model.generation_config)
    with pytest.raises(ValueError, match=NO_FIT):
        hf_argen.generate(language_model, **OPTIONS)


def test_a_language_model_stores_a_decoding(language_model, tmp_path):
    """For its own `generate` the entry is not there."""
    expected = language_model.generate(**OPTIONS)
    NextScale(smooth=True).store(language_model.generation_config)
    assert torch.equal(language_model.generate(**OPTIONS), expected)
    language_model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert stored["decoding"] == {"type": "next_scale", "smooth": True}
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert Decoding.from_config(loaded.generation_config) == NextScale(smooth=True)


def test_unknown_decodings(language_model):
    for model in (language_model, tiny_var()):
        with pytest.raises(ValueError, match=r"no decoding 'speculation'; known are "):
            hf_argen.generate(model, "speculation")
        with pytest.raises(TypeError, match="decoding is a int"):
            hf_argen.generate(model, 3)


def test_models_that_do_not_generate():
    for model in (MultiScaleVQModel(tokenizer_config()), tiny_var().model, torch.nn.Linear(1, 1)):
        assert compatible_decodings(model) == []
        with pytest.raises(TypeError, match=f"{type(model).__name__} does not generate"):
            hf_argen.generate(model, "next_scale")


def test_our_models():
    """The decoding of the call wins over that of its configuration, and this one over the stored one."""
    model = tiny_var()
    greedy = model.generate([1, 2], do_sample=False)
    one_code = {"type": "next_scale", "top_k": [1, 1, 1]}
    options = {"class_labels": [1, 2], "do_sample": True}
    assert torch.equal(hf_argen.generate(model, one_code, **options), greedy)
    assert torch.equal(hf_argen.generate(model, NextScale(top_k=[1, 1, 1]), **options), greedy)
    config = GenerationConfig(decoding=one_code)
    assert torch.equal(hf_argen.generate(model, generation_config=config, **options), greedy)
    model.generation_config.decoding = one_code
    assert torch.equal(hf_argen.generate(model, **options), greedy)
    plain = GenerationConfig(decoding={"type": "next_scale"})
    assert not torch.equal(hf_argen.generate(model, generation_config=plain, **options), greedy)
    assert not torch.equal(hf_argen.generate(model, "next_scale", **options), greedy)
    with pytest.raises(
        ValueError, match=r"'next_scale' goes to generate\(\) of VarForImageGeneration as decoding="
    ):
        NextScale()(model, class_labels=[1])


def test_values_of_numpy_and_tuples_are_stored_plainly():
    decoding = NextScale(top_k=(np.int64(3), 2, 1), temperature=(np.float32(0.5), 1, 1))
    stored = {"type": "next_scale", "top_k": [3, 2, 1], "temperature": [0.5, 1.0, 1.0]}
    assert json.loads(json.dumps(decoding.to_dict())) == stored
    assert Decoding.from_dict(stored) == decoding


@pytest.mark.parametrize("family", NEXT_TOKEN_FAMILIES)
def test_static_cache_of_pictures(family):
    """The prompt sees itself alone, not the empty places of the whole memory."""
    model = tiny_next_token(family)
    expected = model.generate([1, 2], guidance_scale=2.0, do_sample=False)
    found = model.generate([1, 2], guidance_scale=2.0, do_sample=False, cache_implementation="static")
    assert torch.equal(found, expected)
