"""
Processes that are killed while they save, convert and download: no folder that loads is wrong, and the next run
completes. `pytest tests/test_faults.py --kills 20` kills more often than the whole suite does.
"""

import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hf_argen import VarForImageGeneration
from hf_argen.cli import main
from hf_argen.hub import fetch_file

from .helpers.kills import Child, kill_at_change, kill_at_random, remains, run
from .helpers.released import publish_tiny_preset, tiny_released, use_tiny_presets
from .helpers.tiny import sized_var
from .modeling.model_base import tensors_of

OLD, NEW = 1, 2  # seeds of weights
REPO = "tester/var"


@pytest.fixture(scope="module")
def weights():
    return {seed: tensors_of(sized_var(seed)) for seed in (OLD, NEW)}


def found_in(folder, weights) -> int | None:
    """Whose weights a folder holds, `None` where it does not load; anything else is an error."""
    try:
        loaded = tensors_of(VarForImageGeneration.from_pretrained(folder))
    except (OSError, ValueError):
        return None
    for seed, expected in weights.items():
        if all(torch.equal(loaded[name], tensor) for name, tensor in expected.items()):
            return seed
    raise AssertionError(f"{folder} loads, but is neither of the models that were saved")


# Saving


def saving(folder, seed, shards):
    model = sized_var(seed)
    yield
    model.save_pretrained(folder, max_shard_size=shards)


@pytest.mark.parametrize(
    ("before", "shards"), [(None, "50GB"), ("50GB", "3MB"), ("3MB", "50GB"), ("3MB", "2MB")]
)
def test_killed_while_saving(tmp_path, weights, kills, before, shards):
    def prepared(number):
        folder = tmp_path / str(number)
        if before is not None:
            sized_var(OLD).save_pretrained(folder, max_shard_size=before)
            (folder / "notes.txt").write_text("mine")
        return folder, NEW, shards

    seconds, _ = run(saving, *prepared("timed"))
    seen = set()
    for number in kill_at_random(saving, prepared, kills, seed=5, seconds=1.2 * seconds):
        folder = tmp_path / str(number)
        found = found_in(folder, weights) if folder.exists() else None
        assert found != OLD or before is not None
        seen.add(found)
        sized_var(NEW).save_pretrained(folder, max_shard_size=shards)
        assert found_in(folder, weights) == NEW and not remains(folder)
        assert before is None or (folder / "notes.txt").read_text() == "mine"
        shutil.rmtree(folder)
    assert seen


@pytest.mark.parametrize("before", [None, "3MB"], ids=["new", "over shards"])
def test_killed_before_each_change_of_a_file_while_saving(tmp_path, weights, before):
    """All states that a kill can leave, apart from files half written, which the test above leaves."""

    def prepared(name):
        folder = tmp_path / name
        if before is not None:
            sized_var(OLD).save_pretrained(folder, max_shard_size=before)
        return folder, NEW, "50GB"

    _, changes = run(saving, *prepared("counted"))
    seen = []
    for change in range(changes):
        arguments = prepared(str(change))
        assert kill_at_change(saving, arguments, change)
        seen.append(found_in(arguments[0], weights) if arguments[0].exists() else None)
        shutil.rmtree(arguments[0], ignore_errors=True)
    assert found_in(tmp_path / "counted", weights) == NEW
    # The old model, then in the moment of moving none, then the new one.
    order = [seed for place, seed in enumerate(seen) if place == 0 or seed != seen[place - 1]]
    assert order == ([OLD, None, NEW] if before else [None])


# Converting


def converting(out, options):
    yield
    assert main(["convert", "var", str(out), *options]) == 0


@pytest.fixture(scope="module")
def reference():
    return tiny_released()


@pytest.fixture
def options(reference):
    files = reference.files("tokenizer", "transformer")
    given = [f"--file={role}={path}" for role, path in files.items()]
    return [*given, "--config=tokenizer.norm_num_groups=4", "--force"]


