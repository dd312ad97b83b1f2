"""Continuous speculative decoding: its distribution on heads known in closed form, and its rules."""

import math

import numpy as np
import pytest
import torch

from hf_argen import ContinuousSpeculative, Masked, compatible_decodings
from hf_argen.generation.decoding.continuous_speculation import Speculation
from hf_argen.generation.guidance import Guidance
from hf_argen.generation.predictors.masked import MaskedPredictor
from hf_argen.modeling.heads.diffusion import DiffusionHead
from hf_argen.modeling.heads.noise_schedule import cosine_betas, noise_schedule

from ..helpers.goldens import assert_close
from ..helpers.tiny import SMALL_HEADS, tiny_mar, tiny_maskgit

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
        expected = inside * torch.tanh(
            apart * inside / total
        )  # of the component's side, given the noisy token
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
    model.head = DiffusionHead(1, 1, width=4, depth=1, num_sampling_steps=STEPS)
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
    with pytest.raises(AssertionError):
        check_independent_normal(values)


def mixture_cdf(variance: float, spread: float):
    """
    Distribution function of the tokens under a mixture network with mean 0: by quadrature, step after step on a grid, the last
    one by the normal distribution function.
    """
    grid = torch.linspace(-5, 5, 1401, dtype=torch.double)
    weights = torch.exp(-0.5 * grid.square())
    for step in reversed(range(STEPS)):
        mean, deviation = step_of_mixture(grid, step, variance, spread)
        weights /= weights.sum()
        if step:
            weights = (torch.exp(-0.5 * ((grid[:, None] - mean) / deviation).square()) * weights).sum(dim=1)
    places = torch.linspace(-4, 4, 1001, dtype=torch.double)
    below = (weights * torch.special.ndtr((places[:, None] - mean) / deviation)).sum(dim=1)
    return lambda values: torch.from_numpy(np.interp(values, places, below))


def step_of_mixture(grid, step: int, variance: float, spread: float):
    """Mean and deviation of a step back from the places of a grid, by the posterior of both components."""
    process = noise_schedule(STEPS, CPU)
    names = (
        "of_token",
        "of_noisy",
        "recip",
        "recipm1",
        "alphas_cumprod",
        "most_log_variance",
        "least_log_variance",
    )
    of_token, of_noisy, recip, recipm1, left, most, least = (
        getattr(process, name)[step].double() for name in names
    )
    total, place = left * variance + 1 - left, left.sqrt() * spread
    high, low = (torch.exp(-0.5 * (grid - side * place).square() / total) for side in (1.0, -1.0))
    expected = place * (high - low) / (high + low).clamp(min=1e-300)
    noise = (1 - left).sqrt() * (grid - expected) / total
    mean = of_token * (recip * grid - recipm1 * noise) + of_noisy * grid
    share = (VARIANCE + 1) / 2
    return mean, torch.exp(0.5 * (share * most + (1 - share) * least))


def test_mixtures():
    """Tokens of two modes, drafted by a head whose modes are elsewhere."""
    target = toy(0.0, 0.0, 0.2, spread=1.0)
    decoding = options_of(tested_steps=3, drafter=toy(0.2, 0.0, 0.3, spread=0.7))
    values = drawn(decoding, target=target).sequences
    right, wrong = mixture_cdf(0.2, 1.0), mixture_cdf(0.3, 0.7)
    assert distance(values, right) < LIMIT < 3 * LIMIT < distance(values, wrong)


def test_sets_of_tokens_and_orders():
    """Two tokens a step in random orders, independent of each other: every token follows its distribution."""
    target, drafter = (toy(part["start"], 0.0, part["variance"]) for part in (TARGET, DRAFTER))
    decoding = options_of(drafter=drafter, num_steps=2, order="random", schedule="linear", draft_length=1)
    output = drawn(decoding, target=target)
    factor, total = affine_law(TARGET["variance"])
    values = (output.sequences[..., 0] - factor * TARGET["start"]) / math.sqrt(total)
    check_independent_normal(values)
    assert set(output.accept_lengths[:, 0].tolist()) == {2, 4}


def test_trials_are_bounded():
    """With one trial a token that fails is drawn from p: the difference is within the bound that is stated."""
    decoding = options_of(tested_steps=3, max_trials=1)
    values = standardised(drawn(decoding).sequences[..., 0], None)
    assert LIMIT < distance(values, normal_cdf) < 1 / 2.7 + LIMIT


