"""Pushing and fetching with the real huggingface_hub client, against the Hub in `tests/helpers/local_hub.py`."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoProcessor, pipeline

from hf_argen import AutoModelForImageGeneration, VarForImageGeneration, VarProcessor, convert_original
from hf_argen import hub as hub_module
from hf_argen.auto import new_processor
from hf_argen.cli import main
from hf_argen.hub import PushError, fetch_file, push_folder
from hf_argen.modeling.checkpoints import ConversionError
from hf_argen.pipelines.class_to_image import ClassToImagePipeline

from .helpers.released import publish_tiny_preset, tiny_released, use_tiny_presets
from .helpers.tiny import spread, text_tokenizer, text_var_config, tiny_var
from .modeling.model_base import assert_same_tensors

REPO = "tester/var"
CONTENT = bytes(range(256)) * 4000  # a megabyte


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return tiny_var()


@pytest.fixture
def preset(monkeypatch, hub):
    """`var-d16` as a tiny checkpoint, in the repository and under the names of the released one."""
    use_tiny_presets(monkeypatch.setattr)
    publish_tiny_preset(hub)
    return tiny_released()


def content_of(path: str) -> bytes:
    return Path(path).read_bytes()


def card_of(hub, repo_id=REPO) -> ModelCard:
    return ModelCard(hub.files(repo_id)["README.md"].decode())


# Pushing models


def test_a_pushed_model_comes_back(hub, model):
    info = model.push_to_hub("var", commit_message="first", tags=["test"])
    commit = hub.repositories[REPO].branches["main"][-1]
    assert (info.oid, commit.title) == (commit.sha, "first")
    assert {name: blob.is_large for name, blob in commit.files.items()} == {
        "README.md": False,
        "config.json": False,
        "generation_config.json": False,
        "model.safetensors": True,
    }
    assert len(hub.repositories[REPO].branches["main"]) == 2  # one commit for everything
    assert_same_tensors(model, VarForImageGeneration.from_pretrained(REPO))
    assert type(AutoModelForImageGeneration.from_pretrained(REPO)) is VarForImageGeneration
    assert {"test", "var", "arxiv:2404.02905"} <= set(card_of(hub).data.tags)
    assert f'pipeline("class-to-image", "{REPO.split("/")[1]}")' in card_of(hub).text


def test_what_is_there_is_not_uploaded_again(hub, model):
    model.push_to_hub(REPO)
    uploads = len(hub.requests("PUT", "/lfs/"))
    assert uploads == 1
    model.push_to_hub(REPO)
    assert len(hub.requests("PUT", "/lfs/")) == uploads
    assert len(hub.repositories[REPO].branches["main"]) == 2  # nothing changed, so there is no commit


def test_large_files_go_in_parts(hub, model):
    hub.part_size = 100_000
    model.push_to_hub(REPO)
    assert len(hub.requests("PUT", r"/lfs/\w+/\d+")) > 1
    assert len(hub.requests("POST", "/complete")) == 1
    assert_same_tensors(model, VarForImageGeneration.from_pretrained(REPO))


def test_shards_replace_a_single_file_and_the_other_way_round(hub, model):
    def weights():
        return [name for name in hub.files(REPO) if "safetensors" in name]

    model.push_to_hub(REPO)
    model.push_to_hub(REPO, variant="other", max_shard_size="200KB")
    model.push_to_hub(REPO, max_shard_size="100KB")
    assert "model.safetensors" not in weights() and "model.safetensors.index.json" in weights()
    assert_same_tensors(model, VarForImageGeneration.from_pretrained(REPO))
    model.push_to_hub(REPO)
    plain = [name for name in weights() if "other" not in name]
    assert plain == ["model.safetensors"] and len(weights()) > 2
    assert_same_tensors(model, VarForImageGeneration.from_pretrained(REPO))
    assert_same_tensors(model, VarForImageGeneration.from_pretrained(REPO, variant="other"))


def test_branches_pull_requests_and_private_repositories(hub, model, monkeypatch, tmp_path):
    model.push_to_hub(REPO, private=True)
    other = tiny_var()
    other.push_to_hub(REPO, revision="next")
    info = other.push_to_hub(REPO, create_pr=True)
    assert info.pr_revision == "refs/pr/1"
    assert_same_tensors(model, VarForImageGeneration.from_pretrained(REPO))
    for revision in ("next", "refs/pr/1"):
        assert_same_tensors(other, VarForImageGeneration.from_pretrained(REPO, revision=revision))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="not a valid model identifier"):
        VarForImageGeneration.from_pretrained(REPO, cache_dir=tmp_path)


def test_saving_and_pushing_in_one_call(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, variant="half", max_shard_size="200KB")
    names = set(hub.files("tester/mine"))
    assert "model.safetensors.index.half.json" in names
    assert names == {path.name for path in (tmp_path / "mine").iterdir()}


def test_without_the_right_to_write(hub, model, monkeypatch):
    with pytest.raises(PushError, match=r"does not let you write to else/var \(403\); log in"):
        model.push_to_hub("else/var")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(PushError, match=r"does not let you write to tester/var \(401\); log in"):
        model.push_to_hub(REPO)
    assert not hub.repositories
    with pytest.raises(PushError, match="a/b/c cannot be pushed"):
        model.push_to_hub("a/b/c")


def test_a_push_that_fails_changes_nothing(hub, model):
    model.push_to_hub(REPO)
    before = hub.files(REPO)

    def fail_at_commit(method, path):
        if "/commit/" in path:
            hub.faults.statuses = [500]

    hub.faults.before = fail_at_commit
    other = tiny_var()
    with pytest.raises(PushError, match=f"{REPO} cannot be pushed: .*500"):
        other.push_to_hub(REPO)
    assert hub.files(REPO) == before
    hub.faults.before = None
    other.push_to_hub(REPO)
    assert_same_tensors(other, VarForImageGeneration.from_pretrained(REPO))


# Cards


def test_a_card_that_was_edited_there_stays(hub, model):
    model.push_to_hub(REPO)
    edited = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n"
    hub.add(REPO, {"README.md": edited.encode()})
    tiny_var().push_to_hub(REPO)
    card = card_of(hub)
    assert "# My model" in card.text and card.data.license == "mit"
    assert {"mine", "var"} <= set(card.data.tags)


def test_the_template_of_transformers_gives_way(hub, model):
    VarProcessor(class_names=list("abcde"), image_size=(16, 16)).push_to_hub(REPO)
    assert "automatically generated" in card_of(hub).text
    model.push_to_hub(REPO)
    assert "VarForImageGeneration" in card_of(hub).text
    assert AutoProcessor.from_pretrained(REPO).class_names == list("abcde")


# Fetching


def test_codes_of_what_is_not_there(hub):
    hub.add(REPO, {"config.json": b'{"model_type": "var"}'})
    for error, repo, file, revision in (
        (RepositoryNotFoundError, "tester/none", "config.json", None),
        (RevisionNotFoundError, REPO, "config.json", "none"),
        (EntryNotFoundError, REPO, "none.json", None),
    ):
        with pytest.raises(error):
            hf_hub_download(repo, file, revision=revision)
        with pytest.raises(error):
            fetch_file(repo, file, revision=revision)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        VarForImageGeneration.from_pretrained(REPO)


def test_a_connection_that_breaks_off_is_resumed(hub, model):
    """By huggingface_hub itself, within one call."""
    model.push_to_hub(REPO)
    size = len(hub.files(REPO)["model.safetensors"])
    hub.sent, hub.faults.break_after = 0, [100_000]
    folder = snapshot_download(REPO, allow_patterns=["*.safetensors", "config.json"])
    first, second = hub.requests("GET", "/lfs/")
    assert first.range is None and second.range == f"bytes={100_000 // 2**14 * 2**14}-"
    assert_same_tensors(model, VarForImageGeneration.from_pretrained(folder))
    assert size < hub.sent < size + 2**14


@pytest.mark.parametrize("fails_with", [KeyboardInterrupt, OSError])
def test_a_download_goes_on_in_the_next_call(hub, monkeypatch, fails_with):
    hub.add(REPO, {"w.pth": CONTENT})

    def interrupted(url, target, **kwargs):
        target.write(CONTENT[:600_000])
        raise fails_with

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "http_get", interrupted)
        with pytest.raises(
            fails_with, match=r"600,000 of 1,024,000 bytes" if fails_with is OSError else None
        ):
            fetch_file(REPO, "w.pth")
    path = fetch_file(REPO, "w.pth")
    assert content_of(path) == CONTENT
    assert [call.range for call in hub.requests("GET", "/lfs/")] == ["bytes=600000-"]
    assert hub.sent == len(CONTENT) - 600_000
    assert not any(call.has_token for call in hub.requests("GET", "/lfs/"))  # it is for the Hub alone
    assert fetch_file(REPO, "w.pth") == path == hf_hub_download(REPO, "w.pth")
    assert hub.sent == len(CONTENT) - 600_000


def test_a_server_without_ranges(hub):
    hub.add(REPO, {"w.pth": CONTENT})
    hub.faults.break_after, hub.faults.without_ranges = [300_000], True
    assert content_of(fetch_file(REPO, "w.pth")) == CONTENT


def test_a_file_that_arrives_damaged_is_refused_and_fetched_again(hub):
    hub.add(REPO, {"w.pth": CONTENT})
    hub.faults.corrupt = [True]
    with pytest.raises(OSError, match=r"w\.pth of tester/var arrived damaged"):
        fetch_file(REPO, "w.pth")
    assert content_of(fetch_file(REPO, "w.pth")) == CONTENT


def test_small_files_branches_and_what_is_cached(hub, monkeypatch):
    hub.add(REPO, {"a.json": b"{}", "w.pth": CONTENT})
    HfApi().create_branch(REPO, branch="next")
    hub.add(REPO, {"w.pth": CONTENT[:1000]})
    assert content_of(fetch_file(REPO, "a.json")) == b"{}"
    assert len(content_of(fetch_file(REPO, "w.pth"))) == 1000
    assert len(content_of(fetch_file(REPO, "w.pth", revision="next"))) == len(CONTENT)
    calls = len(hub.calls)
    assert len(content_of(fetch_file(REPO, "w.pth", local_files_only=True))) == 1000
    assert len(hub.calls) == calls


# The command line


def test_convert_a_released_checkpoint_and_push_it(hub, preset, tmp_path, capsys):
    out = tmp_path / "var-d16"
    assert main(["convert", "var-d16", str(out)]) == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "unknown" and card.data.base_model == "FoundationVision/var"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("fid", 3.55)
    assert "| `top_k` | `900` |" in card.text and "MIT licence" in card.text
    assert main(["push", str(out), "tester/var-d16", "-m", "converted"]) == 0
    captured = capsys.readouterr()
    newest = hub.repositories["tester/var-d16"].branches["main"][-1]
    assert captured.out.splitlines()[-1] == f"{hub.endpoint}/tester/var-d16/commit/{newest.sha}"
    assert "licence of the weights: the authors' code" in captured.err and newest.title == "converted"
    assert set(newest.files) == {path.name for path in out.iterdir()}
    assert 'pipeline("class-to-image", "tester/var-d16")' in card_of(hub, "tester/var-d16").text
    loaded = VarForImageGeneration.from_pretrained("tester/var-d16")
    assert_same_tensors(preset.convert(), loaded)
    assert loaded.generation_config.top_k == 900
    assert loaded.config.original_checkpoint["metric"]["value"] == 3.55


def test_convert_goes_on_where_the_connection_broke_off(hub, preset, tmp_path, capsys):
    hub.faults.break_after = [50_000, 50_000]
    assert main(["convert", "var-d16", str(tmp_path / "out")]) == 0
    assert_same_tensors(preset.convert(), VarForImageGeneration.from_pretrained(tmp_path / "out"))
    assert sum(call.range is not None for call in hub.requests("GET", "/lfs/")) == 2


def test_convert_without_the_files(hub, preset, tmp_path, capsys):
    hub.repositories["FoundationVision/var"].branches["main"][-1].files.pop("var_d16.pth")
    assert main(["convert", "var-d16", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("argen: var_d16.pth of the Hub repository FoundationVision/var cannot be fetched")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match="FoundationVision/var cannot be fetched"):
        convert_original("var", "var-d16")


def test_draw_from_and_describe_a_repository(hub, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    VarProcessor(class_names=list("abcde"), image_size=(16, 16)).save_pretrained(tmp_path / "model")
    assert main(["push", str(tmp_path / "model"), REPO, "--private"]) == 0
    assert hub.repositories[REPO].private
    picture = tmp_path / "b.png"
    assert main(["generate", "--model", REPO, "--class", "b", "--seed", "1", "-o", str(picture)]) == 0
    assert picture.is_file()
    capsys.readouterr()
    assert main(["info", REPO]) == 0
    told = capsys.readouterr().out
    assert (
        f"{model.num_parameters():,}".replace(",", " ") in told.replace("\u202f", " ")
        or "million F32" in told
    )
    assert any(call.range for call in hub.requests("GET", "model.safetensors|/lfs/"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no model (it has no config.json)"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "is truncated or not a safetensors file"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "of type 'gpt2'"),
        (lambda f: change(f / "config.json", hidden_size=64), "do not fit its config.json: misshapen"),
        (lambda f: change(f / "config.json", num_hidden_layers=3), "missing model.layers.2."),
        (lambda f: (f / "notes.txt").symlink_to("/etc/hostname"), "is a link that leads out of the folder"),
    ],
)
def test_push_refuses_what_is_not_whole(hub, model, tmp_path, capsys, damage, words):
    model.save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    assert main(["push", str(tmp_path / "model"), REPO]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("argen: ") and words in line
    assert not hub.repositories


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_push_leaves_states_of_training_and_pickles_behind(hub, model, tmp_path):
    model.save_pretrained(tmp_path)
    for name in ("optimizer.pt", "training_args.bin", ".secret"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "checkpoint-1").mkdir()
    model.save_pretrained(tmp_path / "checkpoint-1")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.png").write_bytes(b"x")
    push_folder(tmp_path, REPO)
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "samples/a.png"}
    assert set(hub.files(REPO)) == names


def test_a_pipeline_pushes_model_processor_and_card(hub, tmp_path):
    torch.manual_seed(3)
    words = text_tokenizer()
    model = spread(VarForImageGeneration(text_var_config(len(words))))
    processor = VarProcessor(tokenizer=words, image_size=(16, 16))
    draw = pipeline("text-to-image", model=model, processor=processor)
    draw.save_pretrained(tmp_path / "words", push_to_hub=True, repo_id=REPO)
    assert card_of(hub).data.pipeline_tag == "text-to-image"
    again = pipeline("text-to-image", model=REPO)
    assert again("red apple", seed=1)["image"].tobytes() == draw("red apple", seed=1)["image"].tobytes()


def test_the_example_of_a_card_runs(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    draw = ClassToImagePipeline(model, processor=new_processor(model.config))
    draw.save_pretrained("var")
    code = (tmp_path / "var" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert (tmp_path / "picture.png").is_file()
