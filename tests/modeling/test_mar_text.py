"""How MAR reads captions: pooled, as a prefix, by cross-attention (Fluid, arXiv 2410.13863)."""

import pytest
import torch

from hf_argen import Masked

from ..helpers.tiny import mar_config, text_encoder_config, tiny_mar

FORMS = ("pooled", "prefix", "cross_attention")
TEXT = {"condition_type": "text", "text_embed_dim": 12, "num_buffer_tokens": 6}


def captions(*lengths, tokens=6):
    """Embeddings of captions of so many tokens, padded, and their mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
    embeds = torch.randn(len(lengths), tokens, 12, generator=generator)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask.long()}


def text_model(form, **changes):
    torch.manual_seed(0)
    return tiny_mar(**TEXT, text_conditioning=form, **changes)


def hidden(model, **prompt):
    """Hidden states of a picture whose even tokens are known."""
    size = len(next(iter(prompt.values())))
    mask = (torch.arange(16) % 2 == 1).expand(size, -1)
    latents = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(2)).expand(size, -1, -1)
    with torch.no_grad():
        return model(latents=latents, mask=mask, **prompt).last_hidden_state


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_text_layers", [0, 2])
def test_padding_says_nothing(form, num_text_layers):
    """Captions of unequal length, each as it is read alone and without padding."""
    if form == "pooled" and num_text_layers:
        return
    model = text_model(form, num_text_layers=num_text_layers)
    prompt = captions(6, 3, 1)
    together = hidden(model, **prompt)
    for row, length in enumerate((6, 3, 1)):
        alone = hidden(model, prompt_embeds=prompt["prompt_embeds"][row : row + 1, :length])
        assert torch.allclose(together[row : row + 1], alone, atol=1e-4)
    changed = {**prompt, "prompt_embeds": prompt["prompt_embeds"].clone()}
    changed["prompt_embeds"][1, 2] += 1.0
    moved = (hidden(model, **changed) - together).abs().amax(dim=(1, 2))
    assert moved[1] > 1e-3 and moved[0] < 1e-5 and moved[2] < 1e-5


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_order_of_words_counts(form):
    """Unlike a pooled caption, tokens in another order are another caption: to a prefix by its positions."""
    model = text_model(form, num_text_layers=1)
    embeds = captions(4, tokens=4)["prompt_embeds"]
    moved = (hidden(model, prompt_embeds=embeds) - hidden(model, prompt_embeds=embeds.flip(1))).abs().max()
    if form == "prefix":
        assert moved > 1e-3
    else:  # positions are the text encoder's matter
        assert moved < 1e-4


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_null_text(form):
    """What guidance pairs is what dropped rows are trained on, whatever their caption."""
    model = text_model(form)
    prompt = captions(5, 2)
    drop = torch.tensor([True, False])
    conditions = model.conditions(**prompt, drop=drop)
    kept, null = model.conditions(**prompt), None
    null = model.null_conditions(kept)
    places = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 4)
    found, plain, empty = (
        model.masked_hidden_states(places[1], places[0], one, None) for one in (conditions, kept, null)
    )
    assert torch.allclose(found[0], empty[0], atol=1e-5) and torch.allclose(found[1], plain[1], atol=1e-5)
    assert torch.allclose(empty[0], empty[1], atol=1e-5) and not torch.allclose(plain[0], empty[0], atol=1e-3)
    nothing = model.conditions(batch_size=2)
    unconditional = model.masked_hidden_states(places[1], places[0], nothing, None)
    assert torch.allclose(unconditional, empty, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_generation(form):
    """Guided, from a text encoder inside the model; without guidance the null text is not read."""
    encoder = text_encoder_config(12, hidden_size=12)
    model = text_model(form, text_encoder_config=encoder)
    ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
    prompt = {"prompt_ids": ids, "prompt_attention_mask": (ids > 0).long()}
    options = {"decoding": Masked(num_steps=3), "do_sample": False}
    guided = model.generate(**prompt, **options, guidance_scale=2.0)
    assert guided.shape == (2, 16, 4) and torch.isfinite(guided).all()
    plain = model.generate(**prompt, **options, guidance_scale=1.0)
    assert not torch.allclose(guided, plain, rtol=1e-2)
    assert model.generate(**options).shape == (1, 16, 4)  # without a caption
    loss = model.train()(latents=torch.randn(2, 16, 4), labels=torch.randn(2, 16, 4), **prompt).loss
    loss.backward()
    assert model.model.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_conditioning": "adapter"}, "text_conditioning is 'adapter'; known are pooled, prefix"),
        ({"num_text_layers": 2}, "num_text_layers is 2; only models that read the tokens of captions"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        mar_config(**{**TEXT, **change})


def test_bad_prompts():
    model = text_model("prefix")
    with pytest.raises(ValueError, match="A prompt has 7 tokens; this model reads 6 at most"):
        model.generate(prompt_embeds=torch.randn(1, 7, 12))
    with pytest.raises(
        ValueError, match="draws from text; give prompt_ids or prompt_embeds, not class_labels"
    ):
        model.generate([1])
    with pytest.raises(ValueError, match=r"prompt_embeds have the shape \(1, 4, 3\)"):
        model.generate(prompt_embeds=torch.randn(1, 4, 3))
