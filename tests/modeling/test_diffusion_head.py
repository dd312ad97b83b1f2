"""The diffusion head against what MAR's code computed, against diffusers, and on a distribution known in closed form."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from hf_argen.modeling.heads.diffusion import DiffusionHead, step_back
from hf_argen.modeling.heads.noise_schedule import cosine_betas, noise_schedule, respaced, respaced_as
from hf_argen.modeling.heads.registry import build_head

from ..helpers.goldens import assert_close, golden

CPU = torch.device("cpu")
NAMES = {
    "timestep_map": "timesteps",
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "sqrt_recip_alphas_cumprod": "recip",
    "sqrt_recipm1_alphas_cumprod": "recipm1",
    "posterior_mean_coef1": "of_token",
    "posterior_mean_coef2": "of_noisy",
    "posterior_log_variance_clipped": "least_log_variance",
}


@pytest.fixture(scope="module", params=["mar_tiny", "mar_tiny_patch2"])
def case(request):
    return golden("mar", request.param)


@pytest.fixture(scope="module")
def head(case):
    return case.convert().head


def test_constants(case):
    """Bit by bit, for every way to choose steps."""
    compared = 0
    for key, expected in case.tensors.items():
        if key.startswith("schedule."):
            _, steps, name = key.split(".")
            process = noise_schedule({"full": "1000"}.get(steps, steps.replace("_", ",")), CPU)
            assert torch.equal(getattr(process, NAMES[name]), expected), key
            compared += 1
    assert compared > 15


@torch.no_grad()
def test_network(case, head):
    tensors = case.tensors
    condition = head.net.embed_condition(tensors["head.z"])
    times = head.net.embed_times(tensors["head.t"])
    assert_close(condition, tensors["head.hidden.cond_embed"])
    assert_close(times, tensors["head.hidden.time_embed"])
    assert_close(head.net(tensors["head.target"], times, condition), tensors["head.net_out"])
    process = noise_schedule("1000", CPU)
    steps = tensors["head.t"][:, None]
    noisy = process.signal[steps] * tensors["head.target"] + process.noise[steps] * tensors["head.noise"]
    assert_close(noisy, tensors["head.x_t"])


@torch.no_grad()
def test_one_step_back(case, head):
    tensors = case.tensors
    process = noise_schedule(head.num_sampling_steps, CPU)
    steps = tensors["head.p_t"]
    condition = head.net.embed_condition(tensors["head.z"])
    times = head.net.embed_times(process.timesteps[steps])
    predicted, variance = head.net(tensors["head.target"], times, condition).chunk(2, dim=-1)
    found = step_back(process, steps[:, None], tensors["head.target"], predicted, variance)
    for one, name in zip(found, ("mean", "log_variance", "pred_xstart"), strict=True):
        assert_close(one, tensors[f"head.p_{name}"])


@torch.no_grad()
def test_losses(case, head):
    tensors = case.tensors
    condition = head.net.embed_condition(tensors["head.z"])
    losses = head.row_losses(tensors["head.target"], condition, tensors["head.t"], tensors["head.noise"])
    assert_close(losses, tensors["head.loss"])
    mask = tensors["head.mask"]
    assert_close((losses * mask).sum() / mask.sum(), tensors["head.masked_loss"])
    rows = head.token_losses(
        tensors["head.target"][None],
        tensors["head.z"][None],
        timesteps=tensors["head.t"][None, None],
        noise=tensors["head.noise"][None, None],
    )
    assert torch.allclose(rows[0], losses, rtol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_samples(case, head, index):
    """By the authors' seed, with guidance and without."""
    recorded = case.case["head_samples"][index]
    guidance = None if recorded["cfg"] == 1 else recorded["cfg"]
    expected = case.tensors[f"head.sample{index}.out"]
    hidden = case.tensors["head.z"][:, None]
    torch.manual_seed(case.case["seeds"]["head_samples"][index])
    found = head.sample(hidden, guidance, recorded["temperature"])
    assert_close(found[:, 0], expected[: len(found)])
    generator = torch.Generator().manual_seed(case.case["seeds"]["head_samples"][index])
    again = head.sample(hidden, guidance, recorded["temperature"], generator)
    assert torch.equal(again, found)


@torch.no_grad()
def test_from_recorded_noise(case, head):
    tensors = case.tensors
    process = noise_schedule(head.num_sampling_steps, CPU)
    times = head.net.embed_times(process.timesteps)
    condition = head.net.embed_condition(tensors["head.z"])
    rows = len(tensors["head.sample1.noise_init"])
    noises = list(tensors["head.sample1.noise_steps"][:, :rows])
    recorded = case.case["head_samples"][1]
    found = head.denoise(
        process,
        tensors["head.sample1.noise_init"],
        times,
        condition,
        noises,
        recorded["cfg"],
        recorded["temperature"],
    )
    assert_close(found, tensors["head.sample1.out"][:rows])
    # The loop is one graph.
    compiled = torch.compile(head.denoise, backend="eager", fullgraph=True)
    short = noise_schedule(3, CPU)
    arguments = (short, tensors["head.sample1.noise_init"], times[:3], condition, noises[:3], 2.0, 1.0)
    assert torch.equal(compiled(*arguments), head.denoise(*arguments))