def test_accepting_more_gives_the_drafter():
    """At a very high acceptance temperature every draft passes; the guarantee is then another."""
    decoding = options_of(acceptance_temperature=1e6)
    assert (decoding.guarantee.value, decoding.knob) == ("relaxed", "acceptance_temperature")
    output = drawn(decoding)
    assert torch.equal(output.accept_lengths, torch.full((ROWS, 1), 4))
    factor, total = affine_law(DRAFTER["variance"])
    first = (output.sequences[:, 0, 0] - factor * DRAFTER["start"]) / math.sqrt(total)
    assert distance(first, normal_cdf) < LIMIT * 2
    assert ContinuousSpeculative().guarantee.value == "exact in distribution"


# The loop, on small models


class Tame(Mixture):
    """The same around a mean that the hidden state decides: an untrained network leads far away."""

    def embed_condition(self, hidden: torch.Tensor) -> torch.Tensor:
        return 0.2 * torch.tanh(hidden[..., :4])


def small(seed, **changes):
    torch.manual_seed(seed)
    model = tiny_mar(**changes)
    if model.config.token_size == 4:
        model.head.net = Tame(0.5)
    return model


SMALLER = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
OPTIONS = {"guidance_scale": 1.5, "return_dict_in_generate": True}


def decoding_for(seed=4, **changes):
    changes = {"num_steps": 16, "draft_length": 3, **changes}
    return ContinuousSpeculative(**{"drafter": small(seed, **SMALLER), **changes})


def test_a_perfect_drafter():
    """Drafted by itself all drafts pass, and the model is called once for several steps."""
    model = small(3)
    decoding, before = decoding_for(drafter=model, prefill=0.25), model.head.calls
    output = model.generate([1, 2], decoding=decoding, generator=torch.Generator().manual_seed(0), **OPTIONS)
    assert output.accept_lengths.tolist() == [[4, 4, 4]] * 2
    assert output.steps == 4 + 3 and output.forward_calls == 4 + 3 + 3 * 3
    assert output.head_calls == model.head.calls - before
    assert output.orders.sort(dim=1).values.tolist() == [list(range(16))] * 2


