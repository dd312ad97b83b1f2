"""The causal form of MAR: one token at a time, row by row, with a cache of keys and values."""

import pytest
import torch

from hf_argen import DiffusionStepAnnealing, MarForImageGeneration, Masked
from hf_argen.generation.guidance import Guidance
from hf_argen.generation.predictors.masked import MaskedPredictor

from ..helpers.goldens import assert_close
from ..helpers.tiny import tiny_mar

TEXT = {"condition_type": "text", "text_embed_dim": 12, "num_buffer_tokens": 6}
FORMS = {
    "class": {},
    "prefix": {**TEXT, "text_conditioning": "prefix"},
    "cross_attention": {**TEXT, "text_conditioning": "cross_attention", "num_text_layers": 1},
    "patches": {"patch_size": 2, "grid_size": 2},
}


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def causal_model(form="class", **changes):
    torch.manual_seed(0)
    return tiny_mar(causal=True, **FORMS[form], **changes)


def conditions_of(form, size=2):
    if form in ("class", "patches"):
        return {"class_labels": torch.arange(size) + 1}
    mask = torch.arange(5)[None] < torch.tensor([5, 2])[:size, None]
    return {
        "prompt_embeds": torch.randn(size, 5, 12, generator=torch.Generator().manual_seed(0)),
        "prompt_attention_mask": mask.long(),
    }


@torch.no_grad()
def test_a_token_sees_those_before_it(form):
    model = causal_model(form)
    latents = torch.randn(2, 16, 4)
    hidden = model(latents=latents, **conditions_of(form)).last_hidden_state
    tokens = model.to_tokens(latents)
    count = tokens.shape[1]
    assert hidden.shape == (2, count, 32)
    changed = tokens.clone()
    changed[:, 2] += 1.0
    other = model(latents=model.from_tokens(changed), **conditions_of(form)).last_hidden_state
    moved = (other - hidden).abs().amax(dim=(0, 2))
    assert (moved[:3] < 1e-5).all() and (moved[3:] > 1e-4).all()


@torch.no_grad()
def test_cached_steps_are_the_whole_pass(form):
    """Guided: the paired rows of every step, rows of unequal captions included."""
    model = causal_model(form)
    latents = torch.randn(2, 16, 4)
    tokens = model.to_tokens(latents)
    expected = model(latents=latents, **conditions_of(form)).last_hidden_state
    predictor = MaskedPredictor(model, Guidance(2.0, "constant", neutral=1.0))
    predictor.start(conditions_of(form))
    for place in range(tokens.shape[1]):
        found = predictor.predict(positions=torch.full((2, 1), place))
        assert found.shape == (4, 1, 32)
        assert_close(found[:2, 0], expected[:, place], 1e-4)
        predictor.commit(tokens[:, place : place + 1], torch.full((2, 1), place))
        if place == 1:  # rows are repeated and removed with their keys and values
            predictor.fork(2)
            predictor.drop(torch.tensor([1, 3]))
    null = model.null_conditions(model.conditions(**conditions_of(form)))
    assert_close(found[2:, 0], model.model.next_states(tokens[:, :-1], 0, **null)[:, -1], 1e-4)


def test_generation(form):
    """By default row by row, the number of tokens in steps; with the schedule of DiSA, too."""
    model = causal_model(form)
    count = model.config.num_image_tokens
    options = {**conditions_of(form), "guidance_scale": 2.0, "return_dict_in_generate": True}
    output = model.generate(**options, do_sample=False)
    assert output.steps == output.forward_calls == count
    assert torch.equal(output.orders, torch.arange(count).expand(2, -1))
    assert output.head_calls == 5 * count
    drawn = model.generate(**options, generator=torch.Generator().manual_seed(0))
    again = model.generate(**options, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn.sequences, again.sequences) and torch.isfinite(drawn.sequences).all()
    decoding = DiffusionStepAnnealing(order="raster", most_head_steps=5, least_head_steps=2)
    assert model.generate(**options, decoding=decoding).head_calls < output.head_calls


def test_kept_rows_of_a_picture():
    model = causal_model()
    source, keep = torch.randn(1, 16, 4), torch.zeros(4, 4)
    keep[:2] = 1
    options = {"class_labels": [1, 2], "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**options, latents=source, keep_mask=keep)
    assert torch.equal(output.sequences[:, :8], source[:, :8].expand(2, -1, -1)) and output.steps == 8
    with pytest.raises(ValueError, match="it can keep the first tokens of a picture only"):
        model.generate(**options, latents=source, keep_mask=1 - keep)


def test_training_and_saving(tmp_path):
    model = causal_model("cross_attention")
    model.save_pretrained(tmp_path)
    loaded = MarForImageGeneration.from_pretrained(tmp_path).train()
    assert loaded.generation_config.decoding == {"type": "masked", "order": "raster"}
    latents = torch.randn(2, 16, 4)
    inputs = {"latents": latents, "labels": latents, **conditions_of("cross_attention")}
    output = loaded(**inputs)
    assert output.mask.all()
    output.loss.backward()
    for name, parameter in loaded.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_what_a_causal_model_cannot_do():
    model = causal_model()
    for decoding in (Masked(), Masked(order="raster", num_steps=4), Masked(order=list(range(16))[::-1])):
        with pytest.raises(
            ValueError, match="it draws one token at a time, row by row; take order='raster' and 16"
        ):
            model.generate([1], decoding=decoding)
    mask = torch.ones(1, 16)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="A causal model predicts all tokens; leave mask out"):
        model(latents=torch.randn(1, 16, 4), class_labels=torch.tensor([1]), mask=mask)
