"""The shared test base on the decodings of this corridor, and the distribution of next-scale sampling."""

import itertools

import pytest
import torch

from hf_argen import (
    Chain,
    CodeConfig,
    CodeForImageGeneration,
    CollaborativeNextScale,
    ContinuousSpeculative,
    DiffusionStepAnnealing,
    GroupedSpeculative,
    Masked,
    MaximalCouplingJacobi,
    NextScale,
    NextToken,
    RelaxedAcceptance,
    SpeculativeDecoding,
    SpeculativeJacobi,
    StaticTree,
)
from hf_argen.generation.decoding import Guarantee

from ..helpers.enumerator import Enumerator, assert_same_distribution
from ..helpers.tiny import (
    spread,
    tiny_mar,
    tiny_maskgit,
    tiny_next_token,
    tiny_var,
    tokenizer_config,
    var_config,
)
from .decoding_base import DecodingTests

REFINER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def three_codes():
    """Two scales, 1x1 and 1x2, and three codes: 27 pictures in all."""
    return tokenizer_config(codebook_size=3, patch_nums=[1, [1, 2]])


def tiny_code(**changes):
    config = var_config(**changes).to_dict()
    del config["model_type"]
    return spread(CodeForImageGeneration(CodeConfig(**config, refiner_config=REFINER)))


class TestNextScale(DecodingTests):
    decoding_class = NextScale
    options = {"smooth": True, "top_k": [5, 4, 3], "temperature": [1.1, 1.0, 0.9], "edit_mode": "features"}
    plain = "next_scale"

    def make_model(self):
        return tiny_var()

    def make_smallest_model(self):
        return tiny_var(image_tokenizer_config=three_codes())


class TestCollaborativeNextScale(DecodingTests):
    decoding_class = CollaborativeNextScale
    options = {"draft_scales": 2, "top_k": [5, 4, 3], "refiner": "folder"}
    plain = "next_scale"

    def make_model(self):
        return tiny_code()


class NextTokenModels:
    """The models of the decodings of next-token models."""

    family = "llamagen"
    plain = "next_token"

    def make_model(self):
        return tiny_next_token(self.family)

    def make_smallest_model(self):
        """Three tokens of three codes: 27 pictures in all."""
        return tiny_next_token(self.family, codes=3, grid=(1, 3))


class TestNextToken(NextTokenModels, DecodingTests):
    decoding_class = NextToken
    options = {}


class TestSpeculativeJacobi(NextTokenModels, DecodingTests):
    decoding_class = SpeculativeJacobi
    options = {"window": 4, "initialization": "horizontal", "give_up_below": 1.5}

    def make_decoding(self):
        return self.decoding_class(window=2)


class TestMaximalCouplingJacobi(TestSpeculativeJacobi):
    decoding_class = MaximalCouplingJacobi


class TestGroupedSpeculative(TestSpeculativeJacobi):
    decoding_class = GroupedSpeculative
    options = {"window": 4, "group_size": 5, "max_probability_gap": 0.5, "max_distance": 2.0}


class TestRelaxedAcceptance(NextTokenModels, DecodingTests):
    decoding_class = RelaxedAcceptance
    options = {
        "drafter": "folder",
        "draft_length": 3,
        "k": 5,
        "delta": 0.5,
        "factor": 2.0,
        "neighbours": "table.npy",
    }

    def make_decoding(self):
        torch.manual_seed(4)
        return RelaxedAcceptance(tiny_next_token(self.family, hidden_size=16, num_hidden_layers=1))


class TestSpeculativeDecoding(NextTokenModels, DecodingTests):
    decoding_class = SpeculativeDecoding
    options = {
        "drafter": {"type": "ngram", "longest": 2},
        "tree": {"type": "static_tree", "choices": [[0], [1], [0, 0]]},
        "acceptance": {"type": "exact_match"},
        "give_up_below": 1.5,
    }

    def make_decoding(self):
        torch.manual_seed(4)
        drafter = tiny_next_token(self.family, hidden_size=16, num_hidden_layers=1)
        return SpeculativeDecoding(drafter, StaticTree([[0], [1], [0, 0]]))

    def test_distribution_is_the_plain_one(self):
        """Drafted by a copy, and by another model of as few codes."""
        for drafter in (None, tiny_next_token(self.family, 3, (1, 3), hidden_size=16, num_hidden_layers=1)):
            self.make_decoding = lambda drafter=drafter: SpeculativeDecoding(drafter, Chain(1))
            super().test_distribution_is_the_plain_one()


