"""Who drafts: the parts of draft-and-verify decodings that guess what follows, and another model as one (2211.17192)."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ... import _compat
from ...predictors.next_token import NextTokenPredictor
from ...stored import Part
from ..base import Request
from .acceptance import Verdict
from .draft_tree import DraftContext, Nodes
from .trees import Chain, Tree


class Drafting(Nodes, ABC):
    """
    A drafter at work on one request.

    Attributes:
        most_depth: drafts that it can let follow each other; `None` for any number.
    """

    most_depth: int | None = None

    @property
    def calls(self) -> int:
        """Forward calls of a model of its own so far."""
        return 0

    @abstractmethod
    def root(self) -> torch.Tensor: ...

    @abstractmethod
    def expand(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor: ...

    @abstractmethod
    def accept(self, verdict: Verdict, taken: list[int]) -> None:
        """Hears that every row r has grown by the first `taken[r]` tokens of the verdict."""


@dataclass
class Drafter(Part, ABC):
    """Base of drafters. A drafter is a dataclass of options; it drafts by the [`Drafting`] that it opens for a request."""

    kind: ClassVar[str] = "drafter"

    def default_tree(self) -> Tree:
        """The tree of drafts if none is asked for."""
        return Chain()

    def check(self, model: Any, tree: Tree) -> None:
        """Loads what it needs; refuses a model or tree that it cannot draft for."""

    def prepare(self, request: Request) -> None:
        """Tells the predictor, before the prompt is read, what else than logits is needed."""

    @abstractmethod
    def open(self, request: Request, context: DraftContext) -> Drafting:
        """Begins to draft for a request whose prompt has been read."""


def resolve_drafter(given: Any) -> Drafter:
    """A drafter from what users write: an instance, stored dict or name of one, or a model that drafts."""
    if isinstance(given, torch.nn.Module):
        network_drafter = getattr(given, "drafter_class", None)
        return DraftModel(given) if network_drafter is None else network_drafter()(given)
    return Drafter.resolve(given)


def tokenizer_words(model: Any) -> dict[str, int] | None:
    """The vocabulary of the tokenizer in the folder from which a model was loaded; `None` where there is none to read."""
    path = Path(getattr(model, "name_or_path", None) or "") / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return words if isinstance(words, dict) else {str(word): i for i, word in enumerate(words)}


@dataclass
class DraftModel(Drafter):
    """
    Another model with the same vocabulary, small and fast.

    Args:
        model: the model, its folder or its Hub repository; stored by name. Needed.
    """

    model: Any = None

    def load(self, model: Any) -> Any:
        """The drafting model; an error unless it draws from the same vocabulary."""
        drafter = self.model
        if drafter is None:
            raise ValueError("DraftModel needs a model: a small one of the same vocabulary, or its folder.")
        if isinstance(drafter, str):
            drafter = self.model = _compat.load_like(model, drafter)
        if problem := _compat.why_not_drafting(drafter):
            raise ValueError(f"{type(drafter).__name__} cannot draft: {problem}.")
        own, theirs = (_compat.text_config(one).vocab_size for one in (model, drafter))
        if own != theirs:
            raise ValueError(
                f"The drafter draws from {theirs} tokens, the model from {own}; they must agree."
            )
        if (words := tokenizer_words(model)) and (others := tokenizer_words(drafter)) and words != others:
            raise ValueError(
                f"The tokenizers of {model.name_or_path!r} and of the drafter {drafter.name_or_path!r} have other tokens "
                "for the same ids; drafts would be of another text. Use a drafter with the same tokenizer."
            )
        sizes = [getattr(one.config, "grid_sizes", None) for one in (model, drafter)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"The drafter draws pictures of {sizes[1]} tokens, the model of {sizes[0]}.")
        return drafter

    def check(self, model: Any, tree: Tree) -> None:
        self.load(model)

    def open(self, request: Request, context: DraftContext) -> Drafting:
        if "inputs_embeds" in request.inputs:
            raise ValueError("DraftModel reads the prompt itself, so it needs input_ids, not inputs_embeds.")
        predictor = request.predictor.for_model(self.load(request.model))
        predictor.reserve(request.predictor.capacity, request.predictor.is_static)
        predictor.prefill(request.inputs)
        return ModelDrafting(predictor)


class ModelDrafting(Drafting):
    """
    A model that drafts with a cache of its own, in which only tokens of the sequence stay from step to step.

    Args:
        predictor: has read the prompt.
    """

    def __init__(self, predictor: NextTokenPredictor):
        self.predictor = predictor
        self._new: torch.Tensor | None = (
            None  # (batch, n) tokens that it has not read yet, and how many in each row
        )
        self._counts: list[int] = []

    @property
    def calls(self) -> int:
        return self.predictor.calls

    def accept(self, verdict: Verdict, taken: list[int]) -> None:
        self._new, self._counts = verdict.tokens, taken

    def root(self) -> torch.Tensor:
        self.predictor.commit(count=[0] * len(self._counts))
        logits = self.predictor.predict(self._new[:, : max(*self._counts, 1)])
        self.predictor.commit(count=self._counts)
        return last_of_each(logits, self._counts)

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        return self.predictor.predict(tokens, parents)


def last_of_each(values: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(batch, n, size) to (batch, size): of each row the one at place `counts` - 1; the first for a count of 0."""
    if min(counts) == max(counts):
        return values[:, max(counts[0] - 1, 0)]
    place = (torch.tensor(counts, device=values.device) - 1).clamp(min=0)
    return values[torch.arange(len(values), device=values.device), place]
