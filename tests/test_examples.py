"""The examples run as their users run them."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image
from transformers import AutoConfig

from hf_argen.assets import default_model
from hf_argen.cli import main

from .helpers.goldens import REPOSITORY


def run(script, folder, *arguments):
    """The output of an example that runs as a program of its own in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    command = [sys.executable, str(REPOSITORY / "examples" / script), *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run("demo.py", folder)


def cells(path, columns, rows):
    """The pictures of a sheet."""
    with Image.open(path) as sheet:
        width, height = (sheet.width - 8) // columns, (sheet.height - 8) // rows
        return {
            sheet.crop((8 + x * width, 8 + y * height, 136 + x * width, 136 + y * height)).tobytes()
            for x in range(columns)
            for y in range(rows)
        }


def test_demo_writes_sheets_and_an_animation(demo):
    folder, printed = demo
    found = sorted(path.name for path in (folder / "demo").iterdir())
    assert found == ["sheet.gif", "sheet.png", "unseen.png"]
    assert len(cells(folder / "demo" / "sheet.png", 4, 3)) == 12
    assert len(cells(folder / "demo" / "unseen.png", 4, 4)) == 16
    with Image.open(folder / "demo" / "sheet.gif") as animation:
        assert animation.n_frames == len(default_config().patch_nums) and animation.is_animated
    for line in (
        r"demo/sheet.png and demo/sheet.gif: 12 pictures, seed 0, \d+\.\d s",
        r"demo/unseen.png: 16 pictures, seed 0, \d+\.\d s",
        r"All in \d+\.\d s\.",
    ):
        assert re.search(line, printed), printed


def default_config():
    return AutoConfig.from_pretrained(default_model())


def test_the_commands_that_the_demo_prints_draw_its_pictures(demo, tmp_path, monkeypatch):
    folder, printed = demo
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    commands = [line.removeprefix("$ ") for line in printed.splitlines() if line.startswith("$ ")]
    program, *arguments = shlex.split(commands[1])
    assert program == "argen" and main(arguments) == 0
    assert (tmp_path / "demo" / "unseen.png").read_bytes() == (folder / "demo" / "unseen.png").read_bytes()


def test_demo_follows_its_seed(demo, tmp_path):
    folder, _ = demo
    run("demo.py", tmp_path, "--seed", "1", "--out", "other")
    # Not every picture differs: where the model is sure, any seed draws the same.
    assert cells(folder / "demo" / "unseen.png", 4, 4) != cells(tmp_path / "other" / "unseen.png", 4, 4)
