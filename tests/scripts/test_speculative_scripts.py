"""The scripts that prove and time speculative decoding, on tiny models."""

import json
import sys

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_argen import Eagle, EagleConfig, MedusaHeads, MedusaHeadsConfig

from ..helpers.language_models import language_model
from ..helpers.tiny import byte_tokenizer

QUESTIONS = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with its tokenizer, drafters for it, and questions."""
    root = tmp_path_factory.mktemp("speculative")
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer)}
    model = language_model(**sizes)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    language_model(**sizes, num_hidden_layers=1).save_pretrained(root / "small")
    torch.manual_seed(0)
    MedusaHeads(MedusaHeadsConfig(hidden_size=32, medusa_num_heads=2, **sizes)).save_pretrained(
        root / "medusa"
    )
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **sizes}
    Eagle(EagleConfig(**shape)).save_pretrained(root / "eagle")
    lines = [
        {"question_id": i, "category": "code" if i < 4 else "qa", "turns": [f"abc {i} abc {i} a"]}
        for i in range(QUESTIONS)
    ]
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_everything_is_lossless(load_script, folders, tmp_path, monkeypatch, capsys):
    script = load_script("prove_lossless")
    monkeypatch.setattr(script, "TREES", (script.Chain(2), script.StaticTree([[0], [1], [0, 0]])))
    monkeypatch.setattr(
        script, "RULES", (script.RejectionSampling(), script.SpecTr(), script.TypicalAcceptance())
    )
    drafters = [str(folders / name) for name in ("small", "medusa", "eagle")]
    arguments = [
        str(folders / "model"),
        "--prompts",
        str(folders / "questions.jsonl"),
        "--drafters",
        *drafters,
    ]
    arguments += ["--count", "2", "--tokens", "5", "--batch-sizes", "1", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["prove_lossless.py", *arguments])
    assert script.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("| 2 of 2 | 2 of 2 |") == 5 * 5
    lines = [script.Line(**one) for one in json.loads((tmp_path / "lossless.json").read_text())]
    assert sum(line.variation is not None for line in lines) == 3 * 3
    assert all(line.variation is None or line.variation < 1e-5 for line in lines)
    monkeypatch.setattr(script, "greedy", None)  # all is known: nothing runs again
    assert script.main() == 0
    assert capsys.readouterr().out == printed
    broken = script.Line("a", "b", "c", {"1": 2}, 3, None, 1.0)
    assert script.failures([*lines, broken]) == [broken]
    assert script.failures([script.Line("a", "b", "c", {"1": 3}, 3, 2e-5, 1.0)])


def test_every_so_many_th_question_is_asked(load_script, folders):
    script = load_script("benchmark_speculative")
    source = folders / "questions.jsonl"
    arguments = [str(folders / "model"), "--questions", str(source), "--every", "2", "--count", "2"]
    asked = script.Bench(script.parse(arguments)).prompts
    assert asked == script.read_questions(source)[0:4:2] and len(asked) == 2


def test_the_benchmark(load_script, folders, tmp_path, monkeypatch, capsys):
    script = load_script("benchmark_speculative")
    monkeypatch.setattr(script, "WARM_UPS", 1)
    monkeypatch.setattr(script.Rates, "measure", lambda *_: script.Rates({}, 1.0, 1.0))
    arguments = [str(folders / "model"), "--questions", str(folders / "questions.jsonl")]
    arguments += [
        "--drafters",
        str(folders / "medusa"),
        str(folders / "eagle"),
        "--assistant",
        str(folders / "small"),
    ]
    arguments += ["--count", "5", "--tokens", "6", "--output", str(tmp_path), "--batch-sizes", "1", "4"]
    monkeypatch.setattr(sys, "argv", ["benchmark_speculative.py", *arguments])
    script.main()
    printed = capsys.readouterr().out
    store = script.Store(tmp_path / "answers.json")
    assert len(store.of(1, script.PLAIN)) == 5 and len(store.of(4, script.PLAIN)) == 1
    assert store.of(4, script.LOOKUP) == [] and len(store.of(1, script.ASSISTED)) == 5
    for name in ("NGram, Chain", "EagleDrafter, OptTree", "MedusaDrafter, StaticTree", "DraftModel, Chain"):
        tokens = [answer.tokens for answer in store.of(1, name)]
        assert tokens == [answer.tokens for answer in store.of(1, script.PLAIN)]
        assert all(0 < answer.forward < answer.seconds and answer.calls for answer in store.of(1, name))
        assert f"| {name} |" in printed
    assert (tmp_path / "speculative.png").stat().st_size > 1000
    monkeypatch.setattr(script.Bench, "answer", None)  # all is known: nothing runs again
    script.main()


def test_random_weights(load_script, tmp_path):
    script = load_script("benchmark_speculative")
    options = script.parse(
        ["--random", "64", "2", "--count", "1", "--tokens", "3", "--output", str(tmp_path)]
    )
    bench = script.Bench(options)
    method = bench.ours("NGram", script.SpeculativeDecoding())
    name, category, inputs = bench.batches(1)[0]
    assert (name, category, tuple(inputs["input_ids"].shape)) == ("0", "random", (1, 128))
    answer = bench.answer(method, inputs)
    assert answer.tokens == 3 and answer.accepted == 2
    with pytest.raises(SystemExit):
        script.parse(["model"])


def test_questions_in_another_form(load_script, tmp_path):
    script = load_script("speculative_sides")
    (tmp_path / "questions.jsonl").write_text('{"text": "hello"}\n')
    with pytest.raises(ValueError, match=r"has no question_id, category and turns; it has \['text'\]"):
        script.read_questions(tmp_path / "questions.jsonl")
