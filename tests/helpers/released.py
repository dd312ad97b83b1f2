"""The state dicts of the released files as tensors without numbers."""

import json
import os

import pytest
import torch

from .goldens import SHARED


def released_state_dict(family: str, name: str) -> dict[str, torch.Tensor]:
    """
    The keys, shapes and dtypes of a released file, from `released_shapes.json` of the reference cases.

    Args:
        family: folder of the reference cases.
        name: file, as the list names it.
    """
    path = SHARED / family / "released_shapes.json"
    if not path.exists():
        reason = f"{path} is not beside this repository"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return {
        template.replace("*", str(index)): torch.empty(
            entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta"
        )
        for template, entry in json.loads(path.read_text())["files"][name]["state_dict"].items()
        for index in range(entry["count"])
    }
