"""Medusa (arXiv 2401.10774): heads on a language model's last hidden state that predict tokens further ahead."""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ...generation.decoding.speculative.drafters import Drafter
from ..checkpoints import ConversionError
from ..layers.linear import linear
from .configuration_medusa import MedusaHeadsConfig
from .modeling_drafter import DrafterPreTrainedModel
from .released import INDEX, Release

HEADS_FILE = "medusa_lm_head.pt"
IN_WHOLE_MODEL = "medusa_head."
DECAY = 0.8  # how much less each head further ahead weighs in the loss


@dataclass
class MedusaOutput(ModelOutput):
    """
    What [`MedusaHeads`] gives.

    Attributes:
        loss: scalar, with labels.
        logits: (heads, ..., vocab_size); head i predicts the token i + 2 places after the one whose hidden state it got.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class ResidualBlock(nn.Module):
    """x + SiLU(linear(x)); new ones are the identity."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + F.silu(linear(self.linear, hidden_states))


class MedusaHead(nn.Module):
    """A residual block, applied `num_layers` times, and a projection to the vocabulary."""

    def __init__(self, hidden_size: int, vocab_size: int, num_layers: int):
        super().__init__()
        self.num_layers = num_layers
        self.block = ResidualBlock(hidden_size) if num_layers else nn.Identity()
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for _ in range(self.num_layers):
            hidden_states = self.block(hidden_states)
        return linear(self.lm_head, hidden_states)


class MedusaHeads(DrafterPreTrainedModel):
    """
    Heads for a language model, which itself stays as it is.

    >>> heads = MedusaHeads.from_pretrained("FasterDecoding/medusa-vicuna-7b-v1.3")
    >>> hf_argen.generate(model, SpeculativeDecoding(heads), **inputs)
    """

    config: MedusaHeadsConfig
    config_class = MedusaHeadsConfig
    base_model_prefix = "model"
    main_input_name = "hidden_states"

    def __init__(self, config: MedusaHeadsConfig):
        super().__init__(config)
        sizes = (config.hidden_size, config.vocab_size, config.medusa_num_layers)
        self.heads = nn.ModuleList(MedusaHead(*sizes) for _ in range(config.medusa_num_heads))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ResidualBlock):
            init.zeros_(module.linear.weight)
            init.zeros_(module.linear.bias)
        elif isinstance(module, MedusaHead):
            init.normal_(module.lm_head.weight, std=self.config.initializer_range)

    @classmethod
    def drafter_class(cls) -> type[Drafter]:
        from .drafting import MedusaDrafter

        return MedusaDrafter

    @classmethod
    def read_release(
        cls, release: Release, fields: dict[str, Any]
    ) -> tuple[MedusaHeadsConfig, dict[str, torch.Tensor]]:
        """Medusa-1, a file of heads, and Medusa-2, heads within a whole checkpoint; what weights tell is read off them."""
        tensors = release.tensors((HEADS_FILE,))
        if tensors is None:
            tensors = release.tensors((INDEX, "model.safetensors"), IN_WHOLE_MODEL)
        if not tensors:
            raise ConversionError(
                f"{release.source!r} holds no Medusa heads: neither {HEADS_FILE} nor weights named {IN_WHOLE_MODEL}*."
            )
        state: dict[str, torch.Tensor] = {}
        layers: dict[int, int] = {}
        for key, tensor in sorted(tensors.items()):
            if found := re.fullmatch(r"(\d+)\.(\d+)\.linear\.(weight|bias)", key):
                head, layer, name = int(found[1]), int(found[2]), f"heads.{found[1]}.block.linear.{found[3]}"
                layers[head] = max(layers.get(head, 0), layer + 1)
                if not torch.equal(state.setdefault(name, tensor), tensor):
                    raise ConversionError(
                        f"{key} of {release.source!r} differs from the other layers of its head, which are one block."
                    )
            elif found := re.fullmatch(r"(\d+)\.(\d+)\.weight", key):
                state[f"heads.{found[1]}.lm_head.weight"] = tensor
            else:
                raise ConversionError(f"{release.source!r} has a weight {key}, which no Medusa head has.")
        outputs = [tensor for name, tensor in state.items() if name.endswith("lm_head.weight")]
        if not outputs:
            raise ConversionError(
                f"The Medusa heads of {release.source!r} have no projection to the vocabulary."
            )
        config = MedusaHeadsConfig(
            hidden_size=outputs[0].shape[1],
            vocab_size=outputs[0].shape[0],
            medusa_num_heads=len(outputs),
            medusa_num_layers=max(layers.values(), default=0),
            base_model_name_or_path=fields.get("base_model_name_or_path"),
        )
        return config, {name: tensor.float() for name, tensor in state.items()}

    def forward(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, heads: slice | None = None
    ) -> MedusaOutput:
        """
        Args:
            hidden_states: (batch, length, hidden_size), the language model's after its last norm.
            labels: (batch, length) int64, the tokens themselves, -100 where there are none; a head learns the one
                i + 2 places ahead.
            heads: which heads to compute; default: all.
        """
        chosen = self.heads if heads is None else self.heads[heads]
        logits = torch.stack([head(hidden_states) for head in chosen])
        if labels is None:
            return MedusaOutput(logits=logits)
        losses = [
            DECAY**i * F.cross_entropy(one[:, : -2 - i].flatten(0, 1).float(), labels[:, 2 + i :].flatten())
            for i, one in enumerate(logits)
            if labels.shape[1] > 2 + i
        ]
        return MedusaOutput(loss=torch.stack(losses).sum(), logits=logits)
