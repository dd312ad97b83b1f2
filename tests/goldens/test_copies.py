"""The reference cases in the repository are whole, small, and those of the shared folder."""

import json

import pytest

from ..helpers.goldens import COPIES, SHARED

CASES = sorted(path.parent.relative_to(COPIES) for path in COPIES.glob("*/*/case.json"))
MOST_BYTES = 2_000_000


def files_below(folder):
    """Files of a case by their path in it; a checkpoint may be a folder."""
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_is_whole(case):
    files = {path.name for path in (COPIES / case).iterdir()}
    description = json.loads((COPIES / case / "case.json").read_text())
    assert {*description["convert"]["files"].values(), "expected.safetensors"} <= files
    if not (SHARED / case).is_dir():
        return
    originals = files_below(SHARED / case)
    copies = files_below(COPIES / case)
    assert copies.keys() == originals.keys()
    for name, original in originals.items():
        copy = copies[name]
        if name == "case.json":  # without its line breaks, to stay within the size
            assert description == json.loads(original.read_text())
        else:
            assert copy.read_bytes() == original.read_bytes(), name


def test_families_are_small():
    sizes = {
        family.name: sum(path.stat().st_size for path in family.rglob("*") if path.is_file())
        for family in COPIES.iterdir()
        if family.is_dir() and not family.name.startswith("__")
    }
    assert sizes.keys() >= {"code", "var"}
    assert max(sizes.values()) < MOST_BYTES, sizes
