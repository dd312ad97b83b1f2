"""`argen sample`: what it writes, on one or two processes, and what is left after a kill."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_argen.cli import main, stores
from hf_argen.cli.files import read_record
from hf_argen.cli.sampling import SampleRequest

from ..helpers.goldens import REPOSITORY
from ..helpers.processes import CONTEXT
from ..test_cli import fails

CLASSES = 5
OPTIONS = ["--guidance", "1.5", "--top-k", "8", "--seed", "3", "--batch", "4"]


@pytest.fixture
def sample(class_model, capsys):
    """Runs `argen sample`; what it prints."""

    def run(out, *arguments) -> str:
        capsys.readouterr()
        assert main(["sample", "--model", class_model, "-o", str(out), *OPTIONS, *map(str, arguments)]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


@pytest.fixture(scope="module")
def whole(class_model, tmp_path_factory):
    """Three pictures of each class, drawn without interruption: the file of arrays and the folder."""
    folder = tmp_path_factory.mktemp("whole")
    for out in ("whole.npz", "whole"):
        arguments = [
            "sample",
            "--model",
            class_model,
            "-o",
            str(folder / out),
            *OPTIONS,
            "--all-classes",
            "-n",
            "3",
        ]
        assert main(arguments) == 0
    return folder / "whole.npz", folder / "whole"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def test_arrays_as_fid_tools_read_them(whole):
    file, folder = whole
    assert names(file.parent) == ["whole", "whole.npz"]
    with np.load(file) as arrays:
        assert arrays.files == ["arr_0", "argen"]
        pictures, plan = arrays["arr_0"], json.loads(arrays["argen"].item())
    assert pictures.shape == (3 * CLASSES, 16, 16, 3) and pictures.dtype == np.uint8
    assert len(np.unique(pictures.reshape(len(pictures), -1), axis=0)) == len(pictures)
    assert (plan["seed"], plan["count"], plan["batch"], plan["guidance"]) == (3, 3, 4, 1.5)
    assert names(folder) == [*(f"{i:06d}.png" for i in range(len(pictures))), "sample.json"]
    for index, picture in enumerate(pictures):
        assert np.array_equal(pixels(folder / f"{index:06d}.png"), picture)


def test_every_picture_can_be_drawn_alone(whole, tmp_path):
    """Each has a seed of its own, which its record tells."""
    _, folder = whole
    for index in (0, 6, 14):
        path = folder / f"{index:06d}.png"
        record = read_record(path)
        assert (record["seed"], record["class"], record["guidance"]) == (3 + index, str(index // 3), 1.5)
        assert main(["generate", "--again", str(path), "-o", str(tmp_path / "again.png")]) == 0
        assert np.array_equal(pixels(tmp_path / "again.png"), pixels(path))


def test_prompts_from_a_list(text_model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("red apple\n\n  blue car \n", encoding="utf-8")
    arguments = ["sample", "--model", text_model, "-n", "2", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--list", str(tmp_path / "prompts.txt")]) == 0
    assert "4 pictures, seeds 0 to 3, " in capsys.readouterr().out
    records = [read_record(tmp_path / "out" / f"{i:06d}.png") for i in range(4)]
    assert [record["prompt"] for record in records] == ["red apple"] * 2 + ["blue car"] * 2
    fails(capsys, [*arguments, "--all-classes"], "has no classes; give --list")
    fails(capsys, [*arguments, "--class", "1"], "draws prompts, not classes")
    assert main([*arguments, "red apple", "blue car"]) == 0  # the same run
    fails(capsys, [*arguments, "blue car", "red apple"], "was begun with conditions 2 prompts", "--force")


def test_two_processes_draw_the_same(whole, class_model, tmp_path):
    out = tmp_path / "shared.npz"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launcher, "--main_process_port", "0", "-m", "hf_argen.cli", "sample", "--model", class_model]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ended = subprocess.run(
        [*command, "-o", str(out), *OPTIONS, "--all-classes", "-n", "3"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("15 pictures, seeds 3 to 17, ") == 1  # only one process reports
    assert out.read_bytes() == whole[0].read_bytes()


# Interruption


def draw_in_a_process(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def start(arguments):
    process = CONTEXT.Process(target=draw_in_a_process, args=(arguments,), daemon=True)
    process.start()
    return process


def test_kills(whole, class_model, tmp_path, kills):
    """Killed at random moments, it goes on each time, and ends with what it would have drawn without."""
    arguments = ["sample", "--model", class_model, *OPTIONS, "--all-classes", "-n", "3", "-o"]
    start(["--version"]).join()  # the server that starts processes imports once
    started = time.perf_counter()
    process = start([*arguments, str(tmp_path / "first.npz")])
    process.join()
    seconds = time.perf_counter() - started
    assert process.exitcode == 0
    moments = random.Random(0)
    for _ in range(kills):
        process = start([*arguments, str(tmp_path / "out.npz")])
        time.sleep(moments.uniform(0.2, 1) * seconds)
        process.kill()
        process.join()
    process = start([*arguments, str(tmp_path / "out.npz")])
    process.join()
    assert process.exitcode == 0
    check_complete(tmp_path / "out.npz", whole)


def check_complete(out, whole) -> None:
    file, folder = whole
    if out.suffix == ".npz":
        assert out.read_bytes() == file.read_bytes()
        assert not stores.ArrayStore(out, {}, 0, 1).folder.exists()
    else:
        assert names(out) == names(folder)
        for name in names(folder):
            if name.endswith(".png"):
                assert np.array_equal(pixels(out / name), pixels(folder / name))
    assert not list(out.parent.glob(".*"))


class Killed(BaseException):
    """Ends a run where a test wants it; nothing of ours catches it."""


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_killed_at_every_change_of_a_file(whole, sample, tmp_path, monkeypatch, kind):
    """A run that dies before its next change of a file, again and again, makes progress and ends right."""
    out = tmp_path / ("out.npz" if kind == "npz" else "out")
    real = {name: getattr(Path, name) for name in ("replace", "unlink", "mkdir", "rmdir", "write_text")}
    left = 0

    def counted(name):
        def change(self, *args, **kwargs):
            nonlocal left
            if self.is_relative_to(tmp_path):
                if left == 0:
                    raise Killed
                left -= 1
            return real[name](self, *args, **kwargs)

        return change

    runs = 0
    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(Path, name, counted(name))
        # What cleans up behind a failure has no say in a kill.
        patch.setattr(stores, "write_whole", lambda path, save: unguarded(path, save))
        patch.setattr("hf_argen.cli.files.write_whole", lambda path, save: unguarded(path, save))
        patch.setattr("hf_argen.cli.sampling.check_out", lambda out, is_folder: None)
        while True:
            left, runs = 3, runs + 1
            assert runs < 60
            try:
                sample(out, "--all-classes", "-n", 3)
                break
            except Killed:
                continue
    assert runs > 5
    left = 10**6
    sample(out, "--all-classes", "-n", 3)
    check_complete(out, whole)


def unguarded(path, save) -> None:
    temporary = path.with_name(f".{path.name}.{random.random()}.part")
    save(temporary)
    temporary.replace(path)


def test_goes_on_with_what_is_missing(whole, sample, tmp_path):
    out = tmp_path / "out"
    assert "15 pictures, seeds 3 to 17, " in sample(out, "--all-classes", "-n", 3)
    (out / "000006.png").unlink()
    kept = (out / "000000.png").stat().st_mtime_ns
    assert "all there" not in sample(out, "--all-classes", "-n", 3)
    check_complete(out, whole)
    assert (out / "000000.png").stat().st_mtime_ns == kept
    assert "15 pictures, seeds 3 to 17, all there already, " in sample(out, "--all-classes", "-n", 3)


@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_another_run_is_refused_unless_forced(sample, class_model, tmp_path, capsys, suffix):
    out = tmp_path / f"out{suffix}"
    sample(out, "--class", "volcano", "-n", 2)
    arguments = ["sample", "--model", class_model, "-o", out, *OPTIONS]
    for changed, word in (
        (["--class", "volcano", "-n", 2, "--guidance", 2], "guidance 1.5, not 2.0"),
        (["--class", "crane", "-n", 2], "conditions 1 classes, sha256"),
        (["--class", "volcano", "-n", 3], "count 2, not 3"),
        (["--class", "volcano", "-n", 2, "--batch", 1], "batch 4, not 1"),
    ):
        fails(capsys, [*arguments, *changed], "was begun with", word, "--force to begin anew")
    sample(out, "--class", "crane", "-n", 1, "--force")
    assert names(tmp_path) == [out.name]
    if not suffix:
        assert names(out) == ["000000.png", "sample.json"]
        assert read_record(out / "000000.png")["class"] == "crane"


def test_what_is_not_ours_stays(class_model, capsys, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000.png").write_bytes(b"mine")
    np.savez(tmp_path / "mine.npz", arr_0=np.zeros(3))
    (tmp_path / "text.npz").write_text("mine")
    command = ["sample", "--model", class_model, "--class", "1", "--force", "-o"]
    fails(capsys, [*command, tmp_path / "photos"], "is not empty; give another output")
    for name in ("mine.npz", "text.npz"):
        before = (tmp_path / name).read_bytes()
        fails(capsys, [*command, tmp_path / name], "is not of argen sample; give another output")
        assert (tmp_path / name).read_bytes() == before
    assert (tmp_path / "photos" / "000000.png").read_bytes() == b"mine"
    assert names(tmp_path) == ["mine.npz", "photos", "text.npz"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["Give what to draw in one way: prompts, --class, --list or --all-classes"]),
        (["--class", "1", "--all-classes"], ["Give what to draw in one way"]),
        (["--class", "1", "-n", "0"], ["-n is 0; it must be at least 1"]),
        (["--class", "1", "--batch", "0"], ["--batch is 0; it must lie in [1, 1000]"]),
        (["--class", "1", "--seed", "-1"], ["--seed is -1"]),
        (["--class", "99"], ["class label 99 is out of range"]),
        (["--class", "red focks"], ["There is no class 'red focks'"]),
        (["a cat"], ["draws classes, not prompts"]),
        (["--list", "none.txt"], ["--list none.txt cannot be read (No such file or directory)"]),
        (["--list", "empty.txt"], ["--list empty.txt is empty; write one prompt or class a line"]),
        (["--class", "1", "-o", "a.png"], ["has the suffix of one picture; give NAME.npz"]),
        (["--class", "1", "-o", "none/out"], ["The folder none does not exist"]),
        (["--class", "1", "--dtype", "int8"], ["--dtype 'int8' is unknown"]),
    ],
)
def test_bad_input(class_model, capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    fails(capsys, ["sample", "--model", class_model, *arguments], *words)
    assert names(tmp_path) == ["empty.txt"]


def test_many_pictures_are_planned_quickly():
    """The 50,000 pictures of a published FID; no list is made once per picture."""
    request = SampleRequest(classes=[str(i) for i in range(1000)], count=50, seed=0, batch=16)
    request.check()
    assert len(request.pictures()) == 50_000
    started = time.perf_counter()
    seeds = [request.one(index).seed for index in range(0, 50_000, 10)]
    assert seeds == list(range(0, 50_000, 10)) and time.perf_counter() - started < 5
