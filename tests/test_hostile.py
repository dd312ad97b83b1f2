"""Files in the authors' format that are damaged or made to harm; saved folders are in `modeling/model_base.py`."""

import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hf_argen import AutoModelForImageGeneration, VarForImageGeneration, VarProcessor, convert_original
from hf_argen.cli import main

from .helpers.goldens import golden
from .helpers.hostile import (
    ARCHIVES,
    FOLDERS,
    assert_refused,
    config_says,
    context,
    flipped_archives,
    flipped_headers,
    loaded_or_refused,
    weights_of,
)
from .helpers.kills import Child
from .helpers.tiny import tiny_var
from .modeling.model_base import assert_same_tensors

GROUPS = {"tokenizer": {"norm_num_groups": 4}}
MEGABYTES = 400  # more than any refusal may take


@pytest.fixture(scope="module")
def reference():
    return golden("var", "d2_adaln_l2_q4")


@pytest.fixture(scope="module")
def originals(reference, tmp_path_factory):
    """The files of a reference case, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("originals")
    for role, path in reference.files("transformer", "tokenizer").items():
        shutil.copy(path, folder / f"{role}.pth")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_var().save_pretrained(folder)
    VarProcessor(class_names=list("abcde"), image_size=(16, 16)).save_pretrained(folder)
    return folder


def convert(folder, transformer="transformer.pth"):
    files = {"transformer": folder / transformer, "tokenizer": folder / "tokenizer.pth"}
    return convert_original("var", files, GROUPS)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # of zipfile, which writes it
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("name", ARCHIVES)
def test_hostile_archives_are_refused(originals, tmp_path, name):
    shutil.copytree(originals, tmp_path / "files")
    ARCHIVES[name](tmp_path / "files" / "transformer.pth")
    assert_refused(lambda: convert(tmp_path / "files"))
    assert not list(tmp_path.rglob("was_run"))


def test_flipped_bits_of_an_archive_never_convert_to_something_else(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "files")
    expected, refused = convert(originals), 0
    for _ in flipped_archives(tmp_path / "files" / "transformer.pth", count=60):
        converted = loaded_or_refused(lambda: convert(tmp_path / "files"))
        refused += converted is None
        if converted is not None:
            assert_same_tensors(expected, converted)
    assert refused > 20


@pytest.mark.parametrize("name", [name for name in FOLDERS if "config" not in name and "pickle" not in name])
def test_hostile_safetensors_are_refused_by_conversion(originals, tmp_path, name):
    """A role may be a folder of safetensors."""
    shutil.copytree(originals, tmp_path / "files")
    folder = tmp_path / "files" / "transformer"
    folder.mkdir()
    weights = torch.load(tmp_path / "files" / "transformer.pth", weights_only=True)
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, weights_of(folder))
    assert convert(tmp_path / "files", "transformer").config.num_hidden_layers == 2
    FOLDERS[name](folder)
    if name == "index beside weights":
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    assert_refused(lambda: convert(tmp_path / "files", "transformer"))


def test_flipped_bits_of_safetensors_never_convert_to_something_else(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "files")
    folder = tmp_path / "files" / "transformer"
    folder.mkdir()
    weights = torch.load(tmp_path / "files" / "transformer.pth", weights_only=True)
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, weights_of(folder))
    expected = convert(originals)
    for _ in flipped_headers(folder, count=30):
        converted = loaded_or_refused(lambda: convert(tmp_path / "files", "transformer"))
        if converted is not None:
            assert_same_tensors(expected, converted)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_auto_class_and_the_command_refuse_them_too(saved, tmp_path, capsys, name):
    shutil.copytree(saved, tmp_path / "model")
    FOLDERS[name](tmp_path / "model")
    assert_refused(lambda: AutoModelForImageGeneration.from_pretrained(tmp_path / "model"))
    arguments = [
        "generate",
        "--class",
        "a",
        "--model",
        str(tmp_path / "model"),
        "-o",
        str(tmp_path / "a.png"),
    ]
    assert main(arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("argen: ") and "Traceback" not in "".join(errors)
    assert not (tmp_path / "a.png").exists() and not list(tmp_path.rglob("was_run"))


def test_code_that_a_configuration_names_is_not_run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    code = f"open({str(tmp_path / 'was_run')!r}, 'w')\n"
    (tmp_path / "model" / "evil.py").write_text(code)
    (tmp_path / "model" / "custom_generate").mkdir()
    (tmp_path / "model" / "custom_generate" / "generate.py").write_text(code)
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoProcessor": "evil.Processor"}
    config_says(auto_map=names)(tmp_path / "model")
    model = AutoModelForImageGeneration.from_pretrained(tmp_path / "model")
    assert_same_tensors(VarForImageGeneration.from_pretrained(saved), model)
    assert not (tmp_path / "was_run").exists()


def test_a_processor_that_is_a_link_out_or_damaged(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    outside = tmp_path / "outside.json"
    shutil.move(file, outside)
    file.symlink_to(outside)
    assert "is a link that leads out" in assert_refused(
        lambda: VarProcessor.from_pretrained(tmp_path / "model")
    )
    file.unlink()
    file.write_text('{"class_names": ')
    assert main(["generate", "--class", "a", "--model", str(tmp_path / "model")]) == 2
    assert "processor_config.json" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_the_hubs_cache_is_made_of_links(saved, tmp_path):
    repository = tmp_path / "models--tester--var"
    snapshot = repository / "snapshots" / "0123"
    shutil.copytree(saved, repository / "blobs")
    snapshot.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    expected = VarForImageGeneration.from_pretrained(saved)
    assert_same_tensors(expected, VarForImageGeneration.from_pretrained(snapshot))
    assert VarProcessor.from_pretrained(snapshot).class_names == list("abcde")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(saved / "config.json")
    assert_refused(lambda: VarForImageGeneration.from_pretrained(snapshot))


HUGE_CONFIGS = {
    "wide": {"hidden_size": 2**20, "intermediate_size": 2**22},
    "deep": {"num_hidden_layers": 10**9},
    "many classes": {"num_classes": 10**9},
    "many tokens": {"patch_nums": [1, 2, 10**5]},
}


def refuse_all(saved, originals, folder):
    """The cases that ask for memory; everything that they take is taken by this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + 4 * 2**30,) * 2)
    yield
    for name, damage in {**FOLDERS, **{k: config_says(**v) for k, v in HUGE_CONFIGS.items()}}.items():
        shutil.copytree(saved, folder / name / "model")
        damage(folder / name / "model")
        with context(name):
            assert_refused(lambda name=name: VarForImageGeneration.from_pretrained(folder / name / "model"))
    for name, damage in ARCHIVES.items():
        shutil.copytree(originals, folder / f"archive {name}")
        damage(folder / f"archive {name}" / "transformer.pth")
        with context(name):
            assert_refused(lambda name=name: convert(folder / f"archive {name}"))
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert taken < MEGABYTES, f"{taken:.0f} MB"


def address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def test_memory_is_bounded(saved, originals, tmp_path):
    Child(refuse_all, saved, originals, tmp_path).finish()
