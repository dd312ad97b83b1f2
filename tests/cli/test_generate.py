"""`argen generate`: what it writes."""

import json
import os

import numpy as np
import torch
from PIL import Image
from transformers import pipeline

import hf_argen.assets
from hf_argen import NextScale
from hf_argen.cli import files, main

from ..helpers.tiny import tiny_var
from ..test_cli import fails
from .conftest import names, pixels


def test_one_picture(argen, tmp_path, text_model):
    assert argen("red apple", "--seed", 7).startswith("red-apple.png: 1 picture, seed 7, ")
    with Image.open("red-apple.png") as picture:
        assert picture.size == (16, 16)
        info = picture.info
    expected = {"model": text_model, "prompt": "red apple", "seed": "7", "decoding": "next_scale"}
    assert {name: info[name] for name in expected} == expected
    assert info["guidance"] == "1.5" and info["Software"] == f"hf_argen {hf_argen.__version__}"
    argen("red apple", "--seed", 8)
    assert names(tmp_path) == ["red-apple-2.png", "red-apple.png"]
    drawn = pipeline("text-to-image", text_model)("red apple", seed=7, do_sample=True)["image"]
    assert np.array_equal(np.array(drawn), pixels("red-apple.png"))


def test_a_folder_of_pictures(argen, tmp_path):
    assert "out: 4 pictures, seed 3" in argen("a cat", "blue car", "-n", 2, "--seed", 3, "-o", "out")
    assert names(tmp_path / "out") == ["a-cat-3.png", "a-cat-4.png", "blue-car-3.png", "blue-car-4.png"]
    argen("a cat", "--seed", 4, "-o", "alone.png")
    assert np.array_equal(pixels("alone.png"), pixels("out/a-cat-4.png"))  # the same whatever -n
    assert not np.array_equal(pixels("out/a-cat-3.png"), pixels("out/a-cat-4.png"))
    argen("a cat", "-n", 9, "--seed", 3, "-o", "out")
    assert len(names(tmp_path / "out")) == 11
    assert np.array_equal(pixels("alone.png"), pixels("out/a-cat-4.png"))


def test_a_contact_sheet(argen):
    argen("a cat", "blue car", "-n", 3, "--seed", 3, "-o", "sheet.png")
    argen("a cat", "--seed", 4, "-o", "alone.png")
    with Image.open("alone.png") as alone, Image.open("sheet.png") as sheet:
        assert sheet.width == 3 * (128 + 8) + 8
        second = sheet.crop((144, 8, 272, 136))
        assert np.array_equal(np.array(second), np.array(alone.resize((128, 128), Image.Resampling.BICUBIC)))
    assert files.read_record("sheet.png")["prompt"] == ["a cat", "blue car"]


def test_decodings_with_options(argen):
    smooth = NextScale(smooth=True).to_dict()
    argen("a cat", "--seed", 1, "--decoding", json.dumps(smooth), "-o", "smooth.png")
    argen("a cat", "--seed", 1, "--decoding", "next_scale", "-o", "plain.png")
    assert not np.array_equal(pixels("smooth.png"), pixels("plain.png"))
    assert json.loads(files.read_record("smooth.png")["decoding"]) == smooth
    assert main(["generate", "--again", "smooth.png", "-o", "again.png"]) == 0
    assert np.array_equal(pixels("smooth.png"), pixels("again.png"))


def test_animations(argen, tmp_path):
    assert "sheet.png and sheet.gif: 4 pictures" in argen(
        "a cat", "-n", 4, "--seed", 1, "--animate", "-o", "sheet.png"
    )
    with Image.open("sheet.gif") as animation, Image.open("sheet.png") as sheet:
        assert animation.n_frames == 3 and animation.size == sheet.size
    assert argen("a cat", "--seed", 1, "-o", "alone.gif").startswith("alone.gif: 1 picture")
    with Image.open("alone.gif") as animation:
        assert animation.n_frames == 3 and animation.size == (128, 128)
        durations = []
        for i in range(3):
            animation.seek(i)
            durations.append(animation.info["duration"])
    assert durations[-1] > durations[0] == durations[1]
    assert files.read_record("alone.gif")["prompt"] == "a cat"
    argen("a cat", "-n", 2, "--seed", 1, "--animate", "-o", "out")
    assert names(tmp_path / "out") == ["a-cat-1.gif", "a-cat-1.png", "a-cat-2.gif", "a-cat-2.png"]
    assert names(tmp_path) == ["alone.gif", "out", "sheet.gif", "sheet.png"]


def test_classes_by_name_and_id(argen, class_model):
    argen("--class", "red fox", "--class", "1", "--seed", 3, "-o", "out", model=class_model)
    assert {"red-fox-3.png", "1-3.png"} == set(os.listdir("out"))
    argen("--class", "2", "--seed", 3, "-o", "two.png", model=class_model)
    assert np.array_equal(pixels("two.png"), pixels("out/red-fox-3.png"))
    assert files.read_record("two.png")["class"] == "2"


def test_models_of_1000_classes_know_the_imagenet_names(argen, tmp_path):
    tiny_var(num_classes=1000).save_pretrained(tmp_path / "bare")
    argen("--class", "red fox", "-o", "fox.png", "--seed", 1, model=str(tmp_path / "bare"))
    argen("--class", "277", "-o", "277.png", "--seed", 1, model=str(tmp_path / "bare"))
    assert np.array_equal(pixels("fox.png"), pixels("277.png"))


def test_the_default_model(text_model, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "own-model"
    monkeypatch.setattr(hf_argen.assets, "DEFAULT_MODEL", folder)
    fails(capsys, ["generate", "a cat"], "no model of its own; name one: --model")
    folder.symlink_to(text_model)
    assert main(["generate", "a cat", "-o", "a.png", "--seed", "1"]) == 0
    assert files.read_record("a.png")["seed"] == 1
    assert main(["info"]) == 0


def test_released_checkpoints_are_fetched_and_converted(monkeypatch, capsys, text_model):
    asked = []

    def convert(family, name):
        asked.append((family, name))
        torch.manual_seed(0)
        return tiny_var(num_classes=1000)

    monkeypatch.setattr("hf_argen.convert.convert_original", convert)
    command = ["generate", "--model", "var-d16", "--class", "red fox", "-o", "fox.png", "--dtype", "bfloat16"]
    assert main(command) == 0
    assert asked == [("var", "var-d16")] and files.read_record("fox.png")["dtype"] == "bfloat16"
    fails(capsys, [*command, "--quantize", "8bit"], "'argen convert var-d16 FOLDER' first")
