"""`convert_original`: the authors' checkpoint files in, a model of ours out."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .auto import FAMILIES, Family
from .modeling.checkpoints import ConversionError
from .modeling.conversion import convert, convert_preset, converter_of, load_presets


def convert_original(
    family: str,
    files: Mapping[str, str | Path] | str,
    original_config: Mapping[str, Mapping[str, Any]] | None = None,
) -> PreTrainedModel:
    """
    Converts a checkpoint in the authors' own format.

    >>> files = {"transformer": "var_d16.pth", "tokenizer": "vae_ch160v4096z32.pth"}
    >>> convert_original("var", files).save_pretrained("var-d16")

    Args:
        family: name of the family, for example `"var"`.
        files: role -> `.pth`, `.pt` or `.safetensors` file, or folder of sharded safetensors; or the name of
            a released checkpoint, such as `"var-d16"`, which is fetched from the Hub. The roles are

            - `var`: `tokenizer` and `transformer`; `tokenizer` alone gives a [`MultiScaleVQModel`];
              `trainer`, a file of the authors' trainer such as `ar-ckpt-best.pth`, holds both, and files
              given in the other two roles take the place of what it holds;
            - `code`: `tokenizer`, `drafter` and `refiner`;
            - `llamagen`, `rar`, `mar`: `transformer` and `tokenizer`, or one of them;
            - `maskgit`, and `titok` for the same: `generator` and `tokenizer`, or one of them;
            - `multiscale_vq`, `llamagen_vq`, `maskgit_vq`, `kl_vae`, `titok`: `tokenizer`.
        original_config: role -> the authors' constructor arguments in their own names (for `trainer`, those
            of `transformer` and `tokenizer`). All that the weights' shapes tell is inferred, so it may be
            partial or absent, and what is given must agree with the weights. The rest takes the authors'
            defaults.

    Returns:
        The model in evaluation mode on the CPU in the dtype of the files. Nothing in it is randomly
        initialised.

    Raises:
        ConversionError: (a ValueError) unknown family, preset, role or argument; missing file or role;
            truncated or damaged file; pickle with code in it (which is not run); keys that are foreign,
            missing, misshapen or not in floating point; arguments or files that contradict one another. The
            message names the culprit.
    """
    found = family_named(family)
    if isinstance(files, Mapping):
        if found.generated_by is not None and not files.keys() <= converter_of(found.package).roles.keys():
            found = family_named(found.generated_by)
        return convert(converter_of(found.package), files, original_config)
    if original_config is not None:
        raise ConversionError("A preset brings its own original_config; give files by role to use another.")
    names = load_presets(found.package)
    if files not in names:
        raise ConversionError(
            f"{found.name} has no preset {str(files)!r}{_closest(str(files), names)}; it has "
            f"{', '.join(names) or 'none'}. Give files of your own as a dict of role and path."
        )
    return convert_preset(found.package, str(files))


def family_named(name: str) -> Family:
    """
    The family with this name.

    Raises:
        ConversionError: there is none; the message offers the closest names and the list.
    """
    if name not in FAMILIES:
        raise ConversionError(
            f"Unknown family {name!r}{_closest(name, FAMILIES)}; there are {', '.join(FAMILIES)}."
        )
    return FAMILIES[name]


def preset_named(name: str) -> tuple[Family, dict[str, Any]] | None:
    """The family and the description of the preset `name`, `None` if there is no such preset."""
    for family in FAMILIES.values():
        presets = load_presets(family.package)
        if name in presets:
            return family, presets[name]
    return None


def _closest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
