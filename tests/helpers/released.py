"""Released checkpoints without their gigabytes: state dicts without numbers, and a tiny VAR-d16 on the local Hub."""

import json
import os
from pathlib import Path

import pytest
import torch

from hf_argen.modeling import conversion
from hf_argen.modeling.conversion import load_presets

from .goldens import SHARED, Golden, golden
from .local_hub import LocalHub

VAR = "hf_argen.modeling.var"


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


def tiny_released() -> Golden:
    """The reference case that stands in for VAR-d16."""
    return golden("var", "d2_adaln_l2_q4")


def use_tiny_presets(replace=setattr) -> None:
    """
    Gives `var-d16` the sizes of the reference case, everything else of the released one.

    Args:
        replace: `monkeypatch.setattr`, to undo it after the test.
    """
    presets = load_presets(VAR)
    tiny = {**presets["var-d16"], "original_config": tiny_released().original_config()}
    replace(
        conversion,
        "load_presets",
        lambda package: {**presets, "var-d16": tiny} if package == VAR else load_presets(package),
    )


def publish_tiny_preset(hub: LocalHub) -> None:
    """Puts its files where the released ones are."""
    files = tiny_released().files("transformer", "tokenizer")
    names = {"var_d16.pth": files["transformer"], "vae_ch160v4096z32.pth": files["tokenizer"]}
    hub.add("FoundationVision/var", {name: Path(path).read_bytes() for name, path in names.items()})
