"""Drafters of speculative decoding that drive a network on the hidden states of the language model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils import logging

from ...generation import _compat
from ...generation.decoding import Request
from ...generation.decoding.speculative.acceptance import Verdict
from ...generation.decoding.speculative.draft_tree import DraftContext, likeliest
from ...generation.decoding.speculative.drafters import Drafter, Drafting, last_of_each
from ...generation.decoding.speculative.dynamic_tree import DynamicTree
from ...generation.decoding.speculative.trees import StaticTree, Tree
from ...generation.guidance import Guidance
from ...generation.predictors.language_model import LanguageModelPredictor
from ...generation.predictors.next_token import NextTokenPredictor
from ..layers.attention import causal_mask
from .modeling_drafter import DrafterPreTrainedModel
from .modeling_eagle import Eagle
from .modeling_medusa import MedusaHeads

logger = logging.get_logger(__name__)


@dataclass
class NetworkDrafter(Drafter):
    """
    Base of drafters that read the language model's hidden states.

    Args:
        model: the network, its folder or its Hub repository; stored by name. Needed.
    """

    model: Any = None

    network_class: ClassVar[type[DrafterPreTrainedModel]]

    def load(self, model: Any) -> Any:
        """The network; an error unless it was made for such a language model."""
        if self.model is None:
            raise ValueError(
                f"{type(self).__name__} needs a model: {self.network_class.__name__} or its folder."
            )
        if isinstance(self.model, str):
            self.model = (
                self.network_class.from_pretrained(self.model, dtype=model.dtype).to(model.device).eval()
            )
        if hasattr(model, "predictor_class"):
            raise ValueError(
                f"{type(self).__name__} drafts for language models, not for {type(model).__name__}."
            )
        self.check_fits(self.model, model)
        return self.model

    def check_fits(self, network: Any, model: Any) -> None:
        """Refuses a language model of other sizes."""
        target, own = _compat.text_config(model), network.config
        width = getattr(own, "target_hidden_size", None) or own.hidden_size
        for what, theirs, ours in (
            ("hidden states of size", target.hidden_size, width),
            ("a vocabulary of", target.vocab_size, own.vocab_size),
        ):
            if theirs != ours:
                raise ValueError(
                    f"The {self.network_class.__name__} was made for {what} {ours}, but {type(model).__name__} has "
                    f"{theirs}: it belongs to another base model."
                )

        trained_for = getattr(own, "base_model_name_or_path", None)
        if trained_for and model.name_or_path and Path(trained_for).name != Path(model.name_or_path).name:
            logger.warning_once(
                f"The {self.network_class.__name__} was trained for {trained_for!r}; with {model.name_or_path!r} few drafts "
                "may be accepted."
            )

    def check(self, model: Any, tree: Tree) -> None:
        self.load(model)

    def layers(self, model: Any) -> tuple[int, ...]:
        """Which of the language model's hidden states are read."""
        return (-1,)

    def prepare(self, request: Request) -> None:
        request.predictor.feature_layers = self.layers(request.model)


# Medusa


@dataclass
class MedusaDrafter(NetworkDrafter):
    """
    Medusa's heads (arXiv 2401.10774): the tokens of all places ahead are guessed at once, from the last hidden state.

    Args:
        model: `MedusaHeads`, their folder or Hub repository; stored by name. Needed.
    """

    network_class: ClassVar[type[DrafterPreTrainedModel]] = MedusaHeads

    def default_tree(self) -> Tree:
        return StaticTree(draw=False)

    def open(self, request: Request, context: DraftContext) -> Drafting:
        return MedusaDrafting(self.load(request.model), request.predictor)


class MedusaDrafting(Drafting):
    """See [`MedusaDrafter`]."""

    def __init__(self, heads: MedusaHeads, predictor: LanguageModelPredictor):
        self.heads, self.predictor = heads, predictor
        self.most_depth = heads.config.medusa_num_heads
        self._features = predictor.features[:, -1]
        self._level = 0
        self._logits: torch.Tensor | None = None

    def accept(self, verdict: Verdict, taken: list[int]) -> None:
        if verdict.count:  # after the prompt the last hidden state is known already
            self._features = last_of_each(verdict.along(self.predictor.features), verdict.count)

    def root(self) -> torch.Tensor:
        self._level = 0
        features = self._features[:, None].to(self.heads.dtype)
        self._logits = self.heads(features).logits[:, :, 0].float()
        return self._logits[0]

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        # Beyond the last head nothing is known; only a tree that looks one level further asks, and does not use it.
        self._level = min(self._level + 1, self.most_depth - 1)
        return self._logits[self._level][:, None].expand(-1, tokens.shape[1], -1)


# EAGLE


@dataclass
class EagleDrafter(NetworkDrafter):
    """
    EAGLE (arXiv 2401.15077, 2406.16858, 2503.01840): a small decoder continues the language model's hidden states.

    Args:
        model: `Eagle`, its folder or Hub repository; stored by name. Needed.
    """

    network_class: ClassVar[type[DrafterPreTrainedModel]] = Eagle

    def default_tree(self) -> Tree:
        return DynamicTree()

    def check_fits(self, network: Any, model: Any) -> None:
        super().check_fits(network, model)
        network.config.read_layers(_compat.text_config(model).num_hidden_layers)
        embeds = model.get_input_embeddings()
        width = getattr(embeds, "embedding_dim", network.config.hidden_size)
        if not network.config.has_embedding and width != network.config.hidden_size:
            raise ValueError(
                f"The Eagle has no embeddings of its own and is {network.config.hidden_size} wide, but those of "
                f"{type(model).__name__} are {width} wide: it belongs to another base model."
            )

    def layers(self, model: Any) -> tuple[int, ...]:
        return self.model.config.read_layers(_compat.text_config(model).num_hidden_layers)

    def open(self, request: Request, context: DraftContext) -> Drafting:
        if "inputs_embeds" in request.inputs:
            raise ValueError(
                "EAGLE pairs hidden states with tokens, so it needs input_ids, not inputs_embeds."
            )
        predictor = EaglePredictor(self.load(request.model), request.model)
        predictor.reserve(request.predictor.capacity, request.predictor.is_static)
        return EagleDrafting(predictor, request)


