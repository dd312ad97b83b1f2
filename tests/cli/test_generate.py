"""`argen generate`: what it writes, and what it refuses."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2Model, pipeline

import hf_argen.assets
from hf_argen import NextScale, VarForImageGeneration, VarProcessor
from hf_argen.cli import files, generating, main, opening
from hf_argen.cli.request import DrawRequest
from hf_argen.cli.sheets import FONT_SIZE, contact_sheet, wrapped

from .helpers.tiny import spread, text_tokenizer, text_var_config, tiny_var, tokenizer_config
from .test_cli import fails

NAMES = ["goldfish", "volcano", "red fox, Vulpes vulpes", "red wine", "crane"]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.startswith("command") and "'a cat and a dog' -n 3" in command
    words = command.split("argen generate ", 1)[1]
    assert "--guidance 2.0 --top-k 9 --top-p 0.9 --temperature 1.5 --dtype bfloat16" in words


def test_the_record_of_a_folder_is_that_of_one_picture(argen):
    argen("a cat", "-n", 3, "--seed", 3, "-o", "out")
    request = generating.again(generating.Path("out/a-cat-5.png"))
    assert (request.prompts, request.count, request.seed) == (["a cat"], 1, 5)


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Nothing to draw; give a prompt"]),
        ([""], ["A prompt is empty"]),
        (["a cat", "  "], ["A prompt is empty"]),
        (["x" * 10_000], ["has 10000 characters"]),
        (["a cat", "--class", "1"], ["Prompts and --class are both given"]),
        (["--class", "1"], ["draws prompts, not classes", "argen generate 'red apple'"]),
        (["a cat", "-n", "-3"], ["-n is -3; it must be at least 1"]),
        (["a cat", "-n", "0"], ["-n is 0"]),
        (["a cat", "-n", "1000000000"], ["makes 1000000000 pictures; 1000 are the most"]),
        (["a cat", "-n", "two"], ["Invalid value for '-n'"]),
        (["a cat", "--seed", "-1"], ["--seed is -1"]),
        (["a cat", "--temperature", "0"], ["temperature is 0.0"]),
        (["a cat", "--top-k", "1000"], ["top_k is 1000"]),
        (["a cat", "--guidance", "-1"], ["guidance"]),
        (["a cat", "--decoding", "nextscale"], ["There is no decoding 'nextscale'", "next_scale"]),
        (["a cat", "--decoding", "{"], ["is not JSON"]),
        (["a cat", "--dtype", "int8"], ["--dtype 'int8' is unknown; give auto, float32"]),
        (["a cat", "--quantize", "2bit"], ["--quantize '2bit' is unknown; give 8bit or 4bit"]),
        (["a cat", "--device", "toaster"], ["The device 'toaster' cannot be used"]),
        (["a cat", "-o", "missing/a.png"], ["The folder missing does not exist; make it first"]),
        (["a cat", "-o", "missing/out"], ["The folder missing does not exist"]),
        (["a cat", "-o", "file/a.png"], ["The folder file does not exist"]),
        (["a cat", "-o", "file"], ["file is a file without suffix"]),
        (["a cat", "-o", "dir.png"], ["dir.png is a folder; give a file"]),
        (["a cat", "-o", "a.bmp"], ["a.bmp has an unknown suffix; give one of .png"]),
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


def test_quantization(argen, capsys, text_model, monkeypatch):
    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
        )
        fails(
            capsys,
            ["generate", "a cat", "--model", text_model, "--quantize", "4bit"],
            "pip install bitsandbytes",
        )
    config = text_var_config(80)
    config.hidden_size, config.intermediate_size = 64, 128
    skipped = opening._not_quantized(config)
    assert "model.input_projection" in skipped and "head" in skipped
    assert "model.layers.0.self_attn.q_proj" not in skipped


SLOW = """
import sys, time
from hf_argen.cli import files, main
real = files.write_whole
def slow(path, save):
    def patient(temporary):
        save(temporary)
        print("half", flush=True)
        time.sleep(0.2)
    real(path, patient)
files.write_whole = slow
sys.exit(main(sys.argv[1:]))
"""


def test_interruption_leaves_whole_files_only(text_model, tmp_path, pytestconfig):
    arguments = ["generate", "a cat", "-n", "200", "--model", text_model, "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pytestconfig.rootpath,
    )
    try:
        for _ in range(3):
            assert process.stdout.readline() == "half\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    written = names(tmp_path / "out")
    line = errors.strip().splitlines()[-1]
    assert line == f"argen: interrupted; {len(written)} pictures are in {tmp_path / 'out'}"
    assert 2 <= len(written) < 200
    for name in written:
        assert name.endswith(".png") and pixels(tmp_path / "out" / name).shape == (16, 16, 3)


def test_captions_are_cut():
    from PIL import ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    lines = wrapped("a very long caption " * 9, font, 128)
    assert len(lines) == 2 and lines[1].endswith("…")
    assert wrapped("x" * 99, font, 128)[0].endswith("…") and wrapped("", font, 128) == []
    assert all(font.getlength(line) <= 128 for line in [*lines, *wrapped("x" * 99, font, 128)])
    sheet = contact_sheet([Image.new("RGB", (300, 200))] * 5, ["x"] * 5)
    assert sheet.size == (3 * 308 + 8, 2 * (200 + 17 + 8 + 8) + 8)


def test_records_and_names():
    request = DrawRequest(prompts=["a"], count=2, seed=5, model="m")
    assert DrawRequest.from_record(request.record()) == request
    assert request.command() == "argen generate a -n 2 --model m --seed 5"
    with pytest.raises(ValueError, match="The record of version 9 does not fit"):
        DrawRequest.from_record({"version": "9", "brush": "wide"})
    assert files.file_names(["A cat!", "a  cat", "…"], [1, 1, 1]) == [
        "a-cat-1.png",
        "a-cat-1-2.png",
        "picture-1.png",
    ]


def test_quantized_layers_get_inputs_in_the_dtype_of_computation():
    """The weight of a quantized layer is int8, which is no dtype for its input."""

    class Quantized(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.weight = torch.zeros(1, dtype=torch.int8)

        def forward(self, values):
            assert values.dtype == torch.float32
            return self.layer(values)

    text = VarForImageGeneration(text_var_config(80)).eval()
    expected = text.generate(prompt_ids=torch.tensor([[1, 2]]))
    text.model.text_projection = Quantized(text.model.text_projection)
    text.model.input_projection = Quantized(text.model.input_projection)
    assert torch.equal(text.generate(prompt_ids=torch.tensor([[1, 2]])), expected)