def test_diffusers_takes_the_same_steps():
    """Its scheduler with the learned range of variances, in each of the 1000 steps."""
    scheduler = DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False
    )
    scheduler.set_timesteps(1000)
    assert torch.allclose(torch.from_numpy(cosine_betas()).float(), scheduler.betas)
    process = noise_schedule(1000, CPU)
    torch.manual_seed(0)
    noisy, answer = torch.randn(5, 3), torch.randn(5, 6)
    for step in (999, 998, 500, 20, 1, 0):
        mean, log_variance, tokens = step_back(process, step, noisy, *answer.chunk(2, dim=-1))
        torch.manual_seed(1)
        theirs = scheduler.step(answer, step, noisy)
        torch.manual_seed(1)
        noise = torch.randn(5, 3)
        ours = mean if step == 0 else mean + (0.5 * log_variance).exp() * noise
        assert_close(tokens, theirs.pred_original_sample, 1e-3)
        assert_close(ours, theirs.prev_sample, 1e-3)


def exact_network(head: DiffusionHead, mean: float, std: float) -> None:
    """Lets the head predict the expected noise of tokens from a normal distribution, whatever the hidden state."""
    process = noise_schedule(1000, CPU)

    class Exact(torch.nn.Module):
        def embed_times(self, timesteps):
            return timesteps[:, None]

        def embed_condition(self, hidden):
            return hidden

        def forward(self, tokens, times, condition):
            signal, noise = process.signal[times], process.noise[times]
            expected = noise * (tokens - signal * mean) / (signal**2 * std**2 + noise**2)
            return torch.cat([expected, -torch.ones_like(tokens)], dim=-1)

    head.net = Exact()


def test_exact_noise_gives_the_distribution():
    """A head that knows the noise draws the tokens' own normal distribution; two hundred steps are nearly exact."""
    torch.manual_seed(0)
    head = DiffusionHead(2, 4, width=8, depth=1, num_sampling_steps=200)
    exact_network(head, mean=0.7, std=0.3)
    drawn = head.sample(torch.zeros(4, 5000, 4)).flatten()
    assert abs(drawn.mean().item() - 0.7) < 0.01
    assert abs(drawn.std().item() - 0.3) < 0.01
    kurtosis = ((drawn - drawn.mean()) / drawn.std()).pow(4).mean().item()
    assert abs(kurtosis - 3) < 0.15
    cold = head.sample(torch.zeros(4, 5000, 4), temperature=0.7).flatten()
    assert cold.std() < 0.9 * drawn.std()


def test_bound_is_zero_for_the_true_step():
    """With the posterior's variance and the true noise the variational term vanishes; at step 0 it is a likelihood."""
    head = DiffusionHead(3, 4, width=8, depth=1)
    target, noise = torch.full((2, 3), 0.25), torch.randn(2, 3)

    class Exact(torch.nn.Module):
        def embed_times(self, timesteps):
            return timesteps

        def forward(self, tokens, times, condition):
            return torch.cat([noise, -torch.ones_like(noise)], dim=-1)

    head.net = Exact()
    losses = head.row_losses(target, torch.zeros(2, 8), torch.tensor([500, 0]), noise)
    assert abs(losses[0].item()) < 1e-4
    scale = math.exp(0.5 * noise_schedule(1000, CPU).least_log_variance[0].item())
    inside = math.erf(1 / 255 / scale / math.sqrt(2))
    assert abs(losses[1].item() + math.log2(inside)) < 1e-2


# Rows, options, bad input


