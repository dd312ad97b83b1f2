"""
README and docs: what can run runs, links lead somewhere, what follows from the code is up to date.

Blocks of ```python and the `argen` lines of ```sh run blocks run in order, in one namespace per page, in a folder that
holds the files of `originals`. A block of ```python no-run needs the network and is only compiled. A block of
```python file=NAME is written to that file; files called test_* are run by pytest after the other blocks of the page.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_argen import MultiScaleVQConfig, VarConfig, VarForImageGeneration, convert_original
from hf_argen.assets import DEFAULT_NAME
from hf_argen.auto import FAMILIES, new_processor
from hf_argen.cli.files import read_record
from hf_argen.cli.opening import fingerprint
from hf_argen.data.emoji import emoji_list
from hf_argen.modeling.conversion import converter_of, load_presets
from hf_argen.modeling.tokenizers.multiscale_vq.convert_multiscale_vq import TOKENIZER
from hf_argen.modeling.var.convert_var import TRANSFORMER

from .helpers.goldens import REPOSITORY
from .helpers.tiny import tiny_mar

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|sh run)(?: ([^\n]*))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNER = """
import json, shlex, sys
from hf_argen.cli import main
page, blocks = sys.argv[1], json.load(open(sys.argv[2]))
namespace = {"__name__": "__main__"}
for line, language, code in blocks:
    if language == "python":
        exec(compile("\\n" * line + code, page, "exec"), namespace)
        continue
    for command in code.splitlines():
        words = shlex.split(command, comments=True)
        assert words[0] == "argen" and main(words[1:]) == 0, command
"""


def blocks_of(page: Path) -> list[tuple[int, str, str, str]]:
    """(lines before it, language, mark, code) of every block that runs or could."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: found.start(3)].count("\n"), found[1], found[2] or "", found[3])
        for found in BLOCK.finditer(text)
    ]


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """
    A tiny VAR with the names, scales, classes and codes of the released one: checkpoints in the authors' format, the
    converted folder `var-d16`, and a picture. Tiny MARs of as many classes, `mar-base` and `mar-large`.
    """
    torch.manual_seed(0)
    tokenizer = MultiScaleVQConfig(
        base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, latent_channels=8
    )
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = VarForImageGeneration(VarConfig(image_tokenizer_config=tokenizer, **sizes))
    own = {
        key: tensor for key, tensor in model.state_dict().items() if not key.startswith("image_tokenizer.")
    }
    transformer = TRANSFORMER.revert(own)
    lengths = model.config.scale_lengths
    transformer["lvl_1L"] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    vae = TOKENIZER.revert(model.image_tokenizer.state_dict())
    folder = tmp_path_factory.mktemp("originals")
    for name in ("var_d16.pth", "drafter_8.pth", "refiner_8.pth"):
        torch.save(transformer, folder / name)
    torch.save(vae, folder / "vae_ch160v4096z32.pth")
    (folder / "hub-var-d16").mkdir()
    save_file(
        {key: tensor.contiguous() for key, tensor in transformer.items()},
        folder / "hub-var-d16" / "model.safetensors",
    )
    arguments = {
        "num_heads": 2,
        "attn_l2_norm": True,
        "vae_kwargs": {"share_quant_resi": 4, "test_mode": True},
    }
    (folder / "hub-var-d16" / "config.json").write_text(json.dumps(arguments))
    nested = {"epoch": 1, "trainer": {"var_wo_ddp": transformer, "vae_local": vae}}
    torch.save(nested, folder / "ar-ckpt-best.pth")
    files = {"transformer": folder / "var_d16.pth", "tokenizer": folder / "vae_ch160v4096z32.pth"}
    converted = convert_original("var", files)
    converted.save_pretrained(folder / "var-d16")
    new_processor(converted.config).save_pretrained(folder / "var-d16")
    for name in ("mar-base", "mar-large"):
        tiny_mar(num_classes=1000).save_pretrained(folder / name)
    Image.linear_gradient("L").convert("RGB").resize((48, 40)).save(folder / "photo.png")
    return folder


def run(arguments, folder):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY), str(folder)]),
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, originals, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(originals, folder)
    runnable, tests = [], []
    for line, language, mark, code in blocks_of(page):
        if language == "python":
            compile(code, str(page), "exec")
        if mark.startswith("file="):
            file = folder / mark.removeprefix("file=")
            file.write_text(code)
            tests += [file] if file.name.startswith("test_") else []
        elif mark == "":
            runnable.append((line, language, code))
        else:
            assert mark == "no-run", f"{page.name}:{line} has the unknown mark {mark!r}"
    if runnable:
        (tmp_path / "blocks.json").write_text(json.dumps(runnable))
        ended = run(["-c", RUNNER, page, tmp_path / "blocks.json"], folder)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    if tests:
        ended = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], folder)
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_only_what_needs_the_network_does_not_run():
    codes = [code for page in PAGES for *_, mark, code in blocks_of(page) if mark == "no-run"]
    assert codes
    for code in codes:
        names = ("from_original(", "push_to_hub(", "Eagle.from_pretrained(")
        assert any(name in code for name in names), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name} links to {target}"


def test_generated_parts_are_up_to_date():
    spec = importlib.util.spec_from_file_location("make_tables", REPOSITORY / "docs" / "make_tables.py")
    make_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tables)
    for name in make_tables.PAGES:
        page = (REPOSITORY / name).read_text(encoding="utf-8")
        assert "<!-- generated: " in page
        assert make_tables.filled(page) == page, f"{name} is out of date; run python docs/make_tables.py"


def test_the_readme_has_every_family_and_checkpoint():
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Families")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    families = {re.findall(r"`([^`]+)`", row[0])[0]: row for row in rows}
    assert families.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        row = families[name]
        class_name = (family.generator or family.base_model).rpartition(".")[2]
        assert f"`{class_name}`" in row[1]
        assert set(re.findall(r"`([^`]+)`", row[2])) == load_presets(family.package).keys()
        assert all(number in row[3] for number in re.findall(r"arXiv ([\d.]+)", family.title))


def test_pictures_were_drawn_by_the_model_of_the_package():
    pictures = sorted((REPOSITORY / "docs" / "pictures").glob("*.png"))
    assert pictures
    for picture in pictures:
        record = read_record(picture)
        again = f"argen generate --again {picture} --model {DEFAULT_NAME} -o {picture}"
        assert record["model"] == DEFAULT_NAME and record["weights"] == fingerprint(None, None), again


def test_prompts_that_are_called_unseen_are():
    seen = {words for one in emoji_list() for words in (*one.captions, *one.keywords)}
    prompts = read_record(REPOSITORY / "docs" / "pictures" / "unseen.png")["prompt"]
    demo = (REPOSITORY / "examples" / "demo.py").read_text(encoding="utf-8")
    in_demo = ast.literal_eval(re.search(r"^UNSEEN = (\(.*?\))", demo, re.MULTILINE | re.DOTALL)[1])
    assert len(in_demo) >= 2 and not seen & {*prompts, *in_demo}


def test_the_roles_of_the_files_are_listed():
    text = (REPOSITORY / "docs" / "convert.md").read_text(encoding="utf-8")
    for name, family in FAMILIES.items():
        converter = converter_of(family.package)
        rows = [line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line]
        for role in [*converter.roles, *converter.containers]:
            assert any(f"`{role}`" in row for row in rows), f"{name}: {role}"
