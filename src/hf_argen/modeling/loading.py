"""Strict `from_pretrained`, shared by the families and the visual tokenizers.

transformers fills a parameter that a checkpoint lacks with random numbers and only warns. A generator with a random
layer draws plausible nonsense, so our classes refuse such a checkpoint instead, and one that is damaged or made to
harm: before any weight is read, the folder and the headers of its files are looked through.
"""

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..generation import _compat
from ..storage import check_links
from .headers import DamagedFileError, TensorHeader, read_headers, read_index, read_json
from .placement import HUB_OPTIONS, PlacementMixin
from .saving import WholeSavingMixin

MAX_LAYERS = 1000  # deeper than any model there is; a larger number would build modules for hours
FREE_ELEMENTS = 2**24  # what a model may hold beyond twice its files, before it is refused unread

_is_strict: ContextVar[bool] = ContextVar("_is_strict", default=False)


def check_folder(source: str | os.PathLike, variant: str | None = None, subfolder: str = "") -> None:
    """
    Refuses a folder that cannot be a saved model: links that lead out of it, a damaged configuration or index of
    shards, weights that are missing, pickled, or there in two forms. Anything else than a folder passes.

    Raises:
        ValueError: in one sentence, which names the file and says what to do.
    """
    folder = Path(source) / subfolder
    if not folder.is_dir():
        return
    check_links(folder)
    dot = f".{variant}" if variant else ""
    single, index = folder / f"model{dot}.safetensors", folder / f"model.safetensors.index{dot}.json"
    names: list[str] = []
    # transformers would go on without a generation configuration that it cannot read.
    configurations = [(folder / name, read_json) for name in ("config.json", "generation_config.json")]
    for path, read in (*configurations, (index, read_index)):
        try:
            names = read(path) if path.is_file() else names
        except DamagedFileError as error:
            raise ValueError(f"{path.name} of {str(source)!r} {error}; fetch it again.") from error
    if single.is_file() and index.is_file():
        raise ValueError(
            f"{str(source)!r} holds both {single.name} and {index.name}; one is left of an earlier saving: delete it."
        )
    if index.is_file() and (missing := [name for name in names if not (folder / name).is_file()]):
        raise ValueError(f"{missing[0]} is missing in {str(source)!r}, but its index names it; fetch it.")
    if not (single.is_file() or index.is_file()) and (
        pickles := sorted(folder.glob(f"pytorch_model{dot}*.bin"))
    ):
        raise ValueError(
            f"{str(source)!r} holds its weights as a pickle ({pickles[0].name}), which may hold code and was not "
            "opened; save them as safetensors where you trust the file."
        )


def check_depth(fields: Mapping[str, Any], source: Any) -> None:
    """
    Refuses a configuration of more layers than any model has, before it is built.

    Raises:
        ValueError: names the field.
    """
    for name, value in _numbers(fields):
        if value > MAX_LAYERS and ("layers" in name or "blocks" in name or name == "depth"):
            raise ValueError(f"config.json of {str(source)!r} says {name}={value}; it is damaged.")


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield name, value


