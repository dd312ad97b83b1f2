"""The reference cases recorded from the authors' own code: `../shared/golden`, and a few copies in `tests/goldens`."""

import json
import os
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_argen import convert_original

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "golden"
COPIES = REPOSITORY / "tests" / "goldens"


class Golden:
    """One case: its description, its tensors, and the model that its checkpoint converts to."""

    def __init__(self, path: Path):
        self.path = path
        self.case = json.loads((path / "case.json").read_text())

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def family(self) -> str:
        return self.case["family"]

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "expected.safetensors")

    def files(self, *roles: str) -> dict[str, str]:
        files = self.case["convert"]["files"]
        return {role: str(self.path / files[role]) for role in roles or files}

    def original_config(self) -> dict:
        return self.case["convert"]["original_config"]

    def convert(self, *roles: str, family: str | None = None, with_config: bool = True):
        """The converted model, from all files of the case or from those of `roles`."""
        config = self.original_config() if with_config else None
        return convert_original(family or self.family, self.files(*roles), config)


def golden(family: str, name: str) -> Golden:
    """A case by name, from the shared folder or, in a bare clone, from the copies."""
    for root in (SHARED, COPIES):
        path = root / family / name
        if (path / "case.json").exists():
            return Golden(path)
    reason = f"reference case {family}/{name} is not beside this repository (expected in {SHARED})"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    """Largest difference at most `relative` of the largest expected value."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert difference <= relative * max(scale, 1e-6), f"difference {difference:.2e} at scale {scale:.2e}"


def assert_same_image(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    """Pixels within `tolerance`."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= tolerance


def states_equal(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether both hold the same weights, bit by bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
