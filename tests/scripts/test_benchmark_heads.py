"""The benchmark of heads, on models of random weights."""

import json
import sys

import pytest
from PIL import Image

from hf_argen import MarForImageGeneration


@pytest.fixture(scope="module")
def script(load_script):
    module = load_script("benchmark_heads")
    module.PROMPTS = module.PROMPTS[:2]
    return module


@pytest.fixture(scope="module")
def folders(load_script, emoji, tmp_path_factory):
    """Saved models of two heads with the words of the yardstick."""
    training = load_script("train_masked")
    base = tmp_path_factory.mktemp("models")
    processor = training.prompt_processor(emoji, base / "processor", training.LlamaGenProcessor)
    training.TOKENIZER |= {
        "base_channels": 8,
        "channel_multiplier": [1, 1, 1, 1],
        "latent_channels": 4,
        "latent_scale": 1.0,
    }
    training.MAR |= {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "text_embed_dim": 16}
    training.TEXT_ENCODER |= {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    for head in training.HEADS.values():
        head |= {"width": 16, "depth": 1}
    training.HEADS["diffusion"]["num_sampling_steps"] = 4
    for head in ("flow", "energy", "diffusion", "drafter"):
        model = training.build_model(training.build_tokenizer(), processor, head)
        model.save_pretrained(base / head)
        processor.save_pretrained(base / head)
    return base


def run(script, monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_heads.py", *options])
    script.main()


def test_the_table_and_the_sheets(script, folders, tmp_path, monkeypatch, capsys):
    annealed = {
        "type": "diffusion_step_annealing",
        "num_steps": 2,
        "most_head_steps": 3,
        "least_head_steps": 2,
    }
    options = [str(folders / "flow"), str(folders / "energy"), "--count", "2", "--pairs", "1"]
    options += ["--batch-sizes", "1", "--output", str(tmp_path), "--dtype", "float32", "--decodings"]
    options += ['{"type": "masked", "num_steps": 2}', json.dumps(annealed)]
    run(script, monkeypatch, *options)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    # Two steps of the transformer; Heun takes two calls of the network a step of 16, annealed 3 + 2 of them.
    assert [cell[:5] for cell in cells] == [
        ["flow", "flow", "`masked` num_steps=2", "2", "64"],
        ["flow", "flow", cells[1][2], "2", "10"],
        ["energy", "energy", "`masked` num_steps=2", "2", "2"],
    ]
    assert cells[1][-1] == "DiSA 5-10x" and len({len(cell) for cell in cells}) == 1
    for name in ("flow", "energy"):
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.size == (8 * 64, 64)

    # Without numbers, from the head's own to a tenth.
    assert script.annealed(annealed, None) == annealed
    head = script.AutoModelForImageGeneration.from_pretrained(folders / "flow").head
    by_default = script.annealed({"type": "diffusion_step_annealing", "num_steps": 2}, head)
    assert (by_default["most_head_steps"], by_default["least_head_steps"]) == (16, 1)

    # Given again, the same command measures nothing anew.
    monkeypatch.setattr(script.Bench, "measure", None)
    run(script, monkeypatch, *options)
    assert capsys.readouterr().out == printed


def test_a_drafter_adds_its_lines(script, folders, tmp_path, monkeypatch, capsys):
    """For models with a diffusion head alone; the exact decoding and the authors' rule."""
    script.DRAFTED = tuple({**one, "num_steps": 2, "draft_length": 1} for one in script.DRAFTED)
    options = [str(folders / "energy"), str(folders / "diffusion"), "--count", "1", "--pairs", "1"]
    options += ["--batch-sizes", "1", "--output", str(tmp_path), "--dtype", "float32"]
    options += ["--decodings", '{"type": "masked", "num_steps": 2}', "--drafter", str(folders / "drafter")]
    run(script, monkeypatch, *options)
    lines = [line for line in capsys.readouterr().out.splitlines() if "continuous_speculative" in line]
    assert len(lines) == 2
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[:2] == ["diffusion", "diffusion"] and cells[-1] == "CSpD 2.33x"
        assert "drafter=drafter" in cells[2] and float(cells[5]) > 1


def test_what_cannot_be_measured_is_refused(script, folders, tmp_path, monkeypatch):
    model = MarForImageGeneration.from_pretrained(folders / "flow")
    config = type(model.config)(
        **{**model.config.to_dict(), "condition_type": "class", "text_encoder_config": None}
    )
    MarForImageGeneration(config).save_pretrained(tmp_path / "classes")
    script.AutoProcessor.from_pretrained(folders / "flow").save_pretrained(tmp_path / "classes")
    with pytest.raises(SystemExit, match="draws no captions; give a text-conditional model"):
        run(script, monkeypatch, str(tmp_path / "classes"), "--output", str(tmp_path / "out"))
