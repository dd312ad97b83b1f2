"""The examples run as their users run them."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image

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


def test_demo_writes_a_sheet_and_an_animation(demo):
    folder, printed = demo
    assert sorted(path.name for path in (folder / "demo").iterdir()) == ["scales.gif", "sheet.png"]
    with Image.open(folder / "demo" / "sheet.png") as sheet:
        assert sheet.mode == "RGB" and min(sheet.size) > 400
        cells = [sheet.crop((x, 80, x + 100, 180)).tobytes() for x in (20, 200, 380, 560)]
    assert len(set(cells)) == 4  # the classes differ
    with Image.open(folder / "demo" / "scales.gif") as animation:
        assert animation.n_frames == 5 and animation.is_animated
    assert "demo/sheet.png" in printed and "demo/scales.gif" in printed
    assert re.search(r"pictures drawn .* \d+\.\d\d ", printed)
    assert "random test weights" in printed


def test_demo_follows_its_seed(demo, tmp_path):
    folder, _ = demo
    run("demo.py", tmp_path, "--seed", "1", "--out", "other")
    first, other = folder / "demo" / "sheet.png", tmp_path / "other" / "sheet.png"
    assert first.read_bytes() != other.read_bytes()
