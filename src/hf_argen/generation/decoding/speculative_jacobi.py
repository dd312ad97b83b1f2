"""Speculative Jacobi decoding (SJD, arXiv 2410.01699): the model drafts for itself."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..sampling import Generators, acceptance, bernoulli, categorical, one_hot, residual
from ..transcript import Transcript
from .base import DecodingResult, Guarantee, Request
from .token_loop import TokenLoop, check_give_up_below, drafting_loses

INITIALIZATIONS = ("random", "horizontal", "vertical")


@dataclass
class Drafts:
    """
    Tokens that may follow each row.

    Attributes:
        tokens: (batch, n) int64.
        probs: (batch, n, vocab_size) float32, the distributions they were drawn from.
        known: how many of them each row has; the rest is still to be filled.
    """

    tokens: torch.Tensor
    probs: torch.Tensor
    known: list[int]


@dataclass
class SpeculativeJacobi(TokenLoop):
    """
    Feeds a window of drafts, keeps those that pass the test of speculative sampling against what they were drawn from,
    redraws the first that fails, and takes what it drew for the other places of the window as the next drafts.

    Args:
        window: tokens that are fed in one call.
        initialization: the draft of a place that has none yet: "random", or its neighbour to the left ("horizontal") or
            above ("vertical") where it has one.
        give_up_below: after the first 16 calls, a request whose rows gain fewer tokens a call than this goes on without
            drafts; default: never.
    """

    window: int = 16
    initialization: str = "random"
    give_up_below: float | None = None

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT_IN_DISTRIBUTION

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1.")
        if self.initialization not in INITIALIZATIONS:
            raise ValueError(
                f"initialization is {self.initialization!r}; it must be one of {', '.join(INITIALIZATIONS)}."
            )
        check_give_up_below(self.give_up_below)

    @property
    def largest_draft(self) -> int:
        return self.window

    def check(self, request: Request) -> None:
        super().check(request)
        tokens = request.predictor.num_tokens
        if tokens and self.window > tokens:
            raise ValueError(f"window is {self.window}; a picture of this model has {tokens} tokens.")
        if self.initialization == "vertical" and self.grid_width(request) is None:
            raise ValueError(
                "initialization='vertical' needs a model of pictures; use 'horizontal' or 'random'."
            )

    @staticmethod
    def grid_width(request: Request) -> int | None:
        """Tokens per row of a picture."""
        sizes = getattr(request.model.config, "grid_sizes", None)
        return sizes[-1][1] if sizes else None

    # The loop

    def run(self, request: Request) -> DecodingResult:
        transcript = self.open(request)
        predictor = request.predictor
        logits = predictor.prefill(request.inputs)[:, None]
        finite = torch.isfinite(logits).all()
        scores = transcript.process(logits)
        probs = self.probabilities(scores, request)
        transcript.note(scores)
        transcript.append(categorical(probs, request.generator), logits=logits, scores=scores)
        drafts = Drafts(probs.new_zeros(len(probs), 0, dtype=torch.long), probs[:, :0], [0] * len(probs))
        gains: list[list[int]] = []
        while not transcript.is_done:
            drafts = self.filled(drafts, self.width(transcript, gains) - 1, transcript, request)
            logits = predictor.predict(torch.cat([transcript.last(), drafts.tokens], dim=1))
            finite = finite & torch.isfinite(logits).all()
            scores = transcript.process(logits, drafts.tokens)
            probs = self.probabilities(scores, request)
            tokens, count, drafts = self.verify(probs, drafts, request)
            taken = transcript.append(tokens, count, logits, scores)
            transcript.note(scores, taken)
            predictor.commit(count=taken)
            gains.append(taken)
        lengths = torch.tensor(gains, dtype=torch.long).view(-1, len(probs)).t()
        return self.result(request, transcript, len(gains) + 1, finite, accept_lengths=lengths)

    def width(self, transcript: Transcript, gains: list[list[int]]) -> int:
        """Tokens to feed: the window, as far as there is room for it."""
        width = min(self.window, transcript.remaining())
        return 1 if drafting_loses(gains, self.give_up_below) else width

    @staticmethod
    def probabilities(scores: torch.Tensor, request: Request) -> torch.Tensor:
        """Scores (..., vocab_size) to the distribution that the request draws from; all on the best one if greedy."""
        if request.generation_config.do_sample:
            return scores.softmax(dim=-1)
        return one_hot(scores.argmax(dim=-1), scores)

    # Drafts

    def filled(self, drafts: Drafts, n: int, transcript: Transcript, request: Request) -> Drafts:
        """Exactly `n` drafts in every row: the known ones first, then new ones."""
        have = drafts.tokens.shape[1]
        tokens = F.pad(drafts.tokens[:, :n], (0, max(n - have, 0)))
        probs = F.pad(drafts.probs[:, :n], (0, 0, 0, max(n - have, 0)))
        if n == 0 or min(drafts.known) >= n:
            return Drafts(tokens, probs, drafts.known)
        known = torch.tensor(drafts.known, device=tokens.device)[:, None]
        missing = torch.arange(n, device=tokens.device) >= known
        tokens = self.initial(tokens, missing, probs, transcript, request)
        probs = torch.where(missing.unsqueeze(-1), one_hot(tokens, probs), probs)
        return Drafts(tokens, probs, [n] * len(tokens))

    def initial(
        self,
        tokens: torch.Tensor,
        missing: torch.Tensor,
        like: torch.Tensor,
        transcript: Transcript,
        request: Request,
    ) -> torch.Tensor:
        """`tokens` (batch, n) with the `missing` ones filled in."""
        if self.initialization == "random":
            return self.random(tokens, missing, like, request)
        width = self.grid_width(request)
        step = 1 if self.initialization == "horizontal" else width
        lengths = torch.tensor(transcript.lengths, device=tokens.device)
        place = lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        alone = place < step if step == width or width is None else place % width == 0
        tokens = self.random(tokens, missing & alone, like, request)
        for i in range(tokens.shape[1]):  # a neighbour may be a draft itself
            neighbour = tokens[:, i - step] if i >= step else transcript.at(place[:, i] - step)
            tokens[:, i] = torch.where(missing[:, i] & ~alone[:, i], neighbour, tokens[:, i])
        return tokens

    @staticmethod
    def random(
        tokens: torch.Tensor, missing: torch.Tensor, like: torch.Tensor, request: Request
    ) -> torch.Tensor:
        """Random tokens at the `missing` places."""
        uniform = torch.full_like(like, 1 / like.shape[-1])
        probs = torch.where(missing.unsqueeze(-1), uniform, one_hot(tokens, like))
        return categorical(probs, request.generator)

    # Verification

    def verify(
        self, probs: torch.Tensor, drafts: Drafts, request: Request
    ) -> tuple[torch.Tensor, list[int], Drafts]:
        """
        Args:
            probs: (batch, n + 1, vocab_size), the distribution at the place of each of the n drafts and after the last.

        Returns:
            tokens (batch, n + 1), how many of them each row gains, and the drafts that follow those.
        """
        accepted = self.test(probs[:, :-1], drafts, request)
        first = accepted.long().cumprod(dim=1).sum(dim=1)  # the place that is drawn now
        tokens = self.draw(probs, drafts, accepted, first, request.generator)
        count = (first + 1).tolist()
        room = torch.arange(probs.shape[1] - 1, device=probs.device)
        source = (first[:, None] + 1 + room).clamp(max=probs.shape[1] - 1)
        rest = Drafts(
            tokens.gather(1, source),
            probs.gather(1, source.unsqueeze(-1).expand(-1, -1, probs.shape[-1])),
            [probs.shape[1] - gain for gain in count],
        )
        return tokens, count, rest

    def test(self, target: torch.Tensor, drafts: Drafts, request: Request) -> torch.Tensor:
        """(batch, n) bool: which drafts pass, each by itself."""
        chance = self.acceptance(target, drafts, request)
        return bernoulli(chance, request.generator) if request.generation_config.do_sample else chance > 0.5

    def acceptance(self, target: torch.Tensor, drafts: Drafts, request: Request) -> torch.Tensor:
        """(batch, n): the probability with which each draft passes, min(1, p(x) / q(x))."""
        index = drafts.tokens.unsqueeze(-1)
        return acceptance(target.gather(-1, index), drafts.probs.gather(-1, index)).squeeze(-1)

    def draw(
        self,
        probs: torch.Tensor,
        drafts: Drafts,
        accepted: torch.Tensor,
        first: torch.Tensor,
        generator: Generators,
    ) -> torch.Tensor:
        """Tokens (batch, n + 1): drafts before the place `first`, there a new draw, after it fresh drafts."""
        place = torch.arange(probs.shape[1], device=probs.device)[None, :, None]
        at = first[:, None, None]
        fixed = one_hot(F.pad(drafts.tokens, (0, 1)), probs)
        redrawn = F.pad(residual(probs[:, :-1], drafts.probs), (0, 0, 0, 1))
        failed = (place == at) & (at < probs.shape[1] - 1)
        return categorical(torch.where(place < at, fixed, torch.where(failed, redrawn, probs)), generator)