class EaglePredictor(NextTokenPredictor):
    """
    Drives the network with a cache of its own; every token that is fed comes with a feature.

    Args:
        network: the drafter.
        target: the language model, whose embeddings and head serve where the network has none.
    """

    def __init__(self, network: Eagle, target: Any):
        super().__init__(network, Guidance(0.0))
        self.embed: nn.Module = network.embed_tokens or target.get_input_embeddings()
        self.head: nn.Module = target.get_output_embeddings()
        self.head_dtype = target.dtype
        # The features to feed, and then those that came out, (batch, n, size).
        self.features: torch.Tensor | None = None
        self._counts: list[int] | None = None  # of which tokens alone logits are wanted, see `add`

    def most_tokens(self) -> int:
        return 0

    def read(self, features: torch.Tensor, tokens: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """The features of the prompt, each with the token after it; logits (batch, tokens) after the last."""
        batch, length = tokens.shape
        self.start(batch, length, hidden, tokens.device)
        positions = torch.arange(length, device=tokens.device).expand(batch, -1)
        if hidden is not None:
            positions = ((~hidden).cumsum(dim=1) - 1).clamp(min=0)
        mask = causal_mask(length, hidden, self.model.dtype, tokens.device)
        self.features = features
        logits = self._next(tokens, positions, mask, [length] * batch)
        self._prompt_is_read()
        return logits[:, 0]

    def add(self, features: torch.Tensor, tokens: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """
        Makes the first `counts` of the tokens of each row part of the sequence, each with the feature before it; logits
        (batch, tokens) after the last of them.
        """
        self.features, self._counts = features, counts
        logits = self.predict(tokens)
        self._counts = None
        self.commit(count=counts)
        return logits[:, 0]

    def feed(self, tokens: torch.Tensor, positions: torch.Tensor, needs_mask: bool) -> torch.Tensor:
        if self._hidden is not None:
            positions = positions - self._hidden.sum(dim=1)[:, None]
        needs_mask = needs_mask or tokens.shape[1] > 1 or self._hidden is not None or self.is_static
        mask = self.mask(tokens.shape[1], self.model.dtype) if needs_mask else None
        return self._next(tokens, positions, mask, self._counts)

    def _next(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        counts: list[int] | None,
    ) -> torch.Tensor:
        """Puts the features that come out in place of those that go in; logits (batch, n, tokens) float32."""
        output = self.model(
            self.features.to(self.model.dtype),
            inputs_embeds=self.embed(tokens),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            counts=counts,
        )
        self.features = output.last_hidden_state
        if output.logits is None:
            return self.head(self.features.to(self.head_dtype)).float()
        return output.logits.float()


class EagleDrafting(Drafting):
    """See [`EagleDrafter`]. Only committed positions stay in its cache, with the features of the language model."""

    def __init__(self, predictor: EaglePredictor, request: Request):
        self.predictor, self.target = predictor, request.predictor
        network: Eagle = predictor.model
        self._ids, self._vocab_size = network.draft_ids, network.config.vocab_size
        mask = request.inputs.get("attention_mask")
        self._hidden = None if mask is None or bool((mask != 0).all()) else mask == 0
        self._prompt: torch.Tensor | None = request.inputs["input_ids"]
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None  # features and tokens not read yet
        self._counts: list[int] = []
        self._nodes = self._prompt[:, :0]  # features of the row's end and of the drafts of this step

    @property
    def calls(self) -> int:
        return self.predictor.calls

    def accept(self, verdict: Verdict, taken: list[int]) -> None:
        if not verdict.count:  # after the prompt
            self._new = self.target.features, torch.cat([self._prompt[:, 1:], verdict.tokens], dim=1)
        else:
            width = max(*taken, 1)
            self._new = verdict.along(self.target.features)[:, :width], verdict.tokens[:, :width]
        self._counts = taken

    def root(self) -> torch.Tensor:
        return self._of_all_tokens(self._after_rows())

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        return self._of_all_tokens(self._after_drafts(tokens, parents))

    def root_best(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return likeliest(self._after_rows(), k, self._ids)

    def expand_best(
        self, tokens: torch.Tensor, parents: torch.Tensor | None, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return likeliest(self._after_drafts(tokens, parents), k, self._ids)

    def _of_all_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        if self._ids is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], self._vocab_size), -torch.inf)
        return whole.scatter_(-1, self._ids.expand(logits.shape), logits)

    def _after_rows(self) -> torch.Tensor:
        features, tokens = self._new
        if self._prompt is not None:
            self._prompt = None
            logits = self.predictor.read(features, tokens, self._hidden)
        else:
            self.predictor.commit(count=[0] * len(tokens))
            logits = self.predictor.add(features, tokens, self._counts)
        self._nodes = self.predictor.features[:, -1:]
        return logits

    def _after_drafts(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        if parents is None:
            self.predictor.features = self._nodes[:, -1:]
        else:
            index = (parents + 1).unsqueeze(-1).expand(-1, -1, self._nodes.shape[-1])
            self.predictor.features = self._nodes.gather(1, index)
        logits = self.predictor.predict(tokens, parents)
        self._nodes = torch.cat([self._nodes, self.predictor.features], dim=1)
        return logits
