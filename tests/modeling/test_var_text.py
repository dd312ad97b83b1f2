"""The text-conditional form of VAR: a pooled text embedding takes the class embedding's place."""

import pytest
import torch
from transformers import AutoProcessor

from hf_argen import AutoModelForImageGeneration, VarForImageGeneration, VarProcessor

from ..helpers.tiny import PROMPTS, spread, text_tokenizer, text_var_config, var_config


@pytest.fixture(scope="module")
def processor():
    return VarProcessor(tokenizer=text_tokenizer(), image_size=(16, 16))


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(1)
    return spread(VarForImageGeneration(text_var_config(len(processor.tokenizer))))


def test_pictures_follow_the_prompt(model, processor):
    options = {"guidance_scale": 2.0, "do_sample": False}
    ids = model.generate(**processor(PROMPTS[:2]), **options)
    assert ids.shape == (2, 21)
    assert not torch.equal(ids[0], ids[1])
    alone = model.generate(**processor(PROMPTS[1]), **options)
    assert torch.equal(alone[0], ids[1])  # padding beside a longer prompt changes nothing


def test_prompt_embeds_are_what_the_encoder_gives(model, processor):
    inputs = processor(PROMPTS)
    pooled = model.model.pool_text(**inputs)
    assert pooled.shape == (4, 24)
    expected = model.generate(**inputs, do_sample=False)
    assert torch.equal(model.generate(prompt_embeds=pooled, do_sample=False), expected)
    tokens = model.model.text_encoder(inputs["prompt_ids"], inputs["prompt_attention_mask"]).last_hidden_state
    by_token = model.generate(
        prompt_embeds=tokens, prompt_attention_mask=inputs["prompt_attention_mask"], do_sample=False
    )
    assert torch.equal(by_token, expected)


def test_without_prompt_the_null_text_draws(model):
    ids = model.generate(num_return_sequences=2, do_sample=False)
    null = model.model.null_text_embedding.weight
    assert torch.equal(ids, model.generate(prompt_embeds=null.expand(2, -1), do_sample=False))


def test_condition_dropout_replaces_the_text_by_the_null_text(model, processor):
    inputs = processor(PROMPTS)
    drop = torch.tensor([True, False, False, True])
    mixed = model.condition(**inputs, drop=drop)
    assert torch.allclose(mixed[drop], model.null_condition(2), atol=1e-6)
    assert torch.allclose(mixed[~drop], model.condition(**inputs)[~drop], atol=1e-6)


def test_the_text_encoder_is_trained(model, processor):
    model.train()
    output = model(pixel_values=torch.rand(4, 3, 16, 16) * 2 - 1, **processor(PROMPTS))
    output.loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    model.eval()
    assert without == []


def test_save_and_load_with_processor(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = (
        AutoModelForImageGeneration.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    options = {"guidance_scale": 2.0, "do_sample": False}
    expected = model.generate(**processor(PROMPTS), **options)
    assert torch.equal(loaded.generate(**loaded_processor(PROMPTS), **options), expected)


def test_embeddings_from_outside():
    """Without a text encoder, as in VAR-CLIP, pooled embeddings are given."""
    model = spread(VarForImageGeneration(var_config(condition_type="text", text_embed_dim=12)))
    assert model.generate(prompt_embeds=torch.randn(3, 12), guidance_scale=1.0).shape == (3, 21)
    with pytest.raises(ValueError, match=r"shape \(3, 7\); this model takes \(batch, 12\)"):
        model.generate(prompt_embeds=torch.randn(3, 7))
    with pytest.raises(ValueError, match="no text encoder; give prompt_embeds"):
        model.generate(prompt_ids=torch.ones(1, 3, dtype=torch.long))


def test_wrong_kind_of_condition(model):
    with pytest.raises(ValueError, match="draws from text"):
        model.generate([1])
    with pytest.raises(ValueError, match="needs text_embed_dim or text_encoder_config"):
        var_config(condition_type="text")
    with pytest.raises(ValueError, match="'class' or 'text'"):
        var_config(condition_type="prompt")
