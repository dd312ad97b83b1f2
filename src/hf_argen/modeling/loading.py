"""Strict `from_pretrained`, shared by the families and the visual tokenizers.

transformers fills a parameter that a checkpoint lacks with random numbers and only warns. A generator with a random
layer draws plausible nonsense, so our classes refuse such a checkpoint instead.
"""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..generation import _compat
from .placement import HUB_OPTIONS, PlacementMixin


class StrictLoadingMixin:
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
            kwargs: as in transformers (`dtype`, `device_map`, `attn_implementation`, `quantization_config`,
                `distributed_config`, `revision`, ...).

        Raises:
            ValueError: the folder holds no model or another type; a weight is missing, superfluous or misshapen; a
                file is missing or damaged, or a pickle with code in it (which is not run).
        """
        if not strict:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        name = str(pretrained_model_name_or_path)
        cls._check_files(pretrained_model_name_or_path, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
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
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {name!r} cannot be read ({error}); the file is damaged or incomplete: fetch it again."
            ) from error
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"The weights of {name!r} are a pickle that is damaged or holds code, and nothing of it was run; give "
                "safetensors."
            ) from error
        except FileNotFoundError as error:
            raise ValueError(f"A file of {name!r} is missing ({error}); fetch it again.") from error
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
    def _check_files(cls, source: Any, kwargs: dict[str, Any]) -> None:
        """Refuses a missing or damaged configuration, and that of another model."""
        if source is None:
            return
        options = Path(source, kwargs.get("subfolder") or "", "generation_config.json")
        if options.is_file():
            try:
                json.loads(options.read_text(encoding="utf-8"))
            except ValueError as error:  # transformers would go on without it
                raise ValueError(f"{str(options)!r} is not JSON ({error}); fetch it again.") from error
        if kwargs.get("config") is not None:
            return
        hub_kwargs = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        found, _ = cls.config_class.get_config_dict(source, **hub_kwargs)
        if not found:
            raise ValueError(f"{str(source)!r} holds no model: it has no config.json.")
        found_type = found.get("model_type")
        if found_type is not None and found_type != cls.config_class.model_type:
            raise ValueError(
                f"{str(source)!r} holds a model of type {found_type!r}, but {cls.__name__} loads "
                f"{cls.config_class.model_type!r}; use the class for {found_type!r} or an Auto class."
            )


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


class StrictPreTrainedModel(PlacementMixin, StrictLoadingMixin, PreTrainedModel):
    """A [`~transformers.PreTrainedModel`] whose `from_pretrained` is strict."""
