"""Records in pictures, and `argen generate --again`: the same picture from what is in it."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hf_argen.assets
from hf_argen import VarForImageGeneration
from hf_argen.cli import files, generating, main
from hf_argen.cli.request import BATCH, DrawRequest

from ..helpers.tiny import spread
from ..test_cli import fails
from .conftest import names, pixels


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_can_be_made_again(argen, capsys, suffix):
    given = ["--guidance", 2.0, "--top-k", 9, "--top-p", 0.9, "--temperature", 1.5, "--dtype", "bfloat16"]
    argen("a cat and a dog", "-n", 3, "--seed", 3, *given, "-o", f"first{suffix}")
    assert main(["generate", "--again", f"first{suffix}", "-o", f"second{suffix}"]) == 0
    assert np.array_equal(pixels(f"first{suffix}"), pixels(f"second{suffix}"))
    assert main(["generate", "--again", f"first{suffix}", "--seed", "4", "-o", "other.png"]) == 0
    assert not np.array_equal(pixels("other.png"), pixels(f"first{suffix}"))
    capsys.readouterr()
    assert main(["info", f"first{suffix}"]) == 0
    command, last = capsys.readouterr().out.splitlines()[-2:]
    assert last.split("  ")[-1].strip() == f"argen generate --again first{suffix}"
    assert command.startswith("command") and "'a cat and a dog' -n 3" in command
    words = command.split("argen generate ", 1)[1]
    assert "--guidance 2.0 --top-k 9 --top-p 0.9 --temperature 1.5 --dtype bfloat16" in words


def test_the_record_of_a_folder_is_that_of_one_picture(argen):
    argen("a cat", "-n", 3, "--seed", 3, "-o", "out")
    request = generating.again(Path("out/a-cat-5.png"))
    assert (request.prompts, request.count, request.seed) == (["a cat"], 1, 5)


def test_records_and_names():
    request = DrawRequest(prompts=["a"], count=2, seed=5, model="m")
    assert DrawRequest.from_record(request.record()) == request
    assert request.command() == "argen generate a -n 2 --model m --seed 5"
    with pytest.raises(ValueError, match="is of version 9 and has the entry 'brush'"):
        DrawRequest.from_record({"version": "9", "brush": "wide"})
    assert files.file_names(["A cat!", "a  cat", "…"], [1, 1, 1]) == [
        "a-cat-1.png",
        "a-cat-1-2.png",
        "picture-1.png",
    ]


@pytest.fixture
def batches(monkeypatch):
    """The seeds of the rows of each call of generate()."""
    seen = []
    real = VarForImageGeneration.generate

    def spy(self, *args, generator=None, **kwargs):
        seen.append([one.initial_seed() for one in generator])
        return real(self, *args, generator=generator, **kwargs)

    monkeypatch.setattr(VarForImageGeneration, "generate", spy)
    return seen


def test_a_picture_of_a_folder_is_drawn_in_the_same_company(argen, batches):
    """Another batch size is rounded differently, so the record holds the batch that the picture was drawn in."""
    argen("a cat", "blue car", "-n", BATCH - 2, "--seed", 3, "-o", "out")
    assert [len(batch) for batch in batches] == [BATCH, BATCH - 4]
    assert main(["generate", "--again", "out/blue-car-7.png", "-o", "again.png"]) == 0
    assert batches[2] == batches[1]
    assert np.array_equal(pixels("again.png"), pixels("out/blue-car-7.png"))
    record = files.read_record("again.png")
    assert record == files.read_record("out/blue-car-7.png") and record["prompt"] == "blue car"
    assert main(["generate", "--again", "again.png", "-o", "twice"]) == 0
    assert np.array_equal(pixels("again.png"), pixels("twice/blue-car-7.png"))
    with Image.open("again.png") as picture:
        assert "company" not in picture.info and picture.info["seed"] == "7"
    assert main(["generate", "--again", "again.png", "--seed", "9", "-o", "other.png"]) == 0
    assert batches[-1] == [9] and "company" not in files.read_record("other.png")
    assert main(["generate", "--again", "again.png", "--guidance", "4", "-o", "guided.png"]) == 0
    assert batches[-1] == batches[1]


def test_every_option_is_in_the_command_that_info_prints(argen, capsys):
    argen("a cat", "it's a dog", "--seed", 3, "-n", 2, "--top-k", 3, "--device", "cpu", "-o", "first.png")
    capsys.readouterr()
    assert main(["info", "first.png"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("command"))
    program, *arguments = shlex.split(line.removeprefix("command"))
    assert program == "argen" and main([*arguments, "-o", "second.png"]) == 0
    assert np.array_equal(pixels("first.png"), pixels("second.png"))


def test_the_record_names_the_model_from_any_folder(argen, text_model, tmp_path, monkeypatch):
    Path("mine").symlink_to(text_model)
    argen("a cat", "--seed", 1, "-o", "a.png", model="mine")
    assert files.read_record("a.png")["model"] == str(tmp_path / "mine")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["generate", "--again", "../a.png", "-o", "b.png"]) == 0
    assert np.array_equal(pixels("../a.png"), pixels("b.png"))


def test_pictures_of_the_default_model(text_model, monkeypatch, capsys):
    monkeypatch.setattr(hf_argen.assets, "DEFAULT_MODEL", Path(text_model))
    assert main(["generate", "a cat", "-o", "a.png", "--seed", "1"]) == 0
    assert files.read_record("a.png")["model"] == hf_argen.assets.DEFAULT_NAME
    Path("hf_argen").mkdir()
    Path("emoji-var").mkdir()  # folders of a user that look alike
    assert main(["generate", "--again", "a.png", "-o", "b.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_other_weights_are_noticed(argen, text_model, tmp_path, capsys):
    torch.manual_seed(1)
    changed = spread(VarForImageGeneration.from_pretrained(text_model), std=0.2)
    argen("a cat", "--seed", 1, "-o", "a.png", model=text_model)
    record = files.read_record("a.png")
    folder = tmp_path / "changed"
    generating.open_pipeline(text_model, "auto", None, None).save_pretrained(folder)
    argen("a cat", "--seed", 1, "-o", "same.png", model=str(folder))
    assert files.read_record("same.png")["weights"] == record["weights"]
    changed.save_pretrained(folder)
    fails(capsys, ["generate", "--again", "same.png", "-o", "b.png"], "its weights are others", "--model")
    assert names(tmp_path) == ["a.png", "changed", "same.png"]
    assert main(["generate", "--again", "same.png", "--model", str(folder), "-o", "b.png"]) == 0
    assert files.read_record("b.png")["weights"] != record["weights"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"count": "many"}, "entry 'count' is 'many'"),
        ({"prompt": 5}, "entry 'prompts' is"),
        ({"seed": True}, "entry 'seed'"),
        ({"guidance": "a lot"}, "entry 'guidance'"),
        ({"company": {"pictures": [["a cat", 1]], "index": 1}}, "entry 'company'"),
        ({"company": "x"}, "entry 'company'"),
        ({"seed": -1}, "--seed is -1"),
        ({"dtype": "int8"}, "--dtype 'int8' is unknown"),
    ],
)
def test_damaged_records(argen, capsys, tmp_path, changes, word):
    argen("a cat", "--seed", 1, "-o", "a.png")
    record = files.read_record("a.png") | changes
    files.write_picture(Path("b.png"), Image.new("RGB", (4, 4)), record)
    fails(capsys, ["generate", "--again", "b.png", "-o", "c.png"], word)
    assert names(tmp_path) == ["a.png", "b.png"]


def test_pictures_that_hold_no_record(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save("bare.gif", comment=b"made by hand")
    fails(capsys, ["info", "bare.gif"], "holds no record")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    fails(capsys, ["info", "cut.png"], "cut.png is no picture that can be read")
    exif = Image.Exif()
    exif[files.EXIF_DESCRIPTION] = json.dumps(["a"])
    Image.new("RGB", (4, 4)).save("odd.jpg", exif=exif)
    fails(capsys, ["info", "odd.jpg"], "holds no record")
