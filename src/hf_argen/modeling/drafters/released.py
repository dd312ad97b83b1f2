"""Reading drafters as their authors release them: a Hub repository or folder with `config.json` and tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from ...hub import fetch_file
from ..checkpoints import ConversionError, read_checkpoint, tensors_at
from ..headers import DamagedFileError, read_header, read_index, read_json
from ..placement import HUB_OPTIONS

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


class Release:
    """
    The files of a released drafter, fetched as they are asked for.

    Args:
        source: folder or Hub repository.
        options: `revision`, `cache_dir`, `token`, `local_files_only`, `subfolder`… for the download.
    """

    def __init__(self, source: Any, options: dict[str, Any]):
        self.source = str(source)
        self.folder = Path(source) if Path(source).is_dir() else None
        self.options = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
        self._subfolder = self.options.pop("subfolder", "")

    def find(self, name: str) -> Path | None:
        """The path of a file; `None` if there is none of that name."""
        if self.folder is not None:
            path = self.folder / self._subfolder / name
            return path if path.is_file() else None
        try:
            return Path(fetch_file(self.source, f"{self._subfolder}/{name}".lstrip("/"), **self.options))
        except EntryNotFoundError:  # of the repository, or of the cache where there is no network
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ValueError(
                f"{self.source!r} is no folder and cannot be fetched from the Hub ({error}); check the name."
            ) from error

    def config(self) -> dict[str, Any]:
        """
        The content of `config.json`.

        Raises:
            ValueError: missing or damaged.
        """
        path = self.find(CONFIG)
        if path is None:
            raise ValueError(
                f"{self.source!r} holds no drafter: it has no config.json, or cannot be reached."
            )
        try:
            return read_json(path)
        except DamagedFileError as error:
            raise ValueError(f"{CONFIG} of {self.source!r} {error}; fetch it again.") from error

    def tensors(self, names: Sequence[str], prefix: str = "") -> dict[str, torch.Tensor] | None:
        """
        The tensors of the first of the files that exists; of safetensors files only those below `prefix`, which is cut
        off.

        Raises:
            ConversionError: a file is damaged, or a pickle that holds code.
        """
        for name in names:
            if (path := self.find(name)) is None:
                continue
            if path.suffix == ".safetensors":
                return self._below(prefix, [path])
            if path.name == INDEX:
                return self._below(prefix, [self._shard(shard) for shard in read_index(path)])
            return tensors_at(read_checkpoint(path, "drafter"), (), "drafter", path)
        return None

    def _shard(self, name: str) -> Path:
        if (path := self.find(name)) is None:
            raise ConversionError(f"{name} is missing in {self.source!r}, but its index names it; fetch it.")
        return path

    def _below(self, prefix: str, files: Sequence[Path]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                read_header(file)
                with safe_open(file, framework="pt") as content:
                    keys = [key for key in content.keys() if key.startswith(prefix)]  # noqa: SIM118
                    tensors |= {key.removeprefix(prefix): content.get_tensor(key) for key in keys}
            except (DamagedFileError, SafetensorError) as error:
                raise ConversionError(f"{str(file)!r} is damaged ({error}); fetch it again.") from error
        return tensors


def linear_factor(scaling: dict[str, Any] | None, source: str) -> float:
    """By how much rotary positions are shrunk, of what a configuration says about them; an error unless linearly."""
    if scaling is None:
        return 1.0
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "linear":
        raise ConversionError(
            f"{source!r} scales its rotary positions by {kind!r}; only linear scaling is known."
        )
    return float(scaling["factor"])
