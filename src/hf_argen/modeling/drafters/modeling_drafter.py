"""What the networks that draft have in common."""

from typing import Any, Self

import torch
from transformers import PreTrainedConfig

from ...generation.decoding.speculative.drafters import Drafter
from ..checkpoints import ConversionError
from ..loading import StrictPreTrainedModel
from .released import Release


class DrafterPreTrainedModel(StrictPreTrainedModel):
    """A network that drafts. `from_pretrained` also reads the form in which the authors released theirs."""

    accepts_loss_kwargs = False

    @classmethod
    def read_release(
        cls, release: Release, fields: dict[str, Any]
    ) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """The configuration and our state dict of a released drafter whose `config.json` says `fields`."""
        raise NotImplementedError(f"{cls.__name__} has no released form.")

    @classmethod
    def drafter_class(cls) -> type[Drafter]:
        """Who drives the network in `SpeculativeDecoding`."""
        raise NotImplementedError(f"{cls.__name__} has to name its drafter.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Self | tuple[Self, dict]:
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], strictly.

        Args:
            pretrained_model_name_or_path: Hub repository or folder, of ours or as the authors released it.
            kwargs: as in transformers; of a released form `dtype` (default: float32) and those of the download.

        Raises:
            ValueError: there is no drafter of this kind, or its weights do not fit its configuration.
        """
        release = Release(pretrained_model_name_or_path, kwargs)
        fields = release.config()
        if fields.get("model_type") == cls.config_class.model_type:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        config, state = cls.read_release(release, fields)
        dtype = kwargs.get("dtype") or torch.float32
        with torch.device("meta"):
            model = cls(config)
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if own != found:
            strange = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
            name = strange[0]
            raise ConversionError(
                f"The drafter {release.source!r} does not fit {cls.__name__}: {name} is {found.get(name, 'missing')}, it "
                f"should be {own.get(name, 'absent')}{f' (and {len(strange) - 1} more)' if strange[1:] else ''}."
            )
        model = cls(config)
        model.load_state_dict(state, strict=True)
        model.name_or_path = config._name_or_path = release.source
        return model.to(dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))).eval()
