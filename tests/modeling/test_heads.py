"""Heads of continuous tokens: against distributions known in closed form, and what holds for all of them."""

import math

import pytest
import torch

from hf_argen import MarForImageGeneration
from hf_argen.modeling.heads.categorical import CategoricalHead
from hf_argen.modeling.heads.energy import EnergyHead
from hf_argen.modeling.heads.flow import TIME_SCALE, FlowHead
from hf_argen.modeling.heads.mixture import Mixture, MixtureHead
from hf_argen.modeling.heads.registry import HEADS, build_head
from hf_argen.modeling.heads.shortcut import ShortcutHead

from ..helpers.enumerator import Enumerator, assert_same_distribution
from ..helpers.tiny import SMALL_HEADS, mar_config, tiny_mar

MEAN, STD = 0.7, 0.4  # of the normal distribution that the exact networks know


def exact_state(tokens: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Where on the straight line's normal distribution tokens are at times: standard deviations from its mean."""
    return (tokens - times * MEAN) / ((1 - times) ** 2 + (times * STD) ** 2).sqrt()


def exact_velocity(tokens: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Expected token minus noise, given their mixture at a time."""
    variance = (1 - times) ** 2 + (times * STD) ** 2
    away = (tokens - times * MEAN) / variance
    return MEAN + times * STD**2 * away - (1 - times) * away


def exact_jump(tokens: torch.Tensor, times: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean velocity of the exact flow over a step."""
    ahead = times + lengths
    spread = ((1 - ahead) ** 2 + (ahead * STD) ** 2).sqrt()
    return (ahead * MEAN + spread * exact_state(tokens, times) - tokens) / lengths


class ExactFlow(torch.nn.Module):
    """What a flow or shortcut head learns from tokens of one normal distribution, whatever the hidden state."""

    def embed_times(self, times, levels=None):
        parts = [times / TIME_SCALE] if levels is None else [times / TIME_SCALE, levels.to(times.dtype)]
        return torch.stack(parts, dim=-1)

    def embed_condition(self, hidden):
        return hidden

    def forward(self, tokens, times, condition):
        tokens = tokens.repeat(len(condition) // len(tokens), 1)
        if times.shape[-1] == 1:
            return exact_velocity(tokens, times)
        return exact_jump(tokens, times[:, :1], 0.5 ** times[:, 1:])


def drawn_and_expected(head, **options):
    """Tokens that a head draws, and where the exact flow leads from the same noise."""
    torch.manual_seed(0)
    drawn = head.sample(torch.zeros(2, 500, 4), **options)
    torch.manual_seed(0)
    return drawn, MEAN + STD * torch.randn(2, 500, 2) * options.get("temperature", 1.0)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_converge(solver, order):
    """Twice as many steps leave a half, or at most a quarter, of the error."""
    head = FlowHead(2, 4, width=8, depth=1, solver=solver)
    head.net = ExactFlow()
    errors = []
    for steps in (12, 24):
        drawn, expected = drawn_and_expected(head, num_steps=steps)
        errors.append((drawn - expected).abs().max().item())
    found = math.log2(errors[0] / errors[1])
    assert errors[0] < 0.3 and found > order - 0.4 and (found < 1.4) == (order == 1)
    assert head.calls == (36 if order == 1 else 72)
    cold, expected = drawn_and_expected(head, num_steps=64, temperature=0.5)
    assert torch.allclose(cold, expected, atol=0.05)
    named, _ = drawn_and_expected(FlowHead(2, 4, 8, 1), num_steps=2, solver=solver)
    assert named.shape == drawn.shape


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_exact_shortcuts_lead_there_at_once(steps):
    head = ShortcutHead(2, 4, width=8, depth=1)
    head.net = ExactFlow()
    drawn, expected = drawn_and_expected(head, num_steps=steps)
    assert torch.allclose(drawn, expected, atol=1e-5) and head.calls == steps


def test_losses_of_exact_flows():
    """The flow's loss is the variance that no network can know; exact shortcuts agree with themselves."""
    torch.manual_seed(0)
    target = MEAN + STD * torch.randn(4, 4000, 2)
    hidden = torch.zeros(4, 4000, 4)
    head = FlowHead(2, 4, width=8, depth=1, batch_multiplier=2)
    head.net = ExactFlow()
    times = torch.linspace(0, 1, 2001, dtype=torch.double)
    variance = (1 - times) ** 2 + (times * STD) ** 2
    least = (STD**2 / variance).mean().item()  # of token minus noise, given the mixture
    assert abs(head.loss(target, hidden).item() - least) < 0.03 * least
    shortcut = ShortcutHead(2, 4, width=8, depth=1, batch_multiplier=2)
    shortcut.net = ExactFlow()
    noise, times = torch.randn(2, 5, 50, 2), torch.zeros(2, 5, 50)
    levels = torch.randint(shortcut.finest_level, (2, 5, 50))
    mean = shortcut.two_steps(noise, times, levels, torch.zeros(2, 5, 50, 4))
    rows = [one.flatten()[:, None] for one in (times, 0.5 ** levels.float())]
    assert torch.allclose(mean.flatten(0, 2), exact_jump(noise.flatten(0, 2), *rows), atol=1e-4)


def test_guidance_extrapolates_the_velocity():
    """Straight flows to two points: guidance leads beyond the conditional one."""
    head = FlowHead(2, 1, width=8, depth=1)

    class Straight(ExactFlow):
        def forward(self, tokens, times, condition):
            return condition.expand(-1, 2)

    head.net = Straight()
    hidden = torch.cat([torch.full((1, 3, 1), 2.0), torch.full((1, 3, 1), 0.5)])
    drawn = head.sample(hidden, guidance=3.0, do_sample=False)
    assert torch.allclose(drawn, torch.full((1, 3, 2), 0.5 + 3 * 1.5))


# The mixture


def fixed_mixture(head: MixtureHead, weights, means, stds) -> None:
    """Gives every group the same mixture, whatever comes before it."""

    def mixture(states, hidden):
        shape = (*states.shape[:2], len(weights))
        tensors = [torch.tensor(value).expand(shape) for value in (weights, means, stds)]
        return Mixture(tensors[0].log(), tensors[1].unsqueeze(-1), 2 * tensors[2].log().unsqueeze(-1))

    head.mixture = mixture


def test_mixture_draws_its_mixture():
    torch.manual_seed(0)
    head = build_head(SMALL_HEADS["mixture"], 2, 4)
    weights, means, stds = [0.3, 0.7], [-2.0, 1.0], [0.5, 0.25]
    fixed_mixture(head, weights, means, stds)
    drawn = head.sample(torch.zeros(2, 4000, 4)).flatten()
    mean = sum(w * m for w, m in zip(weights, means, strict=True))
    second = sum(w * (m**2 + s**2) for w, m, s in zip(weights, means, stds, strict=True))
    assert abs(drawn.mean().item() - mean) < 0.05
    assert abs(drawn.square().mean().item() - second) < 0.1
    assert abs((drawn < -0.5).float().mean().item() - 0.3) < 0.02
    cold = head.sample(torch.zeros(2, 4000, 4), temperature=0.1).flatten()
    near = torch.minimum((cold + 2).abs() / 0.05, (cold - 1).abs() / 0.025)
    assert near.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.05)
    best = head.sample(torch.zeros(1, 3, 4), do_sample=False)
    assert torch.equal(best, torch.ones(1, 3, 2))


def test_log_likelihood_by_torch():
    """Each group given those before it, as torch's own mixtures say."""
    torch.manual_seed(0)
    head = build_head({**SMALL_HEADS["mixture"], "group_size": 2}, 4, 6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, hidden = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    found = head.log_likelihood(tokens, hidden)
    rows = head.conditions(tokens.flatten(0, 1), hidden.flatten(0, 1))
    normal = torch.distributions.Normal(rows.means, (0.5 * rows.log_variances).exp())
    mixtures = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=rows.log_weights), torch.distributions.Independent(normal, 1)
    )
    expected = mixtures.log_prob(tokens.flatten(0, 1).view(6, 2, 2)).sum(dim=1).view(2, 3)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(head.token_losses(tokens, hidden), -expected / 4, rtol=1e-4, atol=1e-4)
    changed = tokens.clone()
    changed[..., 2:] += 1.0
    again = head.conditions(changed.flatten(0, 1), hidden.flatten(0, 1))
    assert torch.allclose(again.means[:, 0], rows.means[:, 0]) and torch.allclose(again.means, rows.means)
    changed[..., :2] += 1.0
    again = head.conditions(changed.flatten(0, 1), hidden.flatten(0, 1))
    assert torch.allclose(again.means[:, 0], rows.means[:, 0])
    assert not torch.allclose(again.means[:, 1], rows.means[:, 1], atol=1e-3)


@torch.no_grad()
def test_channel_by_channel_is_the_whole():
    """Drawn with a cache of keys and values, a token has the likeliest means that the whole pass computes."""
    torch.manual_seed(0)
    head = build_head({**SMALL_HEADS["mixture"], "depth": 2, "num_components": 1}, 4, 6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(2, 3, 6)
    tokens = head.sample(hidden, do_sample=False)
    rows = head.conditions(tokens.flatten(0, 1), hidden.flatten(0, 1))
    assert torch.allclose(rows.means.flatten(1).view_as(tokens), tokens, atol=1e-5)


def test_guided_mixture():
    """Candidates from p(x|c), weighted by (p(x|c) / p(x)) ** (g - 1): for normals of one width, a shifted normal."""
    torch.manual_seed(0)
    head = build_head({**SMALL_HEADS["mixture"], "num_candidates": 2000, "num_components": 1}, 1, 4)

    def mixture(states, hidden):
        conditional = torch.arange(len(states)) < len(states) // 2
        means = torch.where(conditional, 1.0, 0.0).view(-1, 1, 1, 1)
        return Mixture(torch.zeros(len(states), 1, 1), means, torch.zeros(len(states), 1, 1, 1))

    head.mixture = mixture
    drawn = head.sample(torch.zeros(2, 1500, 4), guidance=1.5).flatten()
    assert abs(drawn.mean().item() - 1.5) < 0.1 and abs(drawn.std().item() - 1.0) < 0.1


# The energy score


class ExactMaker(torch.nn.Module):
    """Makes tokens of N(mean, std) from the first channel of the noise."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def embed_condition(self, noise):
        return noise

    def forward(self, hidden, times, condition, shift_scale=1.0):
        uniform = (condition[:, :1] + 0.5).clamp(1e-6, 1 - 1e-6)
        return self.mean + shift_scale * self.std * torch.special.ndtri(uniform)


def energy_loss(mean, std):
    torch.manual_seed(0)
    head = EnergyHead(1, 4, width=8, depth=1, noise_size=2)
    head.net = ExactMaker(mean, std)
    return head.loss(torch.randn(4, 10_000, 1), torch.zeros(4, 10_000, 4)).item()


def test_energy_score_of_normal_distributions():
    """For the true distribution it is E|X - Y| = 2 / sqrt(pi); any other has more."""
    exact = energy_loss(0.0, 1.0)
    assert abs(exact - 2 / math.sqrt(math.pi)) < 0.03
    for mean, std in ((0.3, 1.0), (0.0, 0.7), (0.0, 1.4)):
        assert energy_loss(mean, std) > exact + 0.01
    head = EnergyHead(1, 4, width=8, depth=1, noise_size=2)
    head.net = ExactMaker(0.5, 2.0)
    drawn = head.sample(torch.zeros(2, 5000, 4)).flatten()
    assert abs(drawn.mean().item() - 0.5) < 0.1 and abs(drawn.std().item() - 2.0) < 0.1
    assert head.sample(torch.zeros(2, 5000, 4), temperature=0.5).std().item() == pytest.approx(1.0, abs=0.05)


def test_energy_guidance_works_on_hidden_states():
    torch.manual_seed(0)
    head = build_head(SMALL_HEADS["energy"], 2, 4).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(2, 3, 4)
    mixed = 1.7 * hidden[:1] - 0.7 * hidden[1:]
    with torch.no_grad():
        found = head.sample(hidden, guidance=1.7, do_sample=False)
        assert torch.allclose(found, head.sample(mixed, do_sample=False), atol=1e-5)


# All heads


@pytest.fixture(params=HEADS)
def kind(request):
    return request.param


def test_an_untrained_head_starts_as_its_authors_say(kind):
    torch.manual_seed(0)
    head = MarForImageGeneration(mar_config(head_config=SMALL_HEADS[kind])).head
    if kind == "mixture":
        assert head.layers[0].modulation.linear.weight[:16].abs().max() > 100 * (
            head.layers[0].modulation.linear.weight[32:48].abs().max()
        )
        assert head.out_proj.bias[0] != head.out_proj.bias[1]
    else:
        assert not head.net.output.linear.weight.any() and not head.net.blocks[0].modulation.weight.any()
        assert head.net.blocks[0].fc1.weight.any()


def test_learns_a_distribution(kind):
    """Two clusters, told apart by the hidden state; the losses fall and what is drawn lies in the clusters."""
    torch.manual_seed(0)
    head = build_head({**SMALL_HEADS[kind], **({} if kind == "mixture" else {"width": 32})}, 1, 2)
    head.init_weights()
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    hidden = torch.eye(2).view(1, 2, 2).expand(64, -1, -1)
    losses = []
    for _ in range(150):
        target = hidden[..., :1] * 2 - 1 + 0.1 * torch.randn(64, 2, 1)
        loss = head.loss(target, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in head.parameters())
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.5
    if kind == "diffusion":  # needs a longer training before its first steps back lead anywhere
        return
    with torch.no_grad():
        drawn = head.sample(hidden)
    assert abs(drawn[:, 0].mean().item() - 1) < 0.35 and abs(drawn[:, 1].mean().item() + 1) < 0.35


@torch.no_grad()
def test_one_generator_per_row(kind):
    head = tiny_mar(head_config=SMALL_HEADS[kind]).head
    hidden = torch.randn(4, 5, 32)

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = head.sample(hidden, 1.5, generator=generators(1, 2))
    alone = head.sample(hidden[[1, 3]], 1.5, generator=generators(2))
    assert together.shape == (2, 5, 4) and torch.allclose(together[1:], alone, atol=1e-3, rtol=1e-3)
    target = torch.randn(4, 5, 4)
    losses = head.token_losses(target, hidden, generators(1, 2, 3, 4))
    one = head.token_losses(target[2:3], hidden[2:3], generators(3))
    assert losses.shape == (4, 5) and torch.allclose(losses[2:3], one, rtol=1e-3)
    mask = torch.zeros(4, 5)
    mask[1, 2] = 1
    loss = head.loss(target, hidden, mask, generators(1, 2, 3, 4))
    assert torch.allclose(loss, losses[1, 2], rtol=1e-4)


def test_swapped_in_the_configuration(kind, tmp_path):
    """Another head on a trunk: saved and loaded with it, trained, drawn from, also in bfloat16."""
    trunk = tiny_mar().model
    model = tiny_mar(head_config=SMALL_HEADS[kind])
    model.model.load_state_dict(trunk.state_dict())
    model.save_pretrained(tmp_path)
    loaded = MarForImageGeneration.from_pretrained(tmp_path)
    options = {"class_labels": [1, 2], "guidance_scale": 1.5}
    greedy = model.generate(**options, do_sample=False)
    assert torch.equal(loaded.generate(**options, do_sample=False), greedy)
    output = loaded.generate(**options, return_dict_in_generate=True)
    assert torch.isfinite(output.sequences).all() and output.head_calls >= output.steps
    latents = torch.randn(2, 16, 4)
    loaded.train()
    loss = loaded(latents=latents, class_labels=torch.tensor([1, 2]), labels=latents).loss
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in loaded.head.parameters())
    half = MarForImageGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.head.parameters()} == {torch.float32}
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(half.generate(**options)).all()


@pytest.mark.parametrize(
    "head_config, message",
    [
        ({"type": "flow", "solver": "rk4"}, "solver is 'rk4'; known are euler, midpoint, heun"),
        ({"type": "flow", "num_sampling_steps": 0}, "num_sampling_steps of the flow head is 0"),
        ({"type": "shortcut", "num_sampling_steps": 3}, "a shortcut head takes powers of two up to 128"),
        ({"type": "shortcut", "finest_steps": 100}, "finest_steps is 100; it must be a power of two"),
        ({"type": "shortcut", "batch_multiplier": 1}, "needs 2 at least, one to agree"),
        ({"type": "mixture", "width": 12, "num_heads": 5}, "width 12 of the mixture head is not a multiple"),
        ({"type": "mixture", "group_size": 3}, "token_size 4 of the mixture head is not a multiple"),
        ({"type": "energy", "exponent": 2}, r"exponent of the energy head is 2; it must lie in \(0, 2\)"),
        ({"type": "energy", "diversity_weight": 0}, "diversity_weight of the energy head is 0"),
        ({"type": "energy", "batch_multiplier": 0}, "batch_multiplier of the energy head is 0"),
    ],
)
def test_bad_heads(head_config, message):
    with pytest.raises(ValueError, match=message):
        build_head(head_config, 4, 8)


def test_bad_options_of_sample(kind):
    head, hidden = build_head(SMALL_HEADS[kind], 4, 8), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match=f"temperature is 0; a {kind} head needs a number above 0"):
        head.sample(hidden, temperature=0)
    with pytest.raises(ValueError, match=f"A {kind} head has no option top_p"):
        head.sample(hidden, top_p=0.5)
    if "num_steps" in head.sample_options():
        with pytest.raises(ValueError, match=r"num_(sampling_)?steps"):
            head.sample(hidden, num_steps=0)


# Ids


@torch.no_grad()
def test_categorical_head_draws_its_guided_softmax():
    """Every branch followed: guidance of each row, temperature; the best ones without sampling."""
    torch.manual_seed(0)
    head, hidden, guidance = CategoricalHead(4, 3), torch.randn(4, 1, 4), torch.tensor([1.5, 3.0])
    found = Enumerator().distribution(lambda: tuple(head.sample(hidden, guidance, 0.8).flatten().tolist()))
    logits = head.out_proj(hidden)[:, 0]
    scores = logits[2:] + guidance[:, None] * (logits[:2] - logits[2:])
    first, second = (scores / 0.8).softmax(dim=-1).tolist()
    expected = {(a, b): first[a] * second[b] for a in range(3) for b in range(3)}
    assert_same_distribution(found, expected)
    assert torch.equal(head.sample(hidden, guidance, do_sample=False)[:, 0], scores.argmax(dim=-1))
    assert torch.equal(
        head.sample(hidden, 1.5, do_sample=False)[0], head.sample(hidden, guidance, do_sample=False)[0]
    )


def test_categorical_loss_and_bad_input():
    torch.manual_seed(0)
    head, hidden = CategoricalHead(4, 3), torch.randn(2, 5, 4)
    ids, mask = torch.randint(3, (2, 5)), torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
    rows = mask.flatten().bool()
    expected = torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1)[rows], ids.flatten()[rows])
    assert torch.isclose(head.loss(ids, hidden, mask), expected)
    for arguments, message in (
        ((hidden, None, 0.0), "temperature is 0.0; a categorical head needs a number above 0"),
        ((hidden[:1], 2.0), "hidden has 1 rows; with guidance there are as many conditional"),
        ((hidden[0],), r"hidden has the shape \(5, 4\); this head takes \(batch, n, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            head.sample(*arguments)
