"""A small model drafts, and verification lends drafts the probability of codes like them (LANTERN, arXiv 2410.03355)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .. import _compat
from ..predictors.next_token import NextTokenPredictor
from ..sampling import bernoulli, categorical
from ..transcript import Transcript, choose
from .base import DecodingResult, Guarantee, Request
from .speculative.relaxation import Relaxation, nearest_by_distance, nearest_by_table
from .speculative_jacobi import acceptance, one_hot
from .token_loop import TokenLoop


@dataclass
class RelaxedAcceptance(TokenLoop):
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

    @property
    def largest_draft(self) -> int:
        return self.draft_length + 1

    # What it needs

    def load_drafter(self, model: Any) -> Any:
        """The small model; an error unless it draws from the same vocabulary."""
        drafter = self.drafter
        if drafter is None:
            raise ValueError(
                "RelaxedAcceptance needs a drafter: a small model of the same family, or its folder."
            )
        if isinstance(drafter, str):
            drafter = self.drafter = _compat.load_like(model, drafter)
        own, theirs = (_compat.text_config(one).vocab_size for one in (model, drafter))
        if own != theirs:
            raise ValueError(
                f"The drafter draws from {theirs} tokens, the model from {own}; they must agree."
            )
        sizes = [getattr(one.config, "grid_sizes", None) for one in (model, drafter)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"The drafter draws pictures of {sizes[1]} tokens, the model of {sizes[0]}.")
        return drafter

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

    # The loop

    @torch.no_grad()
    def run(self, request: Request) -> DecodingResult:
        drafter_model, rule = self.load_drafter(request.model), self.relaxation(request.model)
        transcript, predictor = self.open(request), request.predictor
        drafter = predictor.for_model(drafter_model)
        drafter.reserve(predictor.capacity, predictor.is_static)
        logits = predictor.prefill(request.inputs)[:, None]
        drafter.prefill(request.inputs)
        finite = torch.isfinite(logits).all()
        scores = transcript.process(logits)
        do_sample = request.generation_config.do_sample
        transcript.append(choose(scores, do_sample, request.generator), logits=logits, scores=scores)
        gains: list[list[int]] = []
        while not transcript.is_done:
            length = min(self.draft_length, transcript.remaining() - 1)
            drafts, draft_probs = self.draft(drafter, transcript, request, length)
            logits = predictor.predict(torch.cat([transcript.last(), drafts], dim=1))
            finite = finite & torch.isfinite(logits).all()
            scores = transcript.process(logits, drafts)
            tokens, count = self.verify(scores, drafts, draft_probs, rule, request)
            taken = transcript.append(tokens, count, logits, scores)
            predictor.commit(count=taken)
            drafter.commit(count=taken)
            gains.append(taken)
        lengths = torch.tensor(gains, dtype=torch.long).view(-1, transcript.batch_size).t()
        calls = predictor.calls + drafter.calls
        return self.result(request, transcript, len(gains) + 1, finite, calls, accept_lengths=lengths)

    @staticmethod
    def draft(
        drafter: NextTokenPredictor, transcript: Transcript, request: Request, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts (batch, length) and the distributions (batch, length, vocab_size) that they were drawn from."""
        last = transcript.last()
        drafts = last[:, :0]
        probs: list[torch.Tensor] = []
        for i in range(length):
            logits = drafter.predict(drafts[:, -1:] if i else last)
            scores = transcript.process(logits, drafts, skip=i)
            if request.generation_config.do_sample:
                probs.append(scores.softmax(dim=-1))
                drawn = categorical(probs[-1], request.generator)
            else:
                drawn = scores.argmax(dim=-1)
                probs.append(one_hot(drawn, scores))
            drafts = torch.cat([drafts, drawn], dim=1)
        drafter.predict(drafts[:, -1:] if length else last)  # so that its cache has all that may be accepted
        vocab = _compat.text_config(request.model).vocab_size
        return drafts, torch.cat([last.new_zeros(len(last), 0, vocab, dtype=torch.float32), *probs], dim=1)

    def verify(
        self,
        scores: torch.Tensor,
        drafts: torch.Tensor,
        draft_probs: torch.Tensor,
        rule: Relaxation,
        request: Request,
    ) -> tuple[torch.Tensor, list[int]]:
        """Tokens (batch, n + 1) and how many of them each row gains, from scores at the n drafts and after the last."""
        probs = scores.softmax(dim=-1)
        target = probs[:, :-1]
        value, has_neighbours = rule.relaxed(target, drafts)
        if request.generation_config.do_sample:
            own = draft_probs.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
            accepted = bernoulli(acceptance(value, own), request.generator)
            rest = rule.remaining(target, draft_probs, drafts, has_neighbours)
        else:
            raised = target.scatter(-1, drafts.unsqueeze(-1), value.unsqueeze(-1))
            accepted = raised.argmax(dim=-1) == drafts
            probs = one_hot(probs.argmax(dim=-1), probs)
            rest = probs[:, :-1]
        first = accepted.long().cumprod(dim=1).sum(dim=1)
        redrawn = torch.cat([rest, probs[:, -1:]], dim=1)
        at = first[:, None, None].expand(-1, 1, probs.shape[-1])
        final = redrawn.gather(1, at)  # the one place that is drawn, so that no other draw is made
        drawn = (
            categorical(final, request.generator) if request.generation_config.do_sample else final.argmax(-1)
        )
        place = torch.arange(probs.shape[1], device=probs.device)
        tokens = torch.where(place < first[:, None], F.pad(drafts, (0, 1)), drawn)
        return tokens, (first + 1).tolist()
