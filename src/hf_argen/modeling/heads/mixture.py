"""Mixture head: a small autoregressive model draws a token channel by channel (ARINAR, arXiv 2503.02883)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ...generation import sampling
from ...generation.sampling import Generators
from ..layers.linear import linear, linears
from ..layers.mlp import MLP
from ..layers.modulation import AdaLNModulation, AdaLNOutput, modulated_norm
from ..layers.precision import suited
from .continuous import ContinuousHead, check_sizes

NORM_EPS = 1e-6
INIT_STD = 0.02
GATES, REST = 1e-5, 0.5  # how much of the usual initial size the gates and the other modulations have
LEAST_LOG_VARIANCE = -14.0  # a standard deviation of a thousandth, below which float32 likelihoods are noise


@dataclass
class Mixture:
    """
    Mixtures of normal distributions with diagonal covariance.

    Attributes:
        log_weights: (..., components), normalised.
        means, log_variances: (..., components, channels).
    """

    log_weights: torch.Tensor
    means: torch.Tensor
    log_variances: torch.Tensor

    def log_prob(self, values: torch.Tensor) -> torch.Tensor:
        """Log density of values (..., channels), in nats."""
        distance = (values.unsqueeze(-2) - self.means).square() * torch.exp(-self.log_variances)
        each = -0.5 * (distance + self.log_variances + math.log(2 * math.pi)).sum(dim=-1)
        return torch.logsumexp(self.log_weights + each, dim=-1)

    def rows(self, start: int, stop: int) -> "Mixture":
        """Those of some rows."""
        return Mixture(self.log_weights[start:stop], self.means[start:stop], self.log_variances[start:stop])


class InnerLayer(nn.Module):
    """Causal attention over the channels of a token and a feed-forward block, modulated by the hidden state."""

    def __init__(self, width: int, num_heads: int, hidden_size: int):
        super().__init__()
        self.num_heads = num_heads
        self.modulation = AdaLNModulation(hidden_size, width, 6)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.mlp = MLP(width, 4 * width, "gelu_pytorch_tanh")

    def forward(
        self, states: torch.Tensor, hidden: torch.Tensor, past: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """
        Args:
            states: (rows, n, width).
            hidden: (rows, 1, hidden_size).
            past: keys and values of the channels before, to which those of `states`, then one, are added.
        """
        modulation = self.modulation(hidden)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(dim=2)
        normed = modulated_norm(states, scale_attn, shift_attn, NORM_EPS)
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in linears(normed, self.q_proj, self.k_proj, self.v_proj)
        )
        if past is not None:
            if past:
                key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
            past[:] = [key, value]
        # Written out: on a CPU the backward pass of torch's own takes eight times as long with so few positions.
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if past is None:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        attended = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
        states = states + gate_attn * linear(self.o_proj, attended.transpose(1, 2).flatten(2))
        normed = modulated_norm(states, scale_mlp, shift_mlp, NORM_EPS)
        return states + gate_mlp * self.mlp(normed)


class MixtureHead(ContinuousHead):
    """
    Every channel, or group of channels, follows a mixture of normal distributions that depends on the hidden state and the
    channels before it. The loss is the negative log likelihood.

    Args:
        token_size, hidden_size, batch_multiplier: see [`ContinuousHead`]; there is no noise in this loss, so that more than
            one repetition is wasted.
        width, depth, num_heads: of the inner model.
        num_components: normal distributions of a mixture.
        group_size: channels that are drawn together.
        num_candidates: with guidance, values that are drawn from the conditional mixture, of which one is chosen by how much
            likelier the condition makes it.
    """

    head_type = "mixture"
    has_confidence = True

    def __init__(
        self,
        token_size: int,
        hidden_size: int,
        width: int = 768,
        depth: int = 1,
        num_heads: int = 16,
        num_components: int = 4,
        group_size: int = 1,
        num_candidates: int = 1000,
        batch_multiplier: int = 1,
    ):
        super().__init__(token_size, hidden_size, batch_multiplier)
        check_sizes(
            self.head_type,
            width=width,
            depth=depth,
            num_heads=num_heads,
            num_components=num_components,
            group_size=group_size,
            num_candidates=num_candidates,
        )
        for name, whole, part in (("width", width, num_heads), ("token_size", token_size, group_size)):
            if whole % part:
                raise ValueError(
                    f"{name} {whole} of the mixture head is not a multiple of "
                    f"{'num_heads' if name == 'width' else 'group_size'} {part}."
                )
        self.num_components, self.group_size, self.num_candidates = num_components, group_size, num_candidates
        self.num_groups = token_size // group_size
        self.condition_proj = nn.Linear(hidden_size, width)
        self.input_proj = nn.Linear(group_size, width)
        self.position_embedding = nn.Embedding(self.num_groups, width)
        self.layers = nn.ModuleList(InnerLayer(width, num_heads, hidden_size) for _ in range(depth))
        self.norm = AdaLNOutput(hidden_size, width, NORM_EPS)
        self.out_proj = nn.Linear(width, num_components * (2 * group_size + 1))

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.trunc_normal_(module.weight, std=INIT_STD)
                init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                init.trunc_normal_(module.weight, std=INIT_STD)
        for layer in self.layers:
            width = layer.o_proj.out_features
            weight = layer.modulation.linear.weight
            parts = weight.detach().clone().view(6, width, -1)
            parts *= torch.tensor([REST, REST, GATES] * 2, device=weight.device).view(6, 1, 1)
            init.copy_(weight, parts.view_as(weight))
        # Components differ by their biases alone at first; equal ones would stay equal.
        bias = self.out_proj.bias
        spread = torch.zeros(len(bias), device=bias.device)
        means = self.num_components * self.group_size
        spread[:means] = torch.linspace(-1, 1, self.num_components, device=bias.device).repeat_interleave(
            self.group_size
        )
        init.copy_(bias, spread)

    # The inner model

    def mixture(self, states: torch.Tensor, hidden: torch.Tensor) -> Mixture:
        """Mixtures (rows, n, ...) of the groups after inner states (rows, n, width) of tokens (rows, 1, hidden_size)."""
        answer = self.out_proj(suited(self.norm(states, hidden), self.out_proj)).float()
        size = self.num_components * self.group_size
        means, log_variances, weights = answer.split([size, size, self.num_components], dim=-1)
        shape = (self.num_components, self.group_size)
        return Mixture(
            weights.log_softmax(dim=-1),
            means.unflatten(-1, shape),
            log_variances.unflatten(-1, shape).clamp(min=LEAST_LOG_VARIANCE),
        )

    def conditions(self, tokens: torch.Tensor, hidden: torch.Tensor) -> Mixture:
        """Mixtures (rows, groups, ...) of all groups of tokens (rows, token_size), each given those before it."""
        hidden = suited(hidden, self.condition_proj).unsqueeze(1)
        groups = tokens.unflatten(-1, (self.num_groups, self.group_size))
        embedded = self.input_proj(suited(groups[:, :-1], self.input_proj))
        states = torch.cat([self.condition_proj(hidden), embedded], dim=1)
        states = states + self.position_embedding(torch.arange(self.num_groups, device=states.device))
        for layer in self.layers:
            states = layer(states, hidden)
        return self.mixture(states, hidden)

    def log_likelihood(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Log density (batch, n) of tokens (batch, n, token_size) given hidden states (batch, n, hidden_size), in nats."""
        rows = tokens.flatten(0, 1)
        found = self.conditions(rows, hidden.flatten(0, 1))
        groups = rows.unflatten(-1, (self.num_groups, self.group_size))
        return found.log_prob(groups).sum(dim=-1).view(tokens.shape[:2])

    def confidence(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """How sure the head is of tokens, (batch, n): their log density."""
        return self.log_likelihood(tokens, hidden)

    def token_losses(
        self, target: torch.Tensor, hidden: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        """Negative log likelihood per channel, in nats, (batch, n)."""
        return -self.log_likelihood(target, hidden) / self.token_size

    # Generation

    def draw(
        self,
        hidden: torch.Tensor,
        guidance: float | torch.Tensor | None,
        temperature: float,
        generator: Generators,
        do_sample: bool,
        **options: Any,
    ) -> torch.Tensor:
        """
        The temperature scales the standard deviations of the components. Guidance weighs candidates by
        (p(x | condition) / p(x)) ** (guidance - 1). Without sampling a group is the best of the components' means.
        """
        batch, n = len(hidden) // (1 if guidance is None else 2), hidden.shape[1]
        rows = suited(hidden.flatten(0, 1), self.condition_proj).unsqueeze(1)
        states = self.condition_proj(rows)
        past: list[list[torch.Tensor]] = [[] for _ in self.layers]
        drawn: list[torch.Tensor] = []
        for group in range(self.num_groups):
            place = torch.full((1,), group, device=hidden.device)
            states = states + self.position_embedding(place)
            for layer, cache in zip(self.layers, past, strict=True):
                states = layer(states, rows, cache)
            found = self.mixture(states, rows)
            values = self.draw_group(found, batch, n, guidance, temperature, generator, do_sample)
            drawn.append(values)
            again = values if guidance is None else values.repeat(2, 1)
            states = self.input_proj(suited(again, self.input_proj)).unsqueeze(1)
        self.calls += self.num_groups
        return torch.cat(drawn, dim=-1).view(batch, n, self.token_size)

    def draw_group(
        self,
        found: Mixture,
        batch: int,
        n: int,
        guidance: float | torch.Tensor | None,
        temperature: float,
        generator: Generators,
        do_sample: bool,
    ) -> torch.Tensor:
        """Values (batch * n, group_size) of one group, from mixtures (rows, 1, ...), conditional rows first."""
        rows = batch * n
        own = found.rows(0, rows)
        if do_sample:
            count = 1 if guidance is None else self.num_candidates
            candidates = self.draw_candidates(own, (batch, n, count), temperature, generator)
        else:
            candidates = own.means[:, 0]  # (rows, components, group_size)
        if do_sample and guidance is None:
            return candidates[:, 0]
        scores = torch.zeros(candidates.shape[:2], device=candidates.device)
        if guidance is not None:
            other = found.rows(rows, 2 * rows)
            scores = (guidance - 1) * (own.log_prob(candidates) - other.log_prob(candidates))
        if do_sample:
            probs = scores.softmax(dim=-1).unflatten(0, (batch, n))
            chosen = sampling.categorical(probs, generator).flatten()
        else:
            chosen = (scores + own.log_prob(candidates)).argmax(dim=-1)
        return candidates[torch.arange(rows, device=chosen.device), chosen]

    def draw_candidates(
        self, own: Mixture, shape: tuple[int, int, int], temperature: float, generator: Generators
    ) -> torch.Tensor:
        """Values (batch * n, count, group_size) from mixtures (batch * n, 1, ...); `shape` is (batch, n, count)."""
        batch, n, count = shape
        weights = own.log_weights[:, 0].exp().unflatten(0, (batch, n))
        components = sampling.categorical(weights.unsqueeze(2).expand(-1, -1, count, -1), generator)
        noise = sampling.normal((*shape, self.group_size), generator, weights.device).flatten(0, 1)
        places = components.flatten(0, 1).unsqueeze(-1).expand(-1, -1, self.group_size)
        means = own.means[:, 0].gather(1, places)
        deviations = (0.5 * own.log_variances[:, 0]).exp().gather(1, places)
        return means + temperature * deviations * noise
