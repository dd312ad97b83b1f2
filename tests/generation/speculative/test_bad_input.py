"""What speculative decoding refuses, and what it cuts to size without a word."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import hf_argen
from hf_argen import Chain, DraftModel, IndependentSequences, NGram, OptTree, SpeculativeDecoding, StaticTree
from hf_argen.generation.decoding.speculative.drafters import tokenizer_words

from ...helpers.language_models import language_model, prompts
from ...helpers.table_model import TableModel, run


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


def test_drafters_that_do_not_fit(model):
    encoder = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for drafter, message in (
        (DraftModel(), "DraftModel needs a model"),
        (language_model("llama", vocab_size=50), "draws from 50 tokens, the model from 40; they must agree"),
        (encoder, "T5ForConditionalGeneration cannot draft: it has an encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_argen.generate(model, SpeculativeDecoding(drafter), **prompts(), max_new_tokens=3)
    with pytest.raises(ValueError, match="no drafter 'oracle'; known are adaptive_ngram, "):
        SpeculativeDecoding("oracle")
    with pytest.raises(TypeError, match="The drafter is a int"):
        SpeculativeDecoding(3)


def test_tokenizers_that_differ(tmp_path):
    model, drafter = TableModel(3, 0), TableModel(3, 1)
    for name, one, words in (("model", model, ["a", "b", "c"]), ("drafter", drafter, ["a", "c", "b"])):
        (tmp_path / name).mkdir()
        vocab = {word: i for i, word in enumerate(words)}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
        one.name_or_path = str(tmp_path / name)
    with pytest.raises(ValueError, match="have other tokens for the same ids"):
        run(SpeculativeDecoding(DraftModel(drafter)), model, [[0, 1]], 3)
    drafter.name_or_path = model.name_or_path
    run(SpeculativeDecoding(DraftModel(drafter)), model, [[0, 1]], 3)
    assert tokenizer_words(SimpleNamespace(name_or_path="")) is None
    (tmp_path / "model" / "tokenizer.json").write_text('{"model": {"vocab": [["a", -1.0]]}}')
    assert len(tokenizer_words(model)) == 1
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert tokenizer_words(model) is None


@pytest.mark.parametrize(
    "tree", [Chain(50), IndependentSequences(2, 50), StaticTree(), OptTree(8, 0.0, 50)], ids=str
)
def test_drafts_are_cut_to_what_is_left(model, tree):
    """Drafts longer than max_new_tokens, and trees deeper than the positions that a model has."""
    drafter = SpeculativeDecoding(language_model("llama", num_hidden_layers=1), tree)
    inputs = {**prompts(2), "do_sample": False, "eos_token_id": None}
    for tokens in (1, 2, 6):
        expected = model.generate(**inputs, max_new_tokens=tokens)
        assert torch.equal(hf_argen.generate(model, drafter, **inputs, max_new_tokens=tokens), expected)
    learned = language_model("gpt2", n_positions=16)
    expected = learned.generate(**inputs, max_new_tokens=9)
    small = SpeculativeDecoding(language_model("gpt2", n_positions=16, n_layer=1), tree)
    assert torch.equal(hf_argen.generate(learned, small, **inputs, max_new_tokens=9), expected)


def test_nan(model):
    broken = language_model("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    inputs = {**prompts(), "max_new_tokens": 4}
    for do_sample in (False, True):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM produced NaN: its weights are damaged"):
            hf_argen.generate(broken, SpeculativeDecoding(), **inputs, do_sample=do_sample)
    with pytest.raises(ValueError, match="The drafter of SpeculativeDecoding produced NaN"):
        hf_argen.generate(model, SpeculativeDecoding(broken), **inputs, do_sample=True, top_k=0)
    # Greedy drafts are guesses; bad ones cost time alone.
    expected = model.generate(**inputs, do_sample=False)
    assert torch.equal(
        hf_argen.generate(model, SpeculativeDecoding(broken), **inputs, do_sample=False), expected
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "num_beams > 1"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"assistant_model": TableModel(3, 0)}, "a decoding of ours has its own drafter"),
    ],
)
def test_options_that_cannot_be_honoured(model, options, message):
    with pytest.raises(ValueError, match=message):
        hf_argen.generate(model, SpeculativeDecoding(NGram()), **prompts(), max_new_tokens=2, **options)


def test_embeddings_as_prompt(model):
    """A drafter that reads ids needs them; one that looks back does not."""
    embeds = model.get_input_embeddings()(prompts()["input_ids"]).detach()
    inputs = {"inputs_embeds": embeds, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs)
    assert torch.equal(hf_argen.generate(model, SpeculativeDecoding(), **inputs), expected)
    with pytest.raises(ValueError, match="needs input_ids, not inputs_embeds"):
        hf_argen.generate(model, SpeculativeDecoding(model), **inputs)
