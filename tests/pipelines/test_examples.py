"""The examples that use pipelines, and the commands of the quickstart, run as their users run them."""

import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from hf_argen import VarProcessor
from hf_argen.cli import main

from ..helpers.goldens import REPOSITORY
from ..helpers.tiny import tiny_var
from ..test_examples import run


@pytest.fixture
def folder(tmp_path):
    """A tiny model with the names of the ImageNet classes as `var-d16`, and a picture."""
    torch.manual_seed(0)
    tiny_var(num_classes=1000).save_pretrained(tmp_path / "var-d16")
    VarProcessor(image_size=(16, 16)).save_pretrained(tmp_path / "var-d16")
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(tmp_path / "photo.png")
    return tmp_path


def test_inpainting(folder):
    printed = run("inpainting.py", folder, "photo.png", "--model", "var-d16", "--class", "3", "--count", "2")
    assert printed == "filled.png: the source and 2 results\n"
    with Image.open(folder / "filled.png") as strip, Image.open(folder / "photo.png") as photo:
        assert strip.size == (48, 16)
        source, *results = (np.array(strip.crop((x, 0, x + 16, 16))) for x in (0, 16, 32))
        assert (source[4:12, 4:12] == 128).all()
        for result in results:
            assert np.array_equal(result[:4], np.array(photo)[:4])
    assert not np.array_equal(*results)


def test_guidance_sheet(folder):
    printed = run(
        "guidance_sheet.py", folder, "volcano", "--model", "var-d16", "--scales", "0", "3", "--count", "2"
    )
    assert printed == "guidance.png: 2 scales of guidance, 2 seeds\n"
    with Image.open(folder / "guidance.png") as sheet:
        assert sheet.size == (60 + 2 * 16, 2 * 16)
        cells = {sheet.crop((x, y, x + 16, y + 16)).tobytes() for x in (60, 76) for y in (0, 16)}
    assert len(cells) == 4


def test_the_commands_of_the_quickstart(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    text = (REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8")
    shown = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(shown) > 5
    for line in shown:
        program, *arguments = shlex.split(line)
        assert program == "argen" and main(arguments) == 0, capsys.readouterr().err
    assert len(list((folder / "volcanoes").glob("*.gif"))) == 2
    assert (folder / "sheet.png").read_bytes() == (folder / "same.png").read_bytes()
    written = {path.name for path in folder.iterdir()}
    assert {
        "red-apple.png",
        "apples.png",
        "fruit.gif",
        "retriever.png",
        "sheet.png",
        "stronger.png",
    } <= written
