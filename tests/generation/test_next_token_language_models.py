"""Decodings on language models of transformers: what plain `generate` gives is what `next_token` gives."""

import copy

import pytest
import torch
from transformers import (
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation import BaseStreamer

import hf_argen
from hf_argen import NextToken, compatible_decodings

from ..helpers.language_models import EOS, KINDS, PAD, language_model, prompts
from ..helpers.tiny import byte_tokenizer

OPTIONS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.9},
    "with history": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "guided": {"do_sample": True, "temperature": 3.0, "guidance_scale": 1.6, "repetition_penalty": 1.2},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def model():
    return language_model()


def both(model, options, decoding="next_token", **inputs):
    """The same request by transformers and by ours, from the same seed."""
    inputs = {**prompts(), "max_new_tokens": 14, **inputs, **options}
    results = []
    for generate in (model.generate, lambda **kwargs: hf_argen.generate(model, decoding, **kwargs)):
        torch.manual_seed(5)
        results.append(generate(**copy.deepcopy(inputs)))
    return results


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens(kind, name):
    expected, found = both(language_model(kind), OPTIONS[name])
    assert torch.equal(found, expected)


def test_static_cache(model):
    expected, found = both(model, {"do_sample": False})
    static = hf_argen.generate(
        model, "next_token", **prompts(), max_new_tokens=14, do_sample=False, cache_implementation="static"
    )
    assert torch.equal(found, expected) and torch.equal(static, expected)


def test_embeddings_as_prompt(model):
    embeds = model.get_input_embeddings()(prompts()["input_ids"]).detach()
    inputs = {"inputs_embeds": embeds, "input_ids": None, "do_sample": False}
    expected, found = both(model, inputs)
    assert torch.equal(found, expected) and found.shape[1] <= 14


def test_negative_prompt(model):
    negative = {"negative_prompt_ids": prompts(3, 4)["input_ids"].clamp(min=4)}
    expected, found = both(model, {"guidance_scale": 2.0, "do_sample": False, **negative})
    without = both(model, {"guidance_scale": 2.0, "do_sample": False})[1]
    assert torch.equal(found, expected) and not torch.equal(found, without)


def test_details(model):
    options = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "do_sample": False,
    }
    expected, found = both(model, {**options, "repetition_penalty": 1.3})
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores) == found.steps == found.forward_calls
    for name in ("scores", "logits"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


class EvenToken(StoppingCriteria):
    """Stops a row after an even token that is not among its first few."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 2 == 0) & (input_ids.shape[1] > 9)


def test_custom_criterion(model):
    options = {"stopping_criteria": StoppingCriteriaList([EvenToken()]), "do_sample": False}
    expected, found = both(model, options)
    assert torch.equal(found, expected) and found.shape[1] < 21


class Heard(BaseStreamer):
    def __init__(self):
        self.values, self.has_ended = [], False

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.has_ended = True


def test_streamer(model):
    heard = []
    for generate in (model.generate, lambda **kwargs: hf_argen.generate(model, "next_token", **kwargs)):
        streamer = Heard()
        generate(**prompts(), max_new_tokens=14, do_sample=False, streamer=streamer)
        assert streamer.has_ended
        heard.append(streamer.values)
    assert len(heard[0]) == len(heard[1]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*heard, strict=True))


def test_texts(capsys):
    """Stop strings and a text streamer, by both ways to ask for a decoding."""
    tokenizer = byte_tokenizer()
    model = language_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    prompt = tokenizer("red apple", return_tensors="pt")["input_ids"]
    strange = [i for i in range(len(tokenizer)) if not tokenizer.decode(i).isalpha()]
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": strange,
    }
    free = model.generate(prompt, **options)
    word = tokenizer.decode(free[0, -4])
    expected = model.generate(prompt, **options, stop_strings=word, tokenizer=tokenizer)
    assert prompt.shape[1] < expected.shape[1] < free.shape[1]
    for config in (
        {"stop_strings": word},
        {"generation_config": GenerationConfig(**options, stop_strings=word)},
    ):
        found = hf_argen.generate(
            model, "next_token", input_ids=prompt, tokenizer=tokenizer, **{**options, **config}
        )
        assert torch.equal(found, expected)
    model.generation_config.stop_strings = [word]
    found = hf_argen.generate(model, "next_token", input_ids=prompt, tokenizer=tokenizer, **options)
    assert torch.equal(found, expected) and model.generation_config.stop_strings == [word]
    model.generation_config.stop_strings = None
    bound = NextToken().bind(tokenizer=tokenizer, stop_strings=word, streamer=TextStreamer(tokenizer))
    capsys.readouterr()
    assert torch.equal(model.generate(prompt, **options, custom_generate=bound), expected)
    assert tokenizer.decode(expected[0]).strip() in capsys.readouterr().out
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        hf_argen.generate(model, "next_token", input_ids=prompt, stop_strings=word)


def test_asked_for_by_transformers(model):
    expected = model.generate(**prompts(), max_new_tokens=14, do_sample=False)
    found = model.generate(**prompts(), max_new_tokens=14, do_sample=False, custom_generate=NextToken())
    assert torch.equal(found, expected)


def test_stored_decoding_is_used():
    model = language_model()
    NextToken().store(model.generation_config)
    output = hf_argen.generate(model, **prompts(), max_new_tokens=3, return_dict_in_generate=True)
    assert output.forward_calls == 3


def test_one_generator_per_row(model):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    inputs = prompts()
    options = {"decoding": "next_token", "do_sample": True, "max_new_tokens": 8, "eos_token_id": None}
    together = hf_argen.generate(model, **options, **inputs, generator=generators(5, 6, 7))
    alone = hf_argen.generate(
        model, **options, **{name: value[1:2] for name, value in inputs.items()}, generator=generators(6)
    )
    assert torch.equal(alone[0], together[1])
    with pytest.raises(ValueError, match="2 generators were given for 3 rows"):
        hf_argen.generate(model, **options, **inputs, generator=generators(5, 6))


REFUSED = {
    "num_beams": ({"num_beams": 2}, "num_beams > 1"),
    "use_cache": ({"use_cache": False}, "use_cache=False"),
    "cache": ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured(model, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"do not support {message}"):
        hf_argen.generate(model, "next_token", **prompts(), max_new_tokens=2, **options)


def test_models_that_do_not_fit():
    config = MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba = MambaForCausalLM(config)
    assert compatible_decodings(mamba) == []
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be decoded by 'next_token'"):
        hf_argen.generate(mamba, "next_token", input_ids=torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"cannot be decoded by 'next_scale'; it can by .*next_token"):
        hf_argen.generate(language_model(), "next_scale", **prompts())
    assert "next_token" in compatible_decodings(language_model())
    assert (PAD, EOS) == (0, 3)
