"""A small model drafts, and verification lends drafts the probability of codes like them (LANTERN, arXiv 2410.03355)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from .. import _compat
from .base import Guarantee, Request
from .draft_and_verify import DraftAndVerify
from .speculative.acceptance import AcceptanceRule
from .speculative.drafters import Drafter, DraftModel
from .speculative.relaxation import LendingAcceptance, Relaxation, nearest_by_distance, nearest_by_table
from .speculative.trees import Chain, Tree


@dataclass
class RelaxedAcceptance(DraftAndVerify):
    """
    Speculative decoding by a small model of the same family, whose drafts are accepted by their own probability and
    that of the nearest codes together, as far as a bound on the distortion allows. With a bound of 0 it is plain
    speculative decoding.

    Args:
        drafter: the small model, its folder or its Hub repository; stored by name. Needed.
        draft_length: tokens that it drafts before the model verifies them.
        k: codes whose probability a draft may be lent, at most.
        delta: total-variation distance that the bound allows for a token, in [0, 1].
        factor: LANTERN++: how many times its own probability a draft may get instead, 1 or above.
        neighbours: a .npy file with the codes nearest to each code, (vocab_size, at least k + 1), nearest first, itself
            excluded; default: by distance in the codebook of the image tokenizer, in language models of the input
            embeddings.
    """

    drafter: Any = None
    draft_length: int = 4
    k: int = 1000
    delta: float = 0.1
    factor: float | None = None
    neighbours: str | None = None

    guarantee: ClassVar[Guarantee] = Guarantee.RELAXED
    knob: ClassVar[str | None] = "delta"
    give_up_below: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        if not 0 <= self.delta <= 1:
            raise ValueError(
                f"delta is {self.delta}; it bounds a total-variation distance, so it must lie in [0, 1]. Multiples of a "
                "draft's own probability are given as factor."
            )
        if self.factor is not None and self.factor < 1:
            raise ValueError(f"factor is {self.factor}; it must be 1, which is no relaxation, or above.")
        if self.k < 0:
            raise ValueError(f"k is {self.k}; it must be 0, which is no relaxation, or above.")
        if self.draft_length < 1:
            raise ValueError(f"draft_length is {self.draft_length}; it must be at least 1.")

    def drafting_part(self) -> Drafter:
        if self.drafter is None:
            raise ValueError(
                "RelaxedAcceptance needs a drafter: a small model of the same family, or its folder."
            )
        return DraftModel(self.drafter)

    def tree_part(self) -> Tree:
        return Chain(self.draft_length)

    def acceptance_part(self, request: Request) -> AcceptanceRule:
        return LendingAcceptance(self.relaxation(request.model))

    def relaxation(self, model: PreTrainedModel) -> Relaxation:
        """The rule with the model's own codebook, or with the table that was given."""
        vocab = _compat.text_config(model).vocab_size
        k = min(self.k, vocab - 1)
        if self.neighbours is not None:
            table = self._table(vocab, min(k + 1, vocab - 1), model.device)
            return Relaxation(nearest_by_table(table), k, self.delta, self.factor)
        tokenizer = getattr(model, "image_tokenizer", None)
        if tokenizer is not None:
            codes = tokenizer.quantizer.codes(model.input_device)
        else:
            codes = model.get_input_embeddings()(torch.arange(vocab, device=model.device)).float()
        if len(codes) != vocab:
            raise ValueError(f"The codebook has {len(codes)} codes, but the model draws from {vocab}.")
        return Relaxation(nearest_by_distance(codes), k, self.delta, self.factor)

    def _table(self, vocab: int, width: int, device: torch.device) -> torch.Tensor:
        path = Path(self.neighbours)
        if not path.is_file():
            raise ValueError(f"The table of neighbours {self.neighbours!r} does not exist; check the path.")
        table = np.load(path, allow_pickle=False)
        if table.ndim != 2 or table.shape[0] != vocab or table.shape[1] < width or table.max() >= vocab:
            raise ValueError(
                f"The table of neighbours {self.neighbours!r} has the shape {table.shape}; this model needs {vocab} rows of "
                f"at least {width} of its codes: it belongs to another codebook."
            )
        return torch.from_numpy(table[:, :width].astype(np.int64)).to(device)
