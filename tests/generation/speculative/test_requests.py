"""Everything that `generate` takes: streamers, criteria, stop strings, generators, stored decodings, details."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

import hf_argen
from hf_argen import Chain, Decoding, DraftModel, DynamicTree, NGram, OptTree, SpeculativeDecoding, StaticTree

from ...helpers.language_models import NAMES, language_model, prompts
from ...helpers.tiny import byte_tokenizer, spread

SMALL_TREE = StaticTree([[0], [1], [0, 0], [0, 0, 0]])


@pytest.fixture(scope="module")
def models():
    return language_model(), language_model(num_hidden_layers=1)


@pytest.fixture(params=[Chain(4), SMALL_TREE, DynamicTree(8, 2, 3)], ids=["chain", "static", "dynamic"])
def decoding(request, models):
    return SpeculativeDecoding(models[1], request.param)


class Heard(BaseStreamer):
    def __init__(self):
        self.values, self.has_ended = [], False

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.has_ended = True


def test_streamer(models, decoding):
    """Every token once all unfinished rows have it, in order, as one at a time."""
    heard = []
    for chosen in ("next_token", decoding):
        streamer = Heard()
        inputs = {**prompts(), "max_new_tokens": 12, "do_sample": False}
        hf_argen.generate(models[0], chosen, **inputs, streamer=streamer)
        assert streamer.has_ended
        heard.append(streamer.values)
    assert len(heard[0]) == len(heard[1]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*heard, strict=True))


class EvenToken(StoppingCriteria):
    """Stops a row after an even token that is not among its first few."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 2 == 0) & (input_ids.shape[1] > 9)


def test_rows_stop_where_they_would_have(models, decoding):
    inputs = {**prompts(4), "max_new_tokens": 14, "do_sample": False}
    criteria = StoppingCriteriaList([EvenToken()])
    expected = models[0].generate(**inputs, stopping_criteria=criteria)
    found = hf_argen.generate(models[0], decoding, **inputs, stopping_criteria=criteria)
    assert torch.equal(found, expected) and found.shape[1] < 21


def test_stop_strings():
    tokenizer = byte_tokenizer()
    model = language_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    prompt = tokenizer("red apple", return_tensors="pt")["input_ids"]
    options = {"input_ids": prompt, "max_new_tokens": 14, "do_sample": False, "no_repeat_ngram_size": 1}
    options["suppress_tokens"] = [i for i in range(len(tokenizer)) if not tokenizer.decode(i).isalpha()]
    free = model.generate(**options)
    word = tokenizer.decode(free[0, -4])
    expected = model.generate(**options, stop_strings=word, tokenizer=tokenizer)
    for decoding in (SpeculativeDecoding(model, Chain(5)), SpeculativeDecoding(model, SMALL_TREE)):
        found = hf_argen.generate(model, decoding, **options, stop_strings=word, tokenizer=tokenizer)
        assert torch.equal(found, expected) and found.shape[1] < free.shape[1]
        bound = decoding.bind(tokenizer=tokenizer, stop_strings=word)
        assert torch.equal(model.generate(**options, custom_generate=bound), expected)


def test_asked_for_by_transformers(models, decoding):
    inputs = {**prompts(), "max_new_tokens": 10, "do_sample": False}
    expected = models[0].generate(**inputs)
    assert torch.equal(models[0].generate(**inputs, custom_generate=decoding), expected)


def test_stored_in_the_generation_config(models, tmp_path):
    """By the names of folders; what was stored is used, and comes back equal."""
    small, target = models[1], language_model()
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="never saved or loaded"):
        SpeculativeDecoding(small).to_dict()
    folder = str(tmp_path / "small")
    decoding = SpeculativeDecoding(DraftModel(folder), OptTree(nodes=6), give_up_below=1.0)
    stored = {
        "type": "speculative_decoding",
        "drafter": {"type": "draft_model", "model": folder},
        "tree": {"type": "opt_tree", "nodes": 6},
        "give_up_below": 1.0,
    }
    assert decoding.to_dict() == stored and Decoding.from_dict(stored) == decoding
    decoding.store(target.generation_config)
    target.save_pretrained(tmp_path / "target")
    again = type(target).from_pretrained(tmp_path / "target")
    inputs = {**prompts(), "max_new_tokens": 6, "do_sample": False}
    output = hf_argen.generate(again, **inputs, return_dict_in_generate=True)
    assert output.accept_lengths is not None
    assert torch.equal(output.sequences, target.generate(**inputs))


def test_details(models, decoding):
    """Scores and logits of every token, calls of both models, and what each step gained."""
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    inputs = {**prompts(), "max_new_tokens": 10, "do_sample": False, "eos_token_id": None, **options}
    expected = models[0].generate(**inputs, repetition_penalty=1.3)
    found = hf_argen.generate(models[0], decoding, **inputs, repetition_penalty=1.3)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert found.accept_lengths.shape == (3, found.steps - 1)
    assert found.accept_lengths.sum(dim=1).tolist() == [9, 9, 9]  # the first token comes with the prompt
    assert found.forward_calls > found.steps


def test_one_generator_per_row(models, decoding):
    """A row draws the same whatever the batch around it."""

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    inputs = prompts()
    options = {
        "decoding": SpeculativeDecoding(NGram()),
        "do_sample": True,
        "max_new_tokens": 8,
        "eos_token_id": None,
    }
    together = hf_argen.generate(models[0], **options, **inputs, generator=generators(5, 6, 7))
    row = {name: value[1:2] for name, value in inputs.items()}
    assert torch.equal(
        together, hf_argen.generate(models[0], **options, **inputs, generator=generators(5, 6, 7))
    )
    assert hf_argen.generate(models[0], **options, **row, generator=generators(6)).shape == (1, 15)
    seeded = [
        hf_argen.generate(
            models[0],
            decoding,
            **inputs,
            do_sample=True,
            max_new_tokens=6,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


def test_qwen2():
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(1)
    model, small = (
        spread(Qwen2ForCausalLM(Qwen2Config(**NAMES, **shape, num_hidden_layers=layers))) for layers in (2, 1)
    )
    inputs = {**prompts(), "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(**inputs)
    for tree in (Chain(3), DynamicTree(8, 2, 3)):
        assert torch.equal(hf_argen.generate(model, SpeculativeDecoding(small, tree), **inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """It runs, and drafts of the model itself are accepted nearly always."""
    model = language_model().to(dtype)
    inputs = {**prompts(2), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for tree in (Chain(3), SMALL_TREE):
        output = hf_argen.generate(
            model, SpeculativeDecoding(model, tree), **inputs, return_dict_in_generate=True
        )
        lengths = output.accept_lengths
        assert lengths[lengths > 0].float().mean() > 2
