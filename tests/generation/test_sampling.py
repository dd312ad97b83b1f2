"""The primitives of randomness, and the enumerator that takes their place in proofs."""

import pytest
import torch
import torch.nn.functional as F

from hf_argen.generation import sampling

from ..helpers.enumerator import Enumerator, assert_same_distribution


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 9, 5), (3, 16, 4096), (4, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_categorical_draws_what_multinomial_draws(shape, masked):
    logits = torch.randn(shape) * 2
    if masked:
        logits = logits.masked_fill(logits < logits.median(dim=-1, keepdim=True).values, -torch.inf)
    probs = logits.softmax(dim=-1)
    for seed in range(20):
        expected = torch.multinomial(probs.view(-1, shape[-1]), 1, True, generator=seeded(seed))
        assert torch.equal(sampling.categorical(probs, seeded(seed)), expected.view(shape[:-1]))
        torch.manual_seed(seed)
        assert torch.equal(sampling.categorical(probs), expected.view(shape[:-1]))


def test_gumbel_softmax_draws_what_torch_draws():
    logits = torch.randn(2, 9, 5)
    torch.manual_seed(4)
    expected = F.gumbel_softmax(logits, tau=0.3)
    torch.manual_seed(4)
    assert torch.equal(sampling.gumbel_softmax(logits, 0.3), expected)
    assert torch.equal(sampling.gumbel_softmax(logits, 0.3, seeded(4)), expected)


def test_bernoulli_and_uniform_frequencies():
    """Within five standard deviations; certain outcomes are certain."""
    probs = torch.tensor([0.0, 0.1, 0.5, 1.0]).expand(20_000, 4)
    means = sampling.bernoulli(probs, seeded(0)).float().mean(dim=0)
    assert means[0] == 0 and means[3] == 1
    assert abs(means[1] - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    assert abs(means[2] - 0.5) < 5 * (0.25 / 20_000) ** 0.5
    drawn = sampling.uniform(4, 20_000, seeded(0), torch.device("cpu"))
    assert drawn.dtype == torch.int64
    counts = drawn.bincount(minlength=4)
    assert counts.shape == (4,)
    assert (counts - 5000).abs().max() < 5 * (20_000 * 3 / 16) ** 0.5


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gumbel", "uniform"])
def test_one_generator_per_row(name):
    """A row's draws come from its own generator alone."""
    probs = torch.rand(3, 4, 5).softmax(dim=-1)

    def draw(rows, generator):
        if name == "uniform":
            return sampling.uniform(1000, len(rows), generator, torch.device("cpu"))
        return getattr(sampling, name)(probs[rows], generator)

    together = draw([0, 1, 2], [seeded(s) for s in (5, 6, 7)])
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(draw([row], [seeded(seed)])[0], together[row])
        assert torch.equal(draw([row], seeded(seed))[0], together[row])


def test_rewinding():
    """Takes generators back to a snapshot; the global one is left alone."""
    probs = torch.full((2, 50), 0.02)
    for generator in (seeded(1), [seeded(1), seeded(2)]):
        state = sampling.snapshot(generator, torch.device("cpu"))
        first = sampling.gumbel(probs, generator)
        assert not torch.equal(sampling.gumbel(probs, generator), first)
        sampling.rewind(generator, state)
        assert torch.equal(sampling.gumbel(probs, generator), first)


def test_the_source_is_replaced_within_the_block_only():
    class First(sampling.TorchRandomness):
        def categorical(self, probs, generator):
            return torch.zeros(probs.shape[:-1], dtype=torch.long)

    probs = torch.tensor([[0.0, 1.0]])
    with sampling.randomness(First()):
        assert sampling.categorical(probs) == 0
    assert sampling.categorical(probs) == 1
    with pytest.raises(AttributeError), sampling.randomness(object()):
        sampling.categorical(probs)
    assert sampling.categorical(probs) == 1


# The enumerator itself


def test_enumerator_follows_every_branch():
    def run():
        """Two tosses; on heads a die of three sides, whose third side never comes up."""
        tosses = sampling.bernoulli(torch.tensor([0.25, 0.5])).tolist()
        if not all(tosses):
            return tosses.count(True)
        return "die", sampling.categorical(torch.tensor([[0.5, 0.5, 0.0]])).item()

    enumerator = Enumerator()
    expected = {0: 0.375, 1: 0.5, ("die", 0): 0.0625, ("die", 1): 0.0625}
    assert_same_distribution(enumerator.distribution(run), expected, 1e-9)
    assert enumerator.runs == 5


def test_enumerator_notices_what_it_does_not_control():
    def by_torch():
        return sampling.categorical(torch.rand(1, 3).softmax(dim=-1)).item()

    with pytest.raises(AssertionError):
        Enumerator().distribution(by_torch)
    with pytest.raises(AssertionError, match="chi-square"):
        Enumerator().distribution(lambda: sampling.gumbel(torch.zeros(1)).item())
    with pytest.raises(AssertionError, match="too large"):
        Enumerator(most_runs=5).distribution(lambda: sampling.bernoulli(torch.full((3,), 0.5)).sum().item())


def test_differing_distributions_are_told_apart():
    with pytest.raises(AssertionError, match=r"b: 0\.5 instead of 0\.4"):
        assert_same_distribution({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.4})
    with pytest.raises(AssertionError, match=r"b: None instead of 0\.5"):
        assert_same_distribution({"a": 1.0}, {"a": 1.0, "b": 0.5})
