"""Continuous speculative decoding: its distribution on heads known in closed form, and its rules."""

import math

import pytest
import torch

from hf_argen import ContinuousSpeculative, Masked, compatible_decodings
from hf_argen.generation.decoding.continuous_speculation import Speculation
from hf_argen.modeling.heads.diffusion import DiffusionHead
from hf_argen.modeling.heads.noise_schedule import cosine_betas, noise_schedule

from ..helpers.goldens import assert_close
from ..helpers.tiny import SMALL_HEADS, tiny_mar

CPU = torch.device("cpu")
STEPS = 5  # of the toy heads
VARIANCE = 0.3  # what the toy networks say of the log variance, between -1 and 1
ROWS = 2048


# The distribution, on one-dimensional tokens


class Mixture(torch.nn.Module):
    """
    The network that is right for a mixture of two normal distributions `spread` to either side of a mean, which the hidden
    state is. With a spread of 0 everything is affine in it.
    """

    def __init__(self, variance: float, spread: float = 0.0):
        super().__init__()
        self.variance, self.spread = variance, spread
        left = torch.from_numpy((1 - cosine_betas()).cumprod()).float()
        self.register_buffer("left", left, persistent=False)

    def embed_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self.left[timesteps][:, None]

    def embed_condition(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def forward(self, noisy: torch.Tensor, left: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        noisy = noisy.repeat(len(mean) // max(len(noisy), 1), 1)
        total = left * self.variance + 1 - left
        apart = noisy - left.sqrt() * mean
        inside = left.sqrt() * self.spread
        expected = inside * torch.tanh(apart * inside / total)  # of the component's side, given the noisy token
        noise = (1 - left).sqrt() * (apart - expected) / total
        return torch.cat([noise, torch.full_like(noise, VARIANCE)], dim=-1)


class ToyMar:
    """
    In place of a transformer: the mean of a token is `start + memory * the token before it`, without condition `null`.
    """

    def __init__(self, start: float, memory: float, null: float = 0.2):
        self.start, self.memory, self.null = start, memory, null

    def __call__(self, tokens, visible, conditions, valid):
        known = torch.zeros(len(tokens), 5)
        known = known.scatter(1, visible + (visible < 4), tokens[..., 0])  # padding to place 0
        mean = self.start + self.memory * torch.nn.functional.pad(known[:, 1:4], (1, 0))
        is_null = conditions["prefix"][:, 0, :1] != 0
        return torch.where(is_null, self.null, mean).unsqueeze(-1)


def toy(start: float, memory: float, variance: float, spread: float = 0.0):
    """A model of four tokens of one channel in a row."""
    model = tiny_mar(image_tokenizer_config=None, latent_channels=1, grid_size=[1, 4])
    model.head = DiffusionHead(1, 1, num_sampling_steps=STEPS)
    model.head.net = Mixture(variance, spread)
    model.masked_hidden_states = ToyMar(start, memory)
    model.conditions = lambda class_labels: {"prefix": torch.zeros(len(class_labels), 1, 1)}
    model.null_conditions = lambda conditions: {"prefix": torch.ones_like(conditions["prefix"])}
    return model


TARGET = {"start": 0.4, "memory": 0.7, "variance": 0.5}
DRAFTER = {"start": 0.1, "memory": 0.4, "variance": 0.8}


def affine_law(variance: float) -> tuple[float, float]:
    """
    With which factor the mean enters the tokens that the steps back lead to, and their variance: every step is affine in the
    noisy token, and so all together. The last one adds its noise, too.
    """
    process = noise_schedule(STEPS, CPU)
    factor, total = 0.0, 1.0
    for step in reversed(range(STEPS)):
        of_token, of_noisy, recip, recipm1, left = (
            getattr(process, name)[step].double().item()
            for name in ("of_token", "of_noisy", "recip", "recipm1", "alphas_cumprod")
        )
        slope = math.sqrt(1 - left) / (left * variance + 1 - left)
        of_x = of_token * (recip - recipm1 * slope) + of_noisy
        of_mean = of_token * recipm1 * slope * math.sqrt(left)
        share = (VARIANCE + 1) / 2
        most, least = (getattr(process, f"{name}_log_variance")[step].item() for name in ("most", "least"))
        factor = of_x * factor + of_mean
        total = of_x**2 * total + math.exp(share * most + (1 - share) * least)
    return factor, total


def standardised(drawn: torch.Tensor, guidance: float | None) -> torch.Tensor:
    """Tokens (batch, 4) to what is standard normal and independent if they follow the target's distribution."""
    factor, total = affine_law(TARGET["variance"])
    before = torch.nn.functional.pad(drawn[:, :3], (1, 0)).double()
    mean = TARGET["start"] + TARGET["memory"] * before
    if guidance is not None:
        mean = 0.2 + guidance * (mean - 0.2)
    return (drawn - factor * mean) / math.sqrt(total)


def distance(values: torch.Tensor, distribution) -> float:
    """Of Kolmogorov and Smirnov: between values and a distribution function."""
    below = distribution(values.double().flatten().sort().values)
    places = torch.arange(len(below) + 1, dtype=torch.double) / len(below)
    return max((below - places[:-1]).abs().max().item(), (below - places[1:]).abs().max().item())


def normal_cdf(values: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(values)


LIMIT = 1.95 / math.sqrt(ROWS * 4)  # passed by 999 of 1000 sets of so many draws


def drawn(decoding, seed=0, rows=ROWS, target=None, **options):
    model = toy(**TARGET) if target is None else target
    decoding.drafter = decoding.drafter or toy(**DRAFTER)
    return model.generate(
        [0] * rows,
        decoding=decoding,
        generator=torch.Generator().manual_seed(seed),
        return_dict_in_generate=True,
        **options,
    )


def options_of(**changes):
    """One token a step, row by row, all of them by draft and verification."""
    return ContinuousSpeculative(
        **{"num_steps": 4, "order": "raster", "draft_length": 3, "prefill": 0.0, **changes}
    )


@pytest.mark.parametrize("tested_steps, guidance", [(1, None), (3, 1.8), (STEPS, None)])
def test_follows_the_model_alone(tested_steps, guidance):
    """Tokens that depend on the one before, at any number of tested steps, rows gaining unequal numbers of tokens."""
    scale = {} if guidance is None else {"guidance_scale": guidance, "guidance_schedule": "constant"}
    output = drawn(options_of(tested_steps=tested_steps), **scale)
    check_independent_normal(standardised(output.sequences[..., 0], guidance))
    lengths = output.accept_lengths
    assert torch.equal(lengths.sum(dim=1), torch.full((ROWS,), 4))
    if tested_steps > 1:
        assert set(lengths[:, 0].tolist()) == {1, 2, 3, 4}


def check_independent_normal(values: torch.Tensor) -> None:
    """Standard normal, and without correlation to those before."""
    assert distance(values, normal_cdf) < LIMIT
    for gap in (1, 2, 3):
        products = values[:, gap:] * values[:, :-gap]
        assert abs(products.mean().item()) < 4 / math.sqrt(products.numel())


def accept_all(self, now, target, begins):
    return now.by_step(now.densities > -torch.inf)


def redraw_from_p(self, now, slots, ways):
    return torch.full((len(slots),), -torch.inf, dtype=torch.double)


def keep_later_drafts(self, now, passed):
    """As the authors' code, which draws each failed token again and keeps what was drafted after it."""
    missed = (now.positions < self.predictor.capacity) & ~passed
    inside = torch.arange(now.steps) <= torch.tensor(now.depths)[:, None]
    return list(now.depths), (missed & inside.unsqueeze(-1)).flatten().nonzero().squeeze(1)


@pytest.mark.parametrize(
    "name, wrong",
    [("test", accept_all), ("density_of_drafter", redraw_from_p), ("last_steps", keep_later_drafts)],
)
def test_wrong_rules_are_seen(name, wrong, monkeypatch):
    """The test above has the power to see them."""
    monkeypatch.setattr(Speculation, name, wrong)
    values = standardised(drawn(options_of(tested_steps=3)).sequences[..., 0], None)
    print(name, distance(values, normal_cdf), LIMIT)
    with pytest.raises(AssertionError):
        check_independent_normal(values)