class StrictLoadingMixin(_compat.InspectedLoading):
    """
    Puts a strict `from_pretrained` in front of [`~transformers.PreTrainedModel.from_pretrained`].

    Class attributes:
        parts_of_larger_models: prefixes of weights that a checkpoint may have beyond this class, because a larger
            model of the same family was saved.
    """

    parts_of_larger_models: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, strict: bool = True, **kwargs: Any
    ) -> Self | tuple[Self, dict]:
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but weights and configuration must fit this class.

        Args:
            pretrained_model_name_or_path: Hub repository or folder.
            strict: `False` gives transformers' behaviour: missing weights are drawn at random, superfluous ones are
                dropped, and both are only warned about.
            kwargs: as in transformers (`dtype`, `variant`, `device_map`, `attn_implementation`,
                `quantization_config`, `distributed_config`, `revision`, ...).

        Raises:
            ValueError: the folder holds no model or another type; a weight is missing, superfluous, misshapen or of
                another kind of number; a file is missing, damaged, a pickle, or a link that leads out of the folder.
        """
        name = str(pretrained_model_name_or_path)
        if not strict:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        if pretrained_model_name_or_path is not None:
            check_folder(name, kwargs.get("variant"), kwargs.get("subfolder", ""))
        cls._check_config(pretrained_model_name_or_path, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        was_strict = _is_strict.set(True)
        try:
            # Mismatched keys are reported below together with missing and superfluous ones, rather than one at a time.
            with _compat.without_load_report(unless=ignore_mismatched):
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *model_args,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **kwargs,
                )
        except (SafetensorError, DamagedFileError) as error:
            raise ValueError(
                f"The weights of {name!r} cannot be read ({error}); the file is damaged or incomplete: fetch it again."
            ) from error
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{name!r} holds its weights as a pickle, which may hold code and was not run; save them as "
                "safetensors where you trust the file."
            ) from error
        except FileNotFoundError as error:
            raise ValueError(f"A file of {name!r} is missing ({error}); fetch it again.") from error
        finally:
            _is_strict.reset(was_strict)
        mismatched = [] if ignore_mismatched else info.get("mismatched_keys", [])
        unexpected = [
            key for key in info.get("unexpected_keys", []) if not key.startswith(cls.parts_of_larger_models)
        ]
        problems = _describe(info.get("missing_keys", []), unexpected, mismatched)
        if problems:
            raise ValueError(
                f"The weights of {name!r} do not fit {cls.__name__}: {problems}. Load the checkpoint with the class "
                "that wrote it, or pass strict=False to accept random or dropped weights."
            )
        return (model, info) if wants_info else model

    @classmethod
    def _check_config(cls, source: Any, kwargs: dict[str, Any]) -> None:
        if (config := kwargs.get("config")) is not None:
            if hasattr(config, "to_dict"):
                check_depth(config.to_dict(), source)
            return
        if source is None:
            return
        found, _ = cls.config_class.get_config_dict(
            source, **{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        )
        if not found:
            raise ValueError(f"{str(source)!r} holds no model: it has no config.json.")
        found_type = found.get("model_type")
        if found_type is not None and found_type != cls.config_class.model_type:
            raise ValueError(
                f"{str(source)!r} holds a model of type {found_type!r}, but {cls.__name__} loads "
                f"{cls.config_class.model_type!r}; use the class for {found_type!r} or an Auto class."
            )
        check_depth(found, source)

    def inspect_checkpoint(self, files: Sequence[str], is_quantized: bool) -> None:
        """
        Compares the headers of `files` with this model, which stands on the meta device, before they are read.

        Raises:
            DamagedFileError: a file is damaged.
            ValueError: a weight is not stored as numbers with a point; and, when strict, a file
                is no safetensors file or the files hold far less than the model.
        """
        if not all(file.endswith(".safetensors") for file in files):
            if not _is_strict.get():
                return
            raise ValueError(
                f"The weights in {files[0]!r} are not safetensors; a pickle may hold code and is not opened."
            )
        headers = read_headers(files)
        if not is_quantized:  # else stored in forms of their own
            self.check_numbers(headers)

    def check_numbers(self, headers: Mapping[str, TensorHeader]) -> None:
        """
        Compares what kind of numbers files hold, and how many, with this model.

        Raises:
            ValueError: see `inspect_checkpoint`.
        """
        prefix = f"{self.base_model_prefix}."
        tensors = self.state_dict()
        for name, tensor in tensors.items():
            stored = next(
                (headers[key] for key in (name, prefix + name, name.removeprefix(prefix)) if key in headers),
                None,
            )
            if stored is not None and stored.is_float != tensor.is_floating_point():
                wanted = "floating point" if tensor.is_floating_point() else str(tensor.dtype)
                raise ValueError(
                    f"The weight {name} is stored as {stored.dtype}; {type(self).__name__} has it in {wanted}: give a "
                    "checkpoint that was saved by it."
                )
        held = sum(header.elements for header in headers.values())
        asked = sum(tensor.numel() for tensor in (*tensors.values(), *_unsaved(self, tensors)))
        if _is_strict.get() and asked > 2 * held + FREE_ELEMENTS:
            raise ValueError(
                f"config.json describes a {type(self).__name__} of {asked:,} numbers, but the files hold {held:,}; "
                "one of the two is damaged or of another model."
            )


def check_fit(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    headers: Mapping[str, TensorHeader],
    source: Any,
) -> None:
    """
    Refuses weights that are not exactly those of the model that a configuration describes; reads none of them.

    Raises:
        ValueError: names the weights.
    """
    if getattr(config, "quantization_config", None):  # stored in forms of their own
        return
    with torch.device("meta"):
        model = _compat.from_config(model_class, config)
    model.check_numbers(headers)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = [
        (name, headers[name].shape, shape)
        for name, shape in expected.items()
        if name in headers and headers[name].shape != shape
    ]
    problems = _describe(
        sorted(expected.keys() - headers.keys()), sorted(headers.keys() - expected.keys()), shapes
    )
    if problems:
        raise ValueError(f"The weights in {str(source)!r} do not fit its config.json: {problems}.")


def _unsaved(model: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Buffers that are computed when a model is loaded."""
    return (buffer for name, buffer in model.named_buffers() if name not in saved)


def _describe(
    missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Any], most: int = 3
) -> str:
    """The keys that do not fit, at most `most` of a kind, as one clause."""

    def named(kind: str, keys: list[str]) -> str:
        more = f" and {len(keys) - most} more" if len(keys) > most else ""
        return f"{kind} {', '.join(keys[:most])}{more}"

    shapes = [
        f"{key[0]} (file {tuple(key[1])}, model {tuple(key[2])})"
        if isinstance(key, tuple | list)
        else str(key)
        for key in mismatched
    ]
    groups = (("missing", sorted(missing)), ("unexpected", sorted(unexpected)), ("misshapen", shapes))
    return "; ".join(named(kind, keys) for kind, keys in groups if keys)


class StrictPreTrainedModel(
    PlacementMixin, StrictLoadingMixin, WholeSavingMixin, _compat.WholeInitialization, PreTrainedModel
):
    """A [`~transformers.PreTrainedModel`] whose `from_pretrained` is strict, and which is saved whole, with its card."""
