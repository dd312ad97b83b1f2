"""The benchmark of decodings, on a model of random weights."""

import json
import sys

import pytest
import torch

from hf_argen import LlamaGenConfig, LlamaGenForImageGeneration


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("benchmark_decodings")


@pytest.fixture(scope="module")
def folder(load_script, emoji, tmp_path_factory):
    """A saved model with the words of the yardstick."""
    training = load_script("train_next_token")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    processor = training.prompt_processor(emoji, folder.with_name("processor"), training.LlamaGenProcessor)
    config = LlamaGenConfig(
        image_tokenizer_config={**training.TOKENIZER, "base_channels": 8, "channel_multiplier": [1, 1, 1], "grid_size": 4},
        text_encoder_config=training.text_encoder(processor, {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_kv": 8}),
        **{**training.LLAMAGEN, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "text_embed_dim": 16},
    )  # fmt: skip
    model = LlamaGenForImageGeneration(config)
    torch.nn.init.normal_(model.head.out_proj.weight)
    model.generation_config.update(**training.SAMPLING)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(script, monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_decodings.py", *options])
    script.main()


def test_the_table_and_the_picture(script, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    options = [str(folder), "--drafter", str(folder), "--count", "3", "--draw-batch", "2", "--pairs", "1"]
    options += ["--batch-sizes", "1", "2", "--output", str(output), "--dtype", "float32", "--decodings"]
    options += ["speculative_jacobi", '{"type": "relaxed_acceptance", "delta": 0.0}']
    run(script, monkeypatch, *options)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| `")]
    assert [line.split("|")[1].strip() for line in lines] == [
        "`next_token`",
        "`speculative_jacobi`",
        "`relaxed_acceptance` delta=0.0",
    ]
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert (output / "decodings.png").stat().st_size > 10_000

    stored = json.loads((output / "tiny.json").read_text())
    plain, jacobi, speculative = stored["rows"]
    for kind in ("name", "held-out"):
        assert 0 < stored["entropy"][kind] < 9  # bits, of 512 codes
        assert plain["scores"][kind]["calls"] == 16 and plain["scores"][kind]["kept"] == 1
        assert jacobi["scores"][kind]["calls"] <= 16
    # The model drafts for itself, four tokens a call: every draft passes, and the last call has one token left.
    assert speculative["scores"]["name"]["calls"] == 1 + 3

    # Given again, the same command measures nothing anew.
    monkeypatch.setattr(script.Bench, "draw", None)
    run(script, monkeypatch, *options)
    assert capsys.readouterr().out == printed


def test_what_cannot_be_measured_is_refused(script, folder, tmp_path, monkeypatch):
    model = LlamaGenForImageGeneration.from_pretrained(folder)
    config = LlamaGenConfig(
        **{**model.config.to_dict(), "condition_type": "class", "text_encoder_config": None}
    )
    classes = tmp_path / "classes"
    LlamaGenForImageGeneration(config).save_pretrained(classes)
    script.AutoProcessor.from_pretrained(folder).save_pretrained(classes)
    with pytest.raises(SystemExit, match="draws no captions; give a text-conditional model"):
        run(script, monkeypatch, str(classes), "--output", str(tmp_path / "out"))


def test_entropy_is_that_of_the_nucleus(script):
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    kept = script.nucleus(logits, 0.9).softmax(dim=-1)
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95)
    assert script.nucleus(logits, 1.0) is logits
