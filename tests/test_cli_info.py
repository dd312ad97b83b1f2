"""`argen info`."""

import pytest
import torch

from hf_argen import MultiScaleVQModel, NextScale
from hf_argen.cli import main

from .helpers.tiny import tiny_var, tokenizer_config
from .test_cli import fails


def facts(capsys, *arguments) -> dict[str, str]:
    assert main(["info", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines}


def test_a_model(tmp_path, capsys, monkeypatch):
    model = tiny_var()
    model.generation_config.update(do_sample=True, top_k=7, guidance_scale=1.5)
    NextScale(smooth=True).store(model.generation_config)
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    monkeypatch.setattr("safetensors.torch.load_file", None)  # the weights stay closed
    found = facts(capsys, tmp_path)
    count = sum(parameter.numel() for parameter in model.state_dict().values())
    assert found["parameters"].startswith(f"{count:,}".replace(",", " "))
    assert "million BF16" in found["parameters"]
    assert found["family"] == "var, VAR, next-scale prediction (arXiv 2404.02905)"
    assert found["picture"] == "16x16 pixels" and found["scales"] == "1x1, 2x2, 4x4"
    assert found["tokens"] == "21" and found["codes"] == "16" and found["draws from"] == "5 classes"
    assert "do_sample=True, guidance_scale=1.5, top_k=7" in found["recipe"] and "smooth" in found["recipe"]
    assert found["licence"] == "apache-2.0"
    assert "next_scale, exact" in found["decodings"]


def test_a_tokenizer(tmp_path, capsys):
    MultiScaleVQModel(tokenizer_config()).save_pretrained(tmp_path)
    found = facts(capsys, tmp_path)
    assert found["family"].startswith("multiscale_vq") and "decodings" not in found
    assert found["recipe"] == "none stored" and found["licence"] == "not stated"


def test_a_released_checkpoint(capsys):
    found = facts(capsys, "var-d16")
    assert found["metric"] == "FID 3.55 (ImageNet 256 px, 50 000 samples)"
    assert found["transformer"] == "FoundationVision/var: var_d16.pth"
    assert found["recipe"].startswith("do_sample=True, guidance_scale=1.5, top_k=900, top_p=0.96")
    assert "licence" in found


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", ["no folder and no released checkpoint 'nowhere'"]),
        ("none.png", ["none.png does not exist"]),
        ("other", ["is a model of type 'gpt2'; hf_argen has"]),
        ("cut", ["model.safetensors is truncated"]),
        ("file", ["file is no picture"]),
    ],
)
def test_bad_input(tmp_path, capsys, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer_config().save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    fails(capsys, ["info", source], *words)
