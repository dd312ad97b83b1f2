"""Tiny models as folders, and the command that draws with them."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_argen import VarForImageGeneration, VarProcessor
from hf_argen.cli import main

from ..helpers.tiny import spread, text_tokenizer, text_var_config, tiny_var

NAMES = ["goldfish", "volcano", "red fox, Vulpes vulpes", "red wine", "crane"]


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tokenizer = text_tokenizer()
    torch.manual_seed(0)
    model = spread(VarForImageGeneration(text_var_config(len(tokenizer))), std=0.2)
    model.generation_config.guidance_scale = 1.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    VarProcessor(tokenizer=tokenizer, image_size=(16, 16)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def class_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    torch.manual_seed(0)
    tiny_var().save_pretrained(folder)
    VarProcessor(class_names=NAMES, image_size=(16, 16)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def argen(text_model, capsys):
    """Runs `argen generate` with the tiny model; what it prints."""

    def run(*arguments, model=text_model) -> str:
        capsys.readouterr()
        assert main(["generate", "--model", model, *map(str, arguments)]) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