class TestNextTokenOfRar(TestNextToken):
    family = "rar"


class TestSpeculativeJacobiOfRar(TestSpeculativeJacobi):
    family = "rar"


class TestMaximalCouplingJacobiOfRar(TestMaximalCouplingJacobi):
    family = "rar"


class TestGroupedSpeculativeOfRar(TestGroupedSpeculative):
    family = "rar"


class TestSpeculativeDecodingOfRar(TestSpeculativeDecoding):
    family = "rar"


class TestRelaxedAcceptanceOfRar(TestRelaxedAcceptance):
    family = "rar"


class TestMasked(DecodingTests):
    decoding_class = Masked
    options = {"num_steps": 8, "order": "raster", "schedule": "linear"}
    plain = "masked"

    def make_model(self):
        return tiny_mar()

    def test_distribution_is_the_plain_one(self):
        """Proved in test_masked.py, on a head of two values."""
        assert self.decoding_class.type_name() == self.plain


class TestMaskedOfIds(TestMasked):
    """Its distribution is proved in test_masked_ids.py."""

    options = {
        "num_steps": 4,
        "order": "confidence",
        "schedule": "arccos",
        "randomize_temperature": 2.0,
        "softmax_temperature_annealing": True,
    }

    def make_model(self):
        return tiny_maskgit()


class TestDiffusionStepAnnealing(DecodingTests):
    decoding_class = DiffusionStepAnnealing
    options = {
        "num_steps": 8,
        "order": "raster",
        "schedule": "linear",
        "most_head_steps": 20,
        "least_head_steps": 2,
        "annealing": "cosine",
    }
    plain = "masked"

    def make_model(self):
        return tiny_mar()

    def make_decoding(self):
        return DiffusionStepAnnealing(num_steps=3, most_head_steps=4, least_head_steps=2)


class TestContinuousSpeculative(TestMasked):
    """Its distribution is proved in test_continuous_speculative.py, on heads known in closed form."""

    decoding_class = ContinuousSpeculative
    options = {
        "num_steps": 8,
        "order": "raster",
        "schedule": "linear",
        "drafter": "folder",
        "draft_length": 3,
        "prefill": 0.1,
        "tested_steps": 2,
        "acceptance_temperature": 42.0,
        "max_trials": 100,
        "give_up_below": 1.5,
    }

    def make_decoding(self):
        torch.manual_seed(4)
        drafter = tiny_mar(hidden_size=16, num_hidden_layers=1, intermediate_size=32)
        return ContinuousSpeculative(drafter=drafter, max_trials=10)

    def test_distribution_is_the_plain_one(self):
        assert self.decoding_class.guarantee is Guarantee.EXACT_IN_DISTRIBUTION


# The distribution of next-scale sampling is the product of the model's guided probabilities.

OPTIONS = {
    "plain": {},
    "guidance": {"guidance_scale": 2.0},
    "temperature": {"guidance_scale": 2.0, "temperature": 0.6},
    "top_k": {"guidance_scale": 1.0, "top_k": 2},
    "top_p": {"guidance_scale": 1.0, "top_p": 0.8},
    "all": {"guidance_scale": 1.5, "temperature": 1.7, "top_k": 2, "top_p": 0.75},
}


def warped(logits: list[float], temperature=1.0, top_k=0, top_p=1.0) -> list[float]:
    """Probabilities of one token, by the definition of each option."""
    scores = [logit / temperature for logit in logits]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = order[:top_k] if top_k else order
    weights = {i: torch.tensor(scores[i], dtype=torch.double).exp().item() for i in kept}
    total = sum(weights.values())
    nucleus, mass = [], 0.0
    for i in kept:  # the fewest of the likeliest that hold at least `top_p`
        nucleus.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(scores))]


