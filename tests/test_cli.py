"""The `argen` command: what it writes, how it ends."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import hf_argen
from hf_argen import VarForImageGeneration, VarProcessor
from hf_argen.cli import main

from .helpers.goldens import golden


@pytest.fixture(scope="module")
def reference():
    return golden("var", "d2_adaln_l2_q4")


@pytest.fixture
def options(reference):
    files = reference.files("tokenizer", "transformer")
    return ["var", *(f"--file={role}={path}" for role, path in files.items())]


GROUPS = "--config=tokenizer.norm_num_groups=4"


def fails(capsys, arguments, *words, status=2):
    """The command ends with `status` and one line on stderr that holds all `words`."""
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("argen: ")
    assert "Traceback" not in captured.err
    for word in words:
        assert word in line


def assert_converted(folder, reference):
    expected, found = (
        reference.convert().state_dict(),
        VarForImageGeneration.from_pretrained(folder).state_dict(),
    )
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_convert_writes_what_from_pretrained_opens(tmp_path, capsys, options, reference):
    out = tmp_path / "new" / "model"
    assert main(["convert", *options, str(out), GROUPS]) == 0
    assert f"{out}: VarForImageGeneration, 0.2 million parameters" in capsys.readouterr().out
    assert_converted(out, reference)
    processor = AutoProcessor.from_pretrained(out)
    assert type(processor) is VarProcessor and processor.image_size == (80, 80)
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert json.loads((out / "generation_config.json").read_text())["guidance_scale"] == 1.5


def test_convert_writes_a_tokenizer_alone(tmp_path, reference):
    file = reference.files("tokenizer")["tokenizer"]
    scales = "--config=tokenizer.v_patch_nums=[1, 2, [3, 4]]"
    assert main(["convert", "var", str(tmp_path / "out"), f"--file=tokenizer={file}", GROUPS, scales]) == 0
    assert AutoModel.from_pretrained(tmp_path / "out").config.patch_nums == [1, 2, [3, 4]]
    assert not (tmp_path / "out" / "processor_config.json").exists()


def test_convert_reads_arguments_from_json(tmp_path, options, reference):
    (tmp_path / "arguments.json").write_text(json.dumps(reference.original_config()))
    arguments = ["convert", *options, str(tmp_path / "out"), "--config", str(tmp_path / "arguments.json")]
    assert main([*arguments, "--config=transformer.norm_eps=1e-5"]) == 0
    assert_converted(tmp_path / "out", reference)
    assert VarForImageGeneration.from_pretrained(tmp_path / "out").config.layer_norm_eps == 1e-5


def test_convert_refuses_a_folder_that_holds_something(tmp_path, capsys, options, reference):
    (tmp_path / "mine.txt").write_text("keep")
    fails(capsys, ["convert", *options, tmp_path, GROUPS], "is not empty", "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert main(["convert", *options, str(tmp_path), GROUPS, "--force"]) == 0
    assert_converted(tmp_path, reference)
    assert not (tmp_path / "mine.txt").exists()


def test_convert_refuses_a_file_as_folder(tmp_path, capsys, options):
    (tmp_path / "out").write_text("")
    fails(capsys, ["convert", *options, tmp_path / "out", GROUPS, "--force"], "is a file; give a folder")


def test_failure_leaves_nothing_behind(tmp_path, capsys, options, monkeypatch):
    fails(capsys, ["convert", *options, tmp_path / "out"], "norm_num_groups=32")
    assert not list(tmp_path.iterdir())

    def breaks_off(self, folder, **kwargs):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(VarForImageGeneration, "save_pretrained", breaks_off)
    fails(capsys, ["convert", *options, tmp_path / "out", GROUPS], "No space left on device", status=1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    fails(capsys, ["convert", *options, tmp_path / "out", GROUPS, "--force"], "No space left", status=1)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["convert", "vra", "OUT"], ["'vra' is neither a released checkpoint nor a family", "'var'"]),
        (["convert", "var-d15", "OUT"], ["did you mean 'var-d1", "argen list"]),
        (["convert", "var", "OUT"], ["No files given; the roles of var are transformer, tokenizer"]),
        (["convert", "var", "OUT", "--file=tokenizer"], ["--file 'tokenizer' is not of the form NAME=VALUE"]),
        (["convert", "var", "OUT", "--file=tokenizer=none.pth"], ["'none.pth' does not exist"]),
        (["convert", "var", "OUT", "--config=depth=3"], ["neither ROLE.KEY=VALUE nor a JSON file"]),
        (["convert", "var", "OUT", "--config=none.json"], ["nor an existing JSON file"]),
        (["convert", "var-d16", "OUT", "--file=tokenizer=vae.pth"], ["is a preset and brings its own files"]),
        (["convert"], ["Missing argument 'PRESET_OR_FAMILY'"]),
        (["convert", "var", "OUT", "--fil=x"], ["No such option"]),
        (["conver"], ["No such command 'conver'"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, words):
    out = tmp_path / "out"
    fails(capsys, [out if argument == "OUT" else argument for argument in arguments], *words)
    assert not out.exists()


@pytest.mark.parametrize("content, word", [("{", "is not JSON"), ("[1]", "must map roles to dicts")])
def test_bad_json(tmp_path, capsys, content, word):
    (tmp_path / "c.json").write_text(content)
    fails(capsys, ["convert", "var", tmp_path / "out", "--config", tmp_path / "c.json"], word)


def test_debugging_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("ARGEN_DEBUG", "1")
    with pytest.raises(ValueError, match="No files given"):
        main(["convert", "var", str(tmp_path / "out")])


def test_list_shows_families_checkpoints_and_decodings(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert "transformer, tokenizer, trainer" in rows["var"]
    assert "FID 3.55" in rows["var-d16"] and "FID 1.98" in rows["code-8"]
    assert " exact " in rows["next_scale"] and "coarse to fine" in rows["next_scale"]
    assert "relaxed (bounded by draft_scales)" in rows["collaborative_next_scale"]


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf_argen {hf_argen.__version__}\n"
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        assert "convert" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["hf_argen", "hf_argen.cli"])
def test_module_runs_as_a_program(tmp_path, module):
    command = [sys.executable, "-m", module, "convert", "vra", str(tmp_path / "out")]
    environment = {**os.environ, "NO_COLOR": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("argen: 'vra' is neither") and len(ended.stderr.splitlines()) == 1
