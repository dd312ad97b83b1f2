"""`argen generate`: what it refuses; nothing is half-written, whatever happens."""

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from PIL import Image
from transformers import GPT2Config, GPT2Model

from hf_argen.cli import main

from ..helpers.tiny import tiny_var, tokenizer_config
from ..test_cli import fails
from .conftest import names, pixels


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Nothing to draw; give a prompt"]),
        ([""], ["The prompt '' is empty; describe the picture"]),
        (["a cat", "  "], ["The prompt ' ' is empty"]),
        (["\u200b\x07"], ["is empty"]),
        (["\udcff"], ["is no valid Unicode text"]),
        (["x" * 10_000], ["has 10000 characters; 2000 are the most"]),
        (["--class", " "], ["A class is empty"]),
        (["a cat", "--class", "1"], ["Prompts and --class are both given"]),
        (["--class", "1"], ["draws prompts, not classes", "argen generate 'red apple'"]),
        (["a cat", "-n", "-3"], ["-n is -3; it must be at least 1"]),
        (["a cat", "-n", "0"], ["-n is 0"]),
        (["a cat", "-n", "1000000000"], ["makes 1000000000 pictures; 1000 are the most"]),
        (["a cat", "-n", "two"], ["Invalid value for '-n'"]),
        (["a cat", "--seed", "-1"], ["--seed is -1"]),
        (["a cat", "--seed", str(2**63 - 2), "-n", "3"], ["with 3 more it must stay within 0 and 2^63"]),
        (["a cat", "--temperature", "0"], ["temperature is 0.0"]),
        (["a cat", "--top-k", "1000"], ["top_k is 1000"]),
        (["a cat", "--guidance", "-1"], ["guidance"]),
        (["a cat", "--guidance", "inf"], ["--guidance is inf; it must be a number"]),
        (["a cat", "--temperature", "nan"], ["--temperature is nan"]),
        (["a cat", "--top-p", "nan"], ["--top-p is nan"]),
        (["a cat", "--decoding", "nextscale"], ["There is no decoding 'nextscale'", "next_scale"]),
        (["a cat", "--decoding", "{"], ["is not JSON"]),
        (["a cat", "--decoding", "{}"], ["{} has none"]),
        (["a cat", "--decoding", '{"type": "next_scale", "brush": 1}'], ["NextScale has no option brush"]),
        (["a cat", "--decoding", "collaborative_next_scale"], ["needs a refiner"]),
        (["a cat", "--dtype", "int8"], ["--dtype 'int8' is unknown; give auto, float32"]),
        (["a cat", "--quantize", "2bit"], ["--quantize '2bit' is unknown; give 8bit or 4bit"]),
        (["a cat", "--device", "toaster"], ["The device 'toaster' cannot be used"]),
        (["a cat", "-o", "missing/a.png"], ["The folder missing does not exist; make it first"]),
        (["a cat", "-o", "missing/out"], ["The folder missing does not exist"]),
        (["a cat", "-o", "file/a.png"], ["The folder file does not exist"]),
        (["a cat", "-o", "file"], ["file is a file without suffix"]),
        (["a cat", "-o", "dir.png"], ["dir.png is a folder; give a file"]),
        (["a cat", "-o", ""], ["-o is ''; give the name of a file or folder"]),
        (["a cat", "-o", ".png"], ["-o is '.png'; give the name"]),
        (["a cat", "-o", "y" * 300 + ".png"], ["cannot be written (File name too long)"]),
        (["a cat", "-o", "y" * 245 + ".png"], ["cannot be written (File name too long)"]),
        (["a cat", "-o", "a.bmp"], ["a.bmp has an unknown suffix; give one of .png"]),
        (["a cat", "--model", ""], ["The name of the model is empty"]),
        (["a cat", "--model", "dir.png/nowhere"], ["no folder and no released checkpoint 'dir.png/nowhere'"]),
        (
            ["a cat", "--model", "some/body"],
            ["There is no folder 'some/body', and as a repository of the Hub"],
        ),
        (["a cat", "--model", "nowhere"], ["no folder and no released checkpoint 'nowhere'"]),
        (["a cat", "--model", "var-d61"], ["did you mean 'var-d", "argen list"]),
        (["a cat", "--model", "dir.png"], ["holds no model (it has no config.json)"]),
        (["--again", "none.png"], ["none.png does not exist"]),
        (["--again", "file"], ["file is no picture"]),
        (["--again", "plain.png"], ["holds no record of how it was made"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(text_model, tmp_path, capsys, arguments, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.png").mkdir()
    Image.new("RGB", (4, 4)).save("plain.png")
    model = [] if "--model" in arguments or "--again" in arguments else ["--model", text_model]
    fails(capsys, ["generate", *model, *arguments], *words)
    assert names(tmp_path) == ["dir.png", "file", "plain.png"] and not names(tmp_path / "dir.png")


def test_unknown_classes(class_model, capsys, tmp_path):
    for label, words in [
        ("red focks", ["There is no class 'red focks'; the closest are 'red fox'"]),
        ("99", ["class label 99 is out of range"]),
    ]:
        fails(capsys, ["generate", "--model", class_model, "--class", label, "-o", "out"], *words)
    fails(
        capsys, ["generate", "--model", class_model, "a cat"], "draws classes, not prompts", "--class volcano"
    )
    assert names(tmp_path) == []


def test_every_class_is_checked_before_the_first_is_drawn(class_model, capsys, tmp_path):
    classes = [f"--class={i % 5}" for i in range(20)] + ["--class=99"]
    fails(
        capsys, ["generate", "--model", class_model, *classes, "-o", "out"], "class label 99 is out of range"
    )
    fails(
        capsys,
        ["generate", "--model", class_model, "--class", "-2", "-o", "out"],
        "class label -2 is negative",
    )
    assert names(tmp_path) == []


def test_warnings_are_notes_of_one_line(text_model, capsys):
    long = "a cat and a dog " * 20
    command = ["generate", long, "red apple", "--model", text_model, "--dtype", "float16", "-o", "a.png"]
    assert main(command) == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 and all(note.startswith("argen: note: ") for note in notes)
    assert "has 100 tokens; the model reads the first 32" in notes[0] and "float16 is very slow" in notes[1]
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn("as before", stacklevel=1)
    assert len(seen) == 1


def test_models_of_other_families(capsys, tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    fails(
        capsys,
        ["generate", "a cat", "--model", tmp_path / "gpt2"],
        "'gpt2' is no image generator of hf_argen",
    )
    tokenizer_config().save_pretrained(tmp_path / "vq")
    fails(capsys, ["generate", "a cat", "--model", tmp_path / "vq"], "'multiscale_vq' is no image generator")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "odd"}')
    fails(capsys, ["generate", "a cat", "--model", tmp_path / "odd"], "odd")
    assert names(tmp_path) == ["gpt2", "odd", "vq"]


def test_damaged_weights(class_model, tmp_path, capsys):
    tiny_var().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["generate", "--class", "1", "--model", str(tmp_path / "cut")]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err and names(tmp_path) == ["cut"]


def test_output_that_cannot_be_written(text_model, capsys, monkeypatch, tmp_path):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "touch", refuse)
        fails(capsys, ["generate", "a cat", "--model", text_model], "cannot be written (Permission denied)")

    real = Image.Image.save

    def full(self, path, **kwargs):
        real(self, path, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    for out in ("a.png", "out", "a.gif"):
        fails(capsys, ["generate", "a cat", "--model", text_model, "-o", out], "No space left on device")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == []


SLOW = """
import sys, time
from hf_argen.cli import files, main
real = files.write_whole
def slow(path, save):
    def patient(temporary):
        save(temporary)
        temporary.write_bytes(temporary.read_bytes()[:-20])
        print("half", flush=True)
        time.sleep(0.3)
        save(temporary)
    real(path, patient)
files.write_whole = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def interrupted(text_model, tmp_path, pytestconfig):
    """Runs the command as a process, sends it a real SIGINT while a file is half-written; names of the files."""

    def run(*arguments, after):
        command = ["generate", "a cat", "-n", "200", "--model", text_model, *arguments]
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(pytestconfig.rootpath / "src"), "OMP_NUM_THREADS": "1"},
        )
        try:
            for _ in range(after):
                assert process.stdout.readline() == "half\n"
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 130
        assert errors.strip().splitlines()[-1].startswith("argen: interrupted") and "Traceback" not in errors
        return errors.strip().splitlines()[-1]

    return run


def test_an_interrupted_batch_leaves_whole_pictures_only(interrupted, tmp_path):
    line = interrupted("-o", "out", after=3)
    written = names(tmp_path / "out")
    assert len(written) == 2
    assert line == "argen: interrupted; 2 pictures are in out"
    for name in written:
        assert name.endswith(".png") and pixels(tmp_path / "out" / name).shape == (16, 16, 3)


def test_an_interrupted_sheet_leaves_nothing(interrupted, tmp_path):
    assert interrupted("-o", "sheet.png", after=1) == "argen: interrupted"
    assert names(tmp_path) == []


def test_an_interrupted_animation_leaves_the_picture_before_it(interrupted, tmp_path):
    interrupted("-o", "sheet.png", "--animate", after=2)
    assert names(tmp_path) == ["sheet.png"]
    assert pixels("sheet.png").shape[2] == 3