def small_head(**changes) -> DiffusionHead:
    torch.manual_seed(0)
    head = build_head({"type": "diffusion", "width": 8, "depth": 1, "num_sampling_steps": 4, **changes}, 2, 6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head.eval()


@torch.no_grad()
def test_one_generator_per_row():
    head, hidden = small_head(), torch.randn(3, 5, 6)

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = head.sample(hidden, generator=generators(1, 2, 3))
    alone = head.sample(hidden[1:2], generator=generators(2))
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    losses = head.token_losses(torch.ones(3, 5, 2), hidden, generators(1, 2, 3))
    assert torch.allclose(head.token_losses(torch.ones(1, 5, 2), hidden[1:2], generators(2)), losses[1:2])


@torch.no_grad()
def test_number_of_steps_of_one_call():
    head, hidden = small_head(), torch.randn(1, 2, 6)
    head.sample(hidden)
    assert head.calls == 4
    head.sample(hidden, num_steps=7)
    assert head.calls == 11
    nothing = head.sample(hidden, do_sample=False)
    assert torch.equal(nothing, head.sample(hidden, do_sample=False))


@torch.no_grad()
def test_steps_with_a_stride():
    """Any number of others begins where they do, so that the last training step is left out."""
    head, hidden = small_head(num_sampling_steps="ddim25"), torch.randn(1, 2, 6)
    assert respaced_as("ddim25") == respaced_as("ddim25", 25) == list(range(0, 1000, 40))
    assert respaced_as("ddim25", 5) == [0, 240, 480, 720, 960] and respaced_as("ddim25", "ddim2") == [0, 500]
    assert respaced_as("25", 5) == respaced(5) and respaced_as("ddim25", "30") == respaced(30)
    for count in range(2, 962):
        steps = respaced_as("ddim25", count)
        assert (len(steps), steps[0], steps[-1]) == (count, 0, 960)
        head.check_num_steps(count)
    for count in (962, 2000):
        with pytest.raises(
            ValueError, match=f"is {count}; a training of 961 steps has 961 for {count} of them"
        ):
            head.check_num_steps(count)
    drawn, expected = (
        head.sample(hidden, num_steps=steps, generator=torch.Generator().manual_seed(0))
        for steps in (25, None)
    )
    assert torch.equal(drawn, expected) and head.calls == 50
    head.calls = 0
    head.sample(hidden, num_steps=5)
    assert head.calls == 5
    assert (head.sampling_steps, head.telling_steps) == (25, 25)
    plain = small_head(num_sampling_steps="25")
    assert (plain.sampling_steps, plain.telling_steps) == (25, 13)


def test_respacing():
    assert respaced(1000) == list(range(1000))
    assert respaced("ddim25") == list(range(0, 1000, 40))
    assert respaced(2) == [0, 999] and respaced(1) == [0]
    assert respaced("2,3", 10) == [0, 4, 5, 7, 9]


@pytest.mark.parametrize(
    "steps, message",
    [
        (0, "give a whole number above 0"),
        ("many", "num_sampling_steps is 'many'"),
        (1001, "a training of 1000 steps has 1000 for 1001 of them"),
        ("600,600", "has 500 for 600 of them"),
        ("ddim999", "no whole-number stride gives so many steps"),
    ],
)
def test_bad_respacing(steps, message):
    with pytest.raises(ValueError, match=message):
        small_head(num_sampling_steps=steps)


def test_bad_calls():
    head, hidden = small_head(), torch.randn(3, 5, 6)
    for arguments, message in (
        ({"hidden": hidden[..., :3]}, r"this head takes \(batch, n, 6\)"),
        ({"hidden": hidden, "guidance": 2.0}, "hidden has 3 rows; with guidance there are as many"),
        (
            {"hidden": hidden, "temperature": 0.0},
            "temperature is 0.0; a diffusion head needs a number above 0",
        ),
        ({"hidden": hidden, "order": 2}, "A diffusion head has no option order; it has num_steps"),
        ({"hidden": hidden, "num_steps": 2000}, "1000 steps has 1000 for 2000"),
    ):
        with pytest.raises(ValueError, match=message):
            head.sample(**arguments)
    with pytest.raises(ValueError, match="do not belong together"):
        head.loss(torch.randn(3, 5, 3), hidden)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_densities_of_ways(guided):
    """What a way gets on the go, all its steps get at once, and torch's normal distribution gives to each."""
    torch.manual_seed(0)
    head = DiffusionHead(3, 6, width=8, depth=2, num_sampling_steps=7)
    hidden = torch.randn(4 if guided else 2, 2, 6)
    guidance = torch.tensor([1.5, 3.0]) if guided else None
    process = head.reverse_process(hidden, guidance, temperature=0.8)
    way, density = process.walk(torch.randn(4, 3), torch.randn(5, 4, 3))
    assert way.shape == (6, 4, 3) and head.calls == 5
    expected = sum(
        torch.distributions.Normal(*process.transition(way[i], 4 - i)).log_prob(way[i + 1]).sum(dim=1)
        for i in range(5)
    )
    constant = 5 * 3 * 0.5 * math.log(2 * math.pi)
    assert_close(density - constant, expected.double(), 1e-4)
    head.calls = 0
    assert_close(process.log_density(way), density, 1e-4)
    assert head.calls == 1
    rows = torch.tensor([3, 0, 3])
    assert_close(process.select(rows).log_density(way[:, rows]), density[rows], 1e-4)


@torch.no_grad()
def test_a_way_is_what_sample_draws():
    """But for the noise of the last step."""
    torch.manual_seed(0)
    head = DiffusionHead(3, 6, width=8, depth=2, num_sampling_steps=7)
    hidden = torch.randn(4, 2, 6)
    torch.manual_seed(1)
    drawn = head.sample(hidden, 2.0)
    torch.manual_seed(1)
    start = torch.randn(2, 2, 3)
    noise = [torch.randn(4, 2, 3)[:2].flatten(0, 1) for _ in range(7)]
    noise[-1].zero_()
    way, _ = head.reverse_process(hidden, 2.0).walk(start.flatten(0, 1), torch.stack(noise))
    assert_close(way[-1].view(2, 2, 3), drawn, 1e-5)
