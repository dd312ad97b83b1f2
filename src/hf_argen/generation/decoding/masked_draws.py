"""How the tokens of one step of masked generation are drawn: vectors by their head, ids from logits (arXiv 2202.04200)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from .. import sampling
from ..predictors.masked import MaskedPredictor
from ..predictors.masked_ids import MaskedIdPredictor
from ..transcript import CONTEXT_FREE
from ..warping import warped
from .base import Request

Drawn = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class Step:
    """
    What is known of a step before its tokens are drawn.

    Attributes:
        positions: (batch, n) int64, where to draw; the number of tokens pads shorter rows.
        guidance: weight of the conditional prediction, one for all or one for each row; `None` without guidance.
        progress: share of the steps that are done when this one is.
        is_sorted: whether the tokens are to be sorted by confidence.
        head_options: what a head of vectors is told beyond guidance and temperature.
    """

    positions: torch.Tensor
    guidance: float | torch.Tensor | None
    progress: float
    is_sorted: bool
    head_options: dict[str, Any]


class Draws(ABC):
    """
    Draws the tokens of one request.

    Args:
        request: the request.
        predictor: its predictor.
    """

    def __init__(self, request: Request, predictor: MaskedPredictor):
        self.request, self.predictor, self.head = request, predictor, request.model.head

    @abstractmethod
    def take(self, hidden: torch.Tensor, step: Step) -> Drawn:
        """
        Args:
            hidden: (batch, n, dim); guided, (2 * batch, n, dim), conditional rows first.

        Returns:
            tokens (batch, n, token_size), and how sure the head is of each, (batch, n), where they are to be sorted.
        """

    def is_finite(self, sequences: torch.Tensor) -> torch.Tensor:
        """Scalar bool tensor, false when the model produced NaN or infinity."""
        return torch.isfinite(sequences).all()

    @abstractmethod
    def committed(self, places: torch.Tensor | None, positions: torch.Tensor) -> None:
        """
        Is told what became known of the tokens that were drawn last.

        Args:
            places: (batch, k), which of them; `None`: all.
            positions: (batch, k), where.
        """

    def details(self) -> dict[str, Any]:
        """Fields of the output."""
        return {}


class LatentDraws(Draws):
    """By a head of continuous tokens."""

    def __init__(self, request: Request, predictor: MaskedPredictor):
        super().__init__(request, predictor)
        self.calls_before = self.head.calls

    def take(self, hidden: torch.Tensor, step: Step) -> Drawn:
        config = self.request.generation_config
        tokens = self.head.sample(
            hidden,
            step.guidance,
            temperature=config.temperature if config.do_sample and config.temperature else 1.0,
            generator=self.request.generator,
            do_sample=bool(config.do_sample),
            **step.head_options,
        )
        if not step.is_sorted:
            return tokens, None
        return tokens, self.head.confidence(tokens, hidden[: self.predictor.batch_size])

    def committed(self, places: torch.Tensor | None, positions: torch.Tensor) -> None:
        """Nothing is kept of it."""

    def details(self) -> dict[str, Any]:
        return {"head_calls": self.head.calls - self.calls_before}


@dataclass
class Annealing:
    """
    The noise of TiTok's sampler (arXiv 2406.07550), of which less is added step by step.

    Attributes:
        randomize_temperature: factor of the Gumbel noise on logits and confidences at no progress; `None`: tokens are drawn
            from the model's own distribution, and the surest are kept.
        softmax_temperature_annealing: whether logits are divided by a number that falls from 1.3 to 0.5.
    """

    randomize_temperature: float | None = None
    softmax_temperature_annealing: bool = False

    def divided(self, logits: torch.Tensor, progress: float) -> torch.Tensor:
        """Logits at the softmax temperature of a step."""
        return logits / (0.5 + 0.8 * (1 - progress)) if self.softmax_temperature_annealing else logits

    def noise_scale(self, progress: float) -> float:
        """Factor of the Gumbel noise of a step."""
        return (self.randomize_temperature or 0.0) * (1 - progress)


class IdDraws(Draws):
    """
    From the guided logits of a categorical head, after the request's processors.

    Args:
        annealing: noise and temperature beyond the request's.
    """

    predictor: MaskedIdPredictor

    def __init__(self, request: Request, predictor: MaskedIdPredictor, annealing: Annealing):
        super().__init__(request, predictor)
        self.annealing = annealing
        self.finite: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None  # of all places, where they are asked for
        self._drawn: torch.Tensor  # of the last step

    def take(self, hidden: torch.Tensor, step: Step) -> Drawn:
        draws = bool(self.request.generation_config.do_sample)
        if draws:
            strength = 0.0 if step.guidance is None else float(step.guidance) - 1
            passes = self.predictor.passes(strength)
            self.request.model.draw_ahead_of_step(self.predictor.batch_size, passes, self.request.generator)
        logits = self.head.guided(hidden, step.guidance)
        finite = torch.isfinite(logits).all()
        self.finite = finite if self.finite is None else self.finite & finite
        self._drawn = logits
        scores = self._processed(self.annealing.divided(logits, step.progress))
        scale = self.annealing.noise_scale(step.progress)
        adds_noise = draws and self.annealing.randomize_temperature is not None
        if adds_noise:
            size = (self.predictor.batch_size, self.predictor.capacity, scores.shape[-1])
            ids = (scores + scale * self._gumbel(size, step.positions)).argmax(dim=-1)
        else:
            ids = self.head.draw(scores, self.request.generator, draws)
        tokens = ids.unsqueeze(-1)
        if not step.is_sorted:
            return tokens, None
        self.predictor.propose(tokens, step.positions)
        confidence = scores.gather(-1, tokens).squeeze(-1)
        if adds_noise:
            confidence = confidence + scale * self._gumbel(size[:2], step.positions)
        return tokens, confidence

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        empty = torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
        return warped(list(self.request.logits_processor), rows, empty).view(logits.shape)

    def _gumbel(self, size: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
        """Of the noise of all places, drawn as by the authors from uniform numbers, that at some (batch, n)."""
        tiny = 1e-20
        uniform = sampling.rand(size, self.request.generator, positions.device)
        noise = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
        places = positions.clamp(max=size[1] - 1)
        if len(size) == 3:
            places = places.unsqueeze(-1).expand(-1, -1, size[2])
        return noise.gather(1, places)

    def is_finite(self, sequences: torch.Tensor) -> torch.Tensor:
        return torch.tensor(True) if self.finite is None else self.finite

    def committed(self, places: torch.Tensor | None, positions: torch.Tensor) -> None:
        if not (self.request.wants_details and self.request.generation_config.output_logits):
            return
        logits = self._drawn
        if places is not None:
            logits = logits.gather(1, places.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        if self.logits is None:  # one place more, where padding goes
            rows, capacity = len(logits), self.predictor.capacity
            self.logits = logits.new_zeros(rows, capacity + 1, logits.shape[-1])
        where = positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        self.logits = self.logits.scatter(1, where, logits)

    def details(self) -> dict[str, Any]:
        return {} if self.logits is None else {"logits": self.logits[:, : self.predictor.capacity]}


def check_id_options(request: Request) -> None:
    """Refuses what ids that become known in any order cannot honour."""
    name = type(request.model).__name__
    if others := [one for one in request.logits_processor if type(one) not in CONTEXT_FREE]:
        raise ValueError(
            f"{type(others[0]).__name__} may read the tokens before a token; {name} draws them in no order: leave it out. "
            "temperature, top_k, top_p and min_p work."
        )
