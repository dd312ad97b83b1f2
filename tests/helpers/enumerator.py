"""Exact output distributions of decodings: every branch of the random choices, followed with its weight."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from hf_argen.generation.sampling import randomness

Distribution = dict[Hashable, float]


@dataclass
class Choice:
    """One random choice on the path of the present run: its possible values, their weights, the one taken."""

    values: list[int]
    weights: list[float]
    taken: int = 0


class Enumerator:
    """
    A source of randomness that a decoding is run on again and again, each time along another path of its tree of
    choices, until all leaves are seen. It sees every choice, so a decoding that draws elsewhere gives itself away by
    weights that differ when a path is followed again.

    Args:
        most_runs: refuse larger trees.
    """

    def __init__(self, most_runs: int = 20_000):
        self.most_runs = most_runs
        self.path: list[Choice] = []
        self.place = 0
        self.runs = 0

    def distribution(self, run: Callable[[], Hashable]) -> Distribution:
        """The probability of every outcome of `run`, which may draw from `hf_argen.generation.sampling` only."""
        outcomes: Distribution = {}
        self.path = []
        while True:
            self.place, self.runs = 0, self.runs + 1
            assert self.runs <= self.most_runs, "the tree of choices is too large to follow"
            with self._installed():
                outcome = run()
            assert self.place == len(self.path), "the same choices led to fewer choices than before"
            weight = 1.0
            for choice in self.path:
                weight *= choice.weights[choice.taken]
            outcomes[outcome] = outcomes.get(outcome, 0.0) + weight
            if not self._advance():
                return outcomes

    def _installed(self) -> AbstractContextManager:
        return randomness(self)

    def _advance(self) -> bool:
        """On to the next leaf, the last choice first; False when all leaves are seen."""
        while self.path:
            self.path[-1].taken += 1
            if self.path[-1].taken < len(self.path[-1].values):
                return True
            self.path.pop()
        return False

    def _choose(self, weights: list[float]) -> int:
        kept = [(value, weight) for value, weight in enumerate(weights) if weight > 0]
        found = Choice([value for value, _ in kept], [weight for _, weight in kept])
        if self.place == len(self.path):
            self.path.append(found)
        choice = self.path[self.place]
        self.place += 1
        assert choice.values == found.values, "the same choices led to other possibilities than before"
        assert torch.allclose(torch.tensor(choice.weights), torch.tensor(found.weights), atol=1e-6)
        return choice.values[choice.taken]

    # The source of randomness

    def categorical(self, probs: torch.Tensor, generator) -> torch.Tensor:
        rows = probs.double().reshape(-1, probs.shape[-1])
        assert torch.allclose(rows.sum(dim=1), torch.ones(len(rows), dtype=torch.double), atol=1e-5)
        drawn = [self._choose(row) for row in rows.tolist()]
        return torch.tensor(drawn, device=probs.device).view(probs.shape[:-1])

    def without_replacement(self, probs: torch.Tensor, count: int, generator) -> torch.Tensor:
        drawn = []
        for row in probs.double().reshape(-1, probs.shape[-1]).tolist():
            left, order = list(row), []
            while len(order) < count:
                total = sum(left)
                if total == 0:  # no choice is left that has a probability
                    order.append(next(i for i in range(len(left)) if i not in order))
                    continue
                order.append(self._choose([weight / total for weight in left]))
                left[order[-1]] = 0.0
            drawn.append(order)
        return torch.tensor(drawn, device=probs.device).view(*probs.shape[:-1], count)

    def bernoulli(self, probs: torch.Tensor, generator) -> torch.Tensor:
        drawn = [self._choose([1 - p, p]) for p in probs.double().flatten().clamp(0, 1).tolist()]
        return torch.tensor(drawn, dtype=torch.bool, device=probs.device).view(probs.shape)

    def uniform(self, choices: int, count: int, generator, device) -> torch.Tensor:
        return torch.tensor([self._choose([1 / choices] * choices) for _ in range(count)], device=device)

    def gumbel(self, like: torch.Tensor, generator) -> torch.Tensor:
        raise AssertionError(
            "Gumbel noise has no branches to follow; prove a coupled method by a chi-square test"
        )


def assert_same_distribution(found: Distribution, expected: Distribution, tolerance: float = 1e-5) -> None:
    """The same outcomes with the same probabilities, which sum to one."""
    assert abs(sum(found.values()) - 1) < tolerance
    for outcome in found.keys() | expected.keys():
        difference = abs(found.get(outcome, 0.0) - expected.get(outcome, 0.0))
        assert difference < tolerance, f"{outcome}: {found.get(outcome)} instead of {expected.get(outcome)}"