@pytest.mark.parametrize("form", ["sets", "single", "causal", "kept"])
def test_a_picture_does_not_depend_on_the_batch(form):
    """One generator for each picture: rows that gain unequal numbers of tokens give what they give alone."""
    causal = {"causal": True} if form == "causal" else {}
    model, drafter = small(3, **causal), small(4, **SMALLER, **causal)
    decoding = decoding_for(
        drafter=drafter, num_steps=9 if form == "sets" else 16, order="raster" if causal else "random",
        tested_steps=3,
    )  # fmt: skip
    edit = {}
    if form == "kept":
        keep = torch.zeros(1, 4, 4)
        keep[0, 1] = 1
        edit = {"latents": torch.randn(1, 16, 4), "keep_mask": keep}

    def generate(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return model.generate(rows, decoding=decoding, generator=generators, **edit, **OPTIONS)

    together = generate([0, 1])
    assert len({tuple(row) for row in together.accept_lengths.tolist()}) > 1
    for row in range(2):
        alone = generate([row])
        lengths = together.accept_lengths[row]
        assert lengths[lengths > 0].tolist() == alone.accept_lengths[0].tolist()
        assert_close(together.sequences[row], alone.sequences[0], 1e-3)
    if edit:
        assert torch.equal(together.sequences[:, 4:8], edit["latents"][:, 4:8].expand(2, -1, -1))


def test_without_sampling_the_model_draws_alone():
    model = small(3)
    options = {"do_sample": False, **OPTIONS}
    output = model.generate([1, 2], decoding=decoding_for(), **options)
    plain = model.generate([1, 2], decoding=Masked(num_steps=16), **options)
    assert torch.equal(output.sequences, plain.sequences) and output.forward_calls == 16


def test_prefilled_steps_are_those_of_masked():
    model = small(3)
    outputs = [
        model.generate([1], decoding=one, generator=torch.Generator().manual_seed(0), **OPTIONS)
        for one in (decoding_for(prefill=1.0), Masked(num_steps=16))
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].forward_calls == 16 and outputs[0].accept_lengths.shape == (1, 0)


def test_switches_itself_off():
    """After 16 calls that gained next to nothing nothing is drafted any more."""
    model = small(3, grid_size=5, image_tokenizer_config=None, latent_channels=4)
    drafter = small(4, grid_size=5, image_tokenizer_config=None, latent_channels=4, **SMALLER)
    drafter.head.net.variance = 0.01
    decoding = decoding_for(drafter=drafter, num_steps=25, draft_length=2, prefill=0.0, give_up_below=2.0)
    output = model.generate([1], decoding=decoding, **OPTIONS)
    assert output.steps == 25 and output.forward_calls == 25 + 16 * 2


def test_time_limit_and_streamer():
    model = small(3)
    seen = []
    streamer = type("Steps", (), {"put": lambda self, value: seen.append(value), "end": lambda self: None})()
    output = model.generate([1], decoding=decoding_for(), streamer=streamer, **OPTIONS)
    assert len(seen) == output.steps and torch.equal(seen[-1], output.images)
    output = model.generate([1, 2], decoding=decoding_for(), max_time=1e-9, **OPTIONS)
    assert output.steps == 2 and (output.sequences != 0).all()


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_several_steps_in_one_call(causal):
    """What the predictor says of steps ahead is what it says once their drafts are known; rows of unequal length."""
    model = small(3, causal=causal)
    predictor = MaskedPredictor(model, Guidance(2.0, "constant", neutral=1.0))
    predictor.start({"class_labels": torch.tensor([1, 2])})
    tokens = torch.randn(2, 16, 4)
    known = torch.tensor([[0, 1, 2], [0, 16, 16]])
    predictor.predict()
    predictor.commit(tokens.gather(1, known.clamp(max=15)[..., None].expand(-1, -1, 4)), known, [3, 1])
    positions = torch.tensor([[[3], [4], [5]], [[1], [2], [3]]])
    drafts = tokens.gather(1, positions[:, :2, 0, None].expand(-1, -1, 4)).unsqueeze(2)
    ahead = predictor.predict_ahead(drafts, positions, [[1, 1], [1, 1]])
    assert ahead.shape == (4, 3, 1, 32) and predictor.calls == 2 and predictor.lengths == [3, 1]
    for step in range(3):
        assert_close(predictor.predict(positions=positions[:, step]), ahead[:, step], 1e-4)
        if step < 2:
            predictor.commit(drafts[:, step], positions[:, step])


# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"draft_length": 0}, "draft_length is 0; it must be a whole number of at least 1"),
        ({"tested_steps": 0}, "tested_steps is 0; it must be a whole number"),
        ({"max_trials": 2.5}, "max_trials is 2.5; it must be a whole number"),
        ({"prefill": 1.5}, r"prefill is 1.5; it is a share of the steps and must lie in \[0, 1\]"),
        ({"acceptance_temperature": 0.5}, "acceptance_temperature is 0.5; it must be a number, 1 "),
        ({"give_up_below": 0.5}, "give_up_below is 0.5"),
        ({"draft_length": 17}, "draft_length is 17; a picture of this model has 16 tokens"),
        ({"tested_steps": 6}, "tested_steps is 6; the head of this model takes 5 steps"),
        ({"num_steps": 17}, "num_steps is 17; this model has 16 tokens"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(3).generate([1], decoding=decoding_for(**options))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_config": SMALL_HEADS["flow"]}, "The drafter has a flow head, which gives no densities"),
        (
            {"patch_size": 2, "grid_size": 2},
            r"The drafter has tokens of size 16, the model 4; they must agree",
        ),
        (
            {"grid_size": 3, "image_tokenizer_config": None, "latent_channels": 4},
            r"The drafter has a grid of tokens of \[\(3, 3\)\], the model \[\(4, 4\)\]",
        ),
        ({"num_classes": 7}, "The drafter has a number of classes of 7, the model 5"),
        ({"causal": True}, "The drafter has causal = True, the model False"),
    ],
)
def test_bad_drafters(changes, message):
    with pytest.raises(ValueError, match=message):
        small(3).generate([1], decoding=decoding_for(drafter=small(4, **changes)))


def test_other_drafters():
    model = small(3)
    with pytest.raises(ValueError, match="ContinuousSpeculative needs a drafter: a small model of the same"):
        model.generate([1], decoding="continuous_speculative")
    with pytest.raises(ValueError, match="The drafter is a MaskGitForImageGeneration, the model a MarForIm"):
        model.generate([1], decoding=decoding_for(drafter=tiny_maskgit()))
    other = small(4)
    other.config.image_tokenizer_config.latent_scale = 0.7
    with pytest.raises(
        ValueError, match=r"The drafter has a latent scale of 0\.7, the model 0\.5; they must"
    ):
        model.generate([1], decoding=decoding_for(drafter=other))
    broken = tiny_mar()
    broken.head.net.output.linear.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="The drafter of ContinuousSpeculative produced NaN or infinity"):
        model.generate([1], decoding=decoding_for(drafter=broken))
    with pytest.raises(ValueError, match="MarForImageGeneration produced NaN or infinite"):
        broken.generate([1], decoding=decoding_for(drafter=model))


def test_models_without_densities():
    model = tiny_mar(head_config=SMALL_HEADS["energy"])
    assert compatible_decodings(model) == ["masked"]
    with pytest.raises(ValueError, match="cannot be decoded by 'continuous_speculative'; it can by masked"):
        model.generate([1], decoding="continuous_speculative")