@pytest.mark.parametrize("before", [False, True], ids=["new", "over another"])
def test_killed_while_converting(tmp_path, reference, options, kills, before):
    expected = {NEW: tensors_of(reference.convert())}

    def prepared(number):
        out = tmp_path / str(number)
        if before:
            out.mkdir()
            (out / "notes.txt").write_text("mine")
        return out, options

    seconds, changes = run(converting, *prepared("timed"))
    for number in kill_at_random(converting, prepared, kills, seed=6, seconds=1.2 * seconds):
        check_converted(tmp_path / str(number), expected, options, before)
    for change in range(0, changes, 1 if kills > 10 else 4) if before else ():
        arguments = prepared(f"change {change}")
        assert kill_at_change(converting, arguments, change)
        check_converted(arguments[0], expected, options, before, with_next_run=change % 8 == 0)


def check_converted(out, expected, options, before, with_next_run=True):
    if found_in(out, expected) is None and out.exists():
        assert before and [path.name for path in out.iterdir()] == ["notes.txt"]
    if not with_next_run:
        return
    assert main(["convert", "var", str(out), *options]) == 0
    assert found_in(out, expected) == NEW and not remains(out)
    shutil.rmtree(out)


# Downloading


def use_hub(cache):
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_CACHE = str(cache)
    constants.DOWNLOAD_CHUNK_SIZE = 2**14


def fetching(cache):
    use_hub(cache)
    yield
    fetch_file(REPO, "w.pth")


def opening(cache):
    use_hub(cache)
    yield
    VarForImageGeneration.from_pretrained(REPO)


def converting_preset(cache, out):
    use_hub(cache)
    use_tiny_presets()
    yield
    assert main(["convert", "var-d16", str(out)]) == 0


def test_killed_while_fetching_a_file(hub, tmp_path, kills):
    """What had arrived is not fetched again."""
    content = bytes(range(256)) * 20_000
    hub.add(REPO, {"w.pth": content})
    hub.faults.bytes_per_second = len(content) / 0.5
    moments = random.Random(7)
    kept = 0
    for _ in range(kills):
        child, due = Child(fetching, tmp_path / "cache"), hub.sent + moments.uniform(0, len(content) / kills)
        while hub.sent < due:
            time.sleep(0.001)
        child.kill()
        before, kept = kept, sum(path.stat().st_size for path in tmp_path.rglob("*.part"))
        assert before <= kept <= len(content)
    hub.faults.bytes_per_second = None
    sent = hub.sent
    path = fetch_file(REPO, "w.pth", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == content
    assert kept and hub.sent - sent == len(content) - kept


def test_killed_while_opening_a_repository(hub, tmp_path, weights, kills):
    sized_var(NEW).push_to_hub(REPO, max_shard_size="3MB")
    hub.faults.bytes_per_second = 3e7
    seconds, _ = run(opening, tmp_path / "timed")
    for number in kill_at_random(
        opening, lambda number: (tmp_path / str(number),), kills, seed=8, seconds=seconds
    ):
        cache = tmp_path / str(number)
        for snapshot in cache.glob("models--tester--var/snapshots/*"):
            assert found_in(snapshot, weights) in (None, NEW)
        loaded = VarForImageGeneration.from_pretrained(REPO, cache_dir=cache)
        assert all(torch.equal(tensors_of(loaded)[name], tensor) for name, tensor in weights[NEW].items())
        shutil.rmtree(cache)


def test_killed_while_converting_a_released_checkpoint(hub, tmp_path, reference, kills):
    publish_tiny_preset(hub)
    hub.faults.bytes_per_second = 4e6
    expected = {NEW: tensors_of(reference.convert())}

    def prepared(number):
        return tmp_path / f"cache {number}", tmp_path / f"out {number}"

    seconds, _ = run(converting_preset, *prepared("timed"))
    for number in kill_at_random(converting_preset, prepared, kills, seed=9, seconds=1.1 * seconds):
        cache, out = prepared(number)
        assert found_in(out, expected) == (NEW if out.exists() else None)
        if not out.exists():
            run(converting_preset, cache, out)
        assert found_in(out, expected) == NEW and not remains(out)