@torch.no_grad()
def by_brute_force(
    model, label: int, drawn_scales=(0, 1), guidance_scale=0.0, **options
) -> dict[tuple[int, ...], float]:
    """
    Probability of every picture, from teacher-forced passes over all of them; with `drawn_scales`, of these scales
    given those before them.
    """
    vocab, tokens = model.config.vocab_size, sum(model.config.scale_lengths)
    pictures = torch.tensor(list(itertools.product(range(vocab), repeat=tokens)))
    conditional, unconditional = (
        model(input_ids=pictures, class_labels=torch.full((len(pictures),), name)).logits.double()
        for name in (label, -1)
    )
    last = len(model.config.patch_nums) - 1
    scales = [step for step, length in enumerate(model.config.scale_lengths) for _ in range(length)]
    strength = guidance_scale * torch.tensor(scales).view(1, -1, 1) / last
    logits = (1 + strength) * conditional - strength * unconditional
    probabilities = {}
    for picture, rows in zip(pictures.tolist(), logits.tolist(), strict=True):
        probability = 1.0
        for token, row, scale in zip(picture, rows, scales, strict=True):
            if scale in drawn_scales:
                probability *= warped(row, **options)[token]
        probabilities[tuple(picture)] = probability
    return probabilities


@pytest.mark.parametrize("name", OPTIONS)
def test_next_scale_samples_the_guided_model(name):
    torch.manual_seed(10)
    model = tiny_var(image_tokenizer_config=three_codes())
    enumerator = Enumerator()

    def run():
        ids = model.generate([2], do_sample=True, **OPTIONS[name])
        return tuple(ids[0].tolist())

    found = enumerator.distribution(run)
    expected = by_brute_force(model, 2, **OPTIONS[name])
    assert_same_distribution(found, expected)
    assert len(found) == enumerator.runs == sum(weight > 0 for weight in expected.values())
    assert (len(found) == 27) == (name in ("plain", "guidance", "temperature"))
    uniform = dict.fromkeys(expected, 1 / 27)
    with pytest.raises(AssertionError):
        assert_same_distribution(found, uniform, tolerance=0.02)


@pytest.mark.parametrize("name, codes", [("guidance", 2), ("all", 3)])
def test_rows_of_a_batch_are_independent(name, codes):
    """The joint distribution of two rows is the product of theirs, also where one has fewer possible pictures."""
    torch.manual_seed(10)
    model = tiny_var(image_tokenizer_config=tokenizer_config(codebook_size=codes, patch_nums=[1, [1, 2]]))

    def run():
        ids = model.generate([0, 3], do_sample=True, **OPTIONS[name])
        return tuple(map(tuple, ids.tolist()))

    first, second = (
        {ids: weight for ids, weight in by_brute_force(model, label, **OPTIONS[name]).items() if weight > 0}
        for label in (0, 3)
    )
    assert (len(first) != len(second)) == (name == "all")
    expected = {(a, b): p * q for a, p in first.items() for b, q in second.items()}
    assert_same_distribution(Enumerator().distribution(run), expected)


@pytest.mark.parametrize("name", ["guidance", "all"])
def test_code_samples_the_drafter_then_the_refiner(name):
    """Its bound: the first `draft_scales` scales follow the large model exactly, the others the small one given them."""
    torch.manual_seed(3)
    model = tiny_code(image_tokenizer_config=three_codes(), condition_dropout=0.0)

    def run(decoding):
        ids = model.generate([2], do_sample=True, decoding=decoding, **OPTIONS[name])
        return tuple(ids[0].tolist())

    found = Enumerator().distribution(lambda: run(CollaborativeNextScale(draft_scales=1)))
    drafted = by_brute_force(model, 2, drawn_scales=(0,), **OPTIONS[name])
    refined = by_brute_force(model.refiner, 2, drawn_scales=(1,), **OPTIONS[name])
    expected = {picture: drafted[picture] * refined[picture] for picture in drafted}
    assert_same_distribution(found, expected)
    with pytest.raises(AssertionError):
        assert_same_distribution(found, Enumerator().distribution(lambda: run("next_scale")), tolerance=0.01)


def test_drawn_classes_are_uniform():
    torch.manual_seed(3)
    model = tiny_var(image_tokenizer_config=three_codes())

    def run():
        output = model.generate(num_return_sequences=2, do_sample=False, return_dict_in_generate=True)
        return tuple(output.class_labels.tolist())

    pairs = itertools.product(range(5), repeat=2)
    assert_same_distribution(Enumerator().distribution(run), dict.fromkeys(pairs, 1 / 25))
