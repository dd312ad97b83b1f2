"""Models, decodings and tokenizers with kernels in place of the references give what they give without."""

from collections import Counter
from unittest import mock

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_argen import (
    Chain,
    DraftModel,
    DynamicTree,
    IndependentSequences,
    NextScale,
    NextToken,
    SpeculativeDecoding,
    SpeculativeJacobi,
    StaticTree,
    generate,
)
from hf_argen.generation import sampling
from hf_argen.generation.decoding import DecodingResult
from hf_argen.generation.decoding.speculative.acceptance import Walk
from hf_argen.generation.warping import fusible, warped
from hf_argen.kernels import tree_attention, use
from hf_argen.modeling.layers import attention

from ..helpers.enumerator import Enumerator, assert_same_distribution
from ..helpers.language_models import PAD, language_model, prompts
from ..helpers.table_model import TableModel, distribution, run
from ..helpers.tiny import NEXT_TOKEN_FAMILIES, tiny_llamagen, tiny_var
from .kernel_base import Recorder, guarded_memory

MODELS = {"var": tiny_var, **{name: make for name, (make, _) in NEXT_TOKEN_FAMILIES.items()}}
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 12, "top_p": 0.9}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_pictures(family):
    """The same tokens, drawn with guidance in one pass a step; the operations that the family needs run, and no others."""
    model = MODELS[family]()
    # The interpreter is slow, and one token is drawn like the other.
    options = SAMPLING if family == "var" else {**SAMPLING, "max_new_tokens": 5}
    if family == "rar":
        options["guidance_schedule"] = [0.0, 1.0, 0.5, 2.0] * 4

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return model.generate(torch.tensor([1]), guidance_scale=2.0, generator=generator, **options)

    expected = draw()
    with use("triton"), guarded_memory(), Recorder() as recorder:
        assert torch.equal(draw(), expected)
    used = Counter(str(operation).split(".")[1] for operation, _, _ in recorder.calls)
    assert set(used) == {"adaln", "qk_norm_rope_cached", "sample_logits"}
    assert used["sample_logits"] == (len(model.config.grid_sizes) if family == "var" else 5)


def passes_of_draws(recorder: Recorder) -> list[bool]:
    """For each call of the operation that draws whether it guides, too."""
    calls = [arguments for operation, arguments, _ in recorder.calls if "sample_logits" in str(operation)]
    return [unconditional is not None for _, noise, unconditional, *_ in calls if noise is not None]


@torch.no_grad()
def test_language_models_are_guided_as_they_are_drawn():
    """Rows that end at different places; guidance of log probabilities is that of logits."""
    model = language_model()
    options = {"guidance_scale": 1.7, "do_sample": True, "top_k": 12, "temperature": 0.9, "max_new_tokens": 6}

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(4)
        return generate(model, "next_token", **prompts(), **options, generator=generator)

    expected = draw()
    assert (expected[:, -1] == PAD).any() and not (expected[:, -1] == PAD).all()
    with use("triton"), Recorder() as recorder:
        assert torch.equal(draw(), expected)
    assert passes_of_draws(recorder) == [True] * 6


class Forbidden:
    """A logits processor that no kernel knows."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(-1, torch.tensor([0]), -torch.inf)


UNFUSED = {
    "processor": {"logits_processor": [Forbidden()]},
    "logits": {"return_dict_in_generate": True, "output_logits": True},
    "greedy": {"do_sample": False},
    "soft_cfg": {"guidance_schedule": "soft_cfg"},
    "temperatures": {"decoding": NextScale(temperature=[0.5, 1.0, 1.5])},
    "smooth": {"decoding": NextScale(smooth=True)},
}


@pytest.mark.parametrize(
    "family, kind, guides",
    [
        ("llamagen", "processor", [False] * 3),
        ("llamagen", "logits", [False] * 3),
        ("llamagen", "greedy", []),
        ("llamagen", "soft_cfg", [True] * 3),  # the draw is plain
        ("var", "processor", []),
        ("var", "logits", []),
        ("var", "greedy", []),
        ("var", "temperatures", []),
        ("var", "smooth", []),
    ],
)
@torch.no_grad()
def test_what_is_not_drawn_in_one_pass(family, kind, guides):
    """Guided logits that something else reads are there for it; the tokens are the same."""
    model = MODELS[family](num_hidden_layers=1)
    options = {
        **SAMPLING,
        **UNFUSED[kind],
        "guidance_scale": 2.0,
        "max_new_tokens": 5 if family == "var" else 3,
    }

    def draw():
        return model.generate([1], generator=torch.Generator().manual_seed(0), **options)

    expected = draw()
    with use("triton"), Recorder() as recorder:
        found = draw()
    if kind == "logits":
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)
    assert passes_of_draws(recorder) == guides


@torch.no_grad()
def test_a_scale_that_is_sampled_otherwise():
    """A subclass of ours gets guided logits on every device."""

    class Worst(NextScale):
        def sample(self, predictor, request, trace, logits):
            ids = self.process(request, trace, logits, predictor.step).argmin(dim=-1)
            return ids, predictor.quantizer.embed(ids)

    model = tiny_var(num_hidden_layers=1)
    options = {"do_sample": True, "guidance_scale": 2.0, "decoding": Worst(), "max_new_tokens": 5}
    expected = model.generate([1], **options)
    with use("triton"):
        assert torch.equal(model.generate([1], **options), expected)
    Worst.__abstractmethods__ = frozenset(["run"])  # no decoding for other tests


@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_damaged_weights_are_met_in_one_pass(family):
    model = MODELS[family](num_hidden_layers=1)
    with torch.no_grad():
        list(model.model.layers.parameters())[-1].view(-1)[0] = torch.nan
    match = "produced NaN or infinite logits; its weights are damaged"
    with use("triton"), pytest.raises(ValueError, match=match):
        model.generate([1, 2], guidance_scale=2.0, max_new_tokens=5, **SAMPLING)


@pytest.mark.parametrize("family", MODELS)
def test_training(family):
    """The same loss and gradients."""
    model = MODELS[family]()
    ids = torch.randint(16, (1, 21 if family == "var" else 16))
    losses, gradients = {}, {}
    for kind in ("reference", "triton"):
        with use(kind):
            model.zero_grad()
            loss = model(input_ids=ids, class_labels=torch.tensor([2]), labels=ids).loss
            loss.backward()
        losses[kind] = loss
        gradients[kind] = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    torch.testing.assert_close(losses["triton"], losses["reference"], rtol=1e-5, atol=1e-6)
    assert gradients["triton"].keys() == gradients["reference"].keys()
    for name, found in gradients["triton"].items():
        torch.testing.assert_close(found, gradients["reference"][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_encoding(family):
    """The same ids of a picture."""
    tokenizer = MODELS[family]().image_tokenizer
    pixels = torch.rand(2, 3, *((16, 16) if family == "var" else (8, 8))) * 2 - 1
    expected = tokenizer.encode(pixels)
    with use("triton"), guarded_memory(), Recorder() as recorder:
        assert torch.equal(tokenizer.encode(pixels), expected)
    assert {str(operation).split(".")[1] for operation, _, _ in recorder.calls} == {"nearest_codes"}


def test_warpers_that_one_pass_can_do():
    temperature, top_k, top_p = TemperatureLogitsWarper(0.5), TopKLogitsWarper(4), TopPLogitsWarper(0.9)
    assert fusible([temperature, top_k, top_p]) == {"temperature": 0.5, "top_k": 4, "top_p": 0.9}
    assert fusible([top_p, top_k]) == {"top_p": 0.9}
    assert fusible([temperature, temperature]) == {"temperature": 0.5}
    assert fusible([TopPLogitsWarper(0.9, min_tokens_to_keep=2)]) == {}
    assert fusible([TopKLogitsWarper(3, filter_value=-1e9)]) == {}
    assert fusible([lambda ids, scores: scores, top_k]) == {}


@pytest.mark.parametrize("order", ["usual", "reversed", "twice"])
def test_warpers_in_any_order(order):
    processors = [
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(30),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.05),
    ]
    processors = {"usual": processors, "reversed": processors[::-1], "twice": processors * 2}[order]
    scores, ids = torch.randn(3, 101) * 3, torch.zeros(3, 0).long()
    expected = warped(processors, scores, ids)
    with use("triton"):
        assert torch.equal(warped(processors, scores, ids), expected)


DRAFTS = {
    "chain": Chain(3),
    "without replacement": StaticTree([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 1, 0]]),
    "the best": StaticTree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]], draw=False),
    "dynamic": DynamicTree(total_token=6, depth=2, top_k=2),
}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", DRAFTS)
def test_drafts_are_verified(name, do_sample, monkeypatch):
    """The same tokens, rows of unequal length included, from the same numbers."""
    # On a GPU a walk down a tree looks up nothing, so it draws for every candidate.
    monkeypatch.setattr(Walk, "nobody", lambda self, who: False)
    model, drafter = TableModel(6, 0), TableModel(6, 1)
    decoding = SpeculativeDecoding(DraftModel(drafter), DRAFTS[name])

    def draw(seed: int) -> DecodingResult:
        torch.manual_seed(seed)
        return run(decoding, model, [[0, 1], [2, 1], [5, 3]], 9, do_sample, [TopKLogitsWarper(4)])

    for seed in range(3 if do_sample else 1):
        expected = draw(seed)
        with use("triton"), guarded_memory(), Recorder() as recorder:
            found = draw(seed)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.details["accept_lengths"], expected.details["accept_lengths"])
        called = [str(operation).split(".")[1] for operation, _, _ in recorder.calls]
        assert called.count("verify_draft") >= found.details["accept_lengths"].shape[1] - 1


TREES = {
    "window": lambda make: SpeculativeJacobi(window=4),
    "tree": lambda make: SpeculativeDecoding(
        make(num_hidden_layers=1), StaticTree([[0], [1], [0, 0]], draw=False)
    ),
    "static": lambda make: None,
}


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("family", NEXT_TOKEN_FAMILIES)
@torch.no_grad()
def test_attention_to_trees(family, kind):
    """
    A Jacobi window, trees of drafts in rows of unequal length, and a memory whose empty places no one sees: with the kernel,
    and with its reference where the model asks for `tree_attention`, the tokens of sdpa.
    """
    make, _ = NEXT_TOKEN_FAMILIES[family]
    model = make(num_hidden_layers=1)
    options = {"guidance_scale": 2.0, "do_sample": False, "max_new_tokens": 6, "decoding": TREES[kind](make)}
    if kind == "static":
        options["cache_implementation"] = "static"
    expected = model.generate([1, 2], **options)
    # This operation runs as a kernel, and no other.
    with mock.patch.object(tree_attention, "runs_kernel", return_value=True), Recorder() as recorder:
        assert torch.equal(model.generate([1, 2], **options), expected)
    assert {str(operation).split(".")[1] for operation, _, _ in recorder.calls} == {"tree_attention"}
    model.set_attn_implementation("tree_attention")
    with mock.patch.object(attention, "tree_attention", wraps=attention.tree_attention) as called:
        assert torch.equal(model.generate([1, 2], **options), expected)
    assert called.call_count


@torch.no_grad()
def test_a_picture_that_is_drafted():
    """All kernels together."""
    model, drafter = tiny_llamagen(num_hidden_layers=1), tiny_llamagen(num_hidden_layers=1)
    options = {"decoding": SpeculativeDecoding(drafter), "do_sample": False, "max_new_tokens": 4}
    expected = model.generate([1], **options)
    with use("triton"), Recorder() as recorder:
        assert torch.equal(model.generate([1], **options), expected)
    used = {str(operation).split(".")[1] for operation, _, _ in recorder.calls}
    assert used == {"adaln", "qk_norm_rope_cached", "tree_attention", "verify_draft"}


def test_padding_is_hidden_from_trees():
    """Captions of unequal length, of which the null condition has the same padding."""
    model = tiny_llamagen(condition_type="text", text_embed_dim=12, max_prompt_tokens=4, num_hidden_layers=1)
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    inputs = {"prompt_embeds": torch.randn(2, 4, 12), "prompt_attention_mask": mask, "max_new_tokens": 4}
    expected = model.generate(**inputs, guidance_scale=2.0, do_sample=False)
    model.set_attn_implementation("tree_attention")
    assert torch.equal(model.generate(**inputs, guidance_scale=2.0, do_sample=False), expected)


def test_drafts_that_the_kernel_does_not_try():
    """Sequences that share no prefix may come twice; the walk verifies them, and a test that enumerates every branch is asked."""
    model, drafter = TableModel(3, 0), TableModel(3, 1)
    decoding = SpeculativeDecoding(DraftModel(drafter), IndependentSequences(2, 1))
    with use("triton"), Recorder() as recorder:
        run(decoding, model, [[0, 1]], 3)
        assert "verify_draft" not in {str(operation).split(".")[1] for operation, _, _ in recorder.calls}
        chain = SpeculativeDecoding(DraftModel(drafter), Chain(1))
        found = distribution(chain, model, [[0, 1]], 2)
    assert_same_distribution(found, distribution(NextToken(), model, [[0, 1]], 2))


def test_draws_follow_the_generators():
    """One draw for each row from its own generator, and what a test puts in the place of randomness is asked."""
    scores = torch.randn(3, 2, 50).masked_fill(torch.rand(3, 2, 50) < 0.3, -torch.inf)

    def draw() -> torch.Tensor:
        return sampling.draw(scores, [torch.Generator().manual_seed(seed) for seed in range(3)])

    expected = draw()
    with use("triton"):
        assert torch.equal(draw(), expected)
        followed = Enumerator().distribution(lambda: int(sampling.draw(torch.zeros(1, 1, 2))))
    assert followed == {0: 0.5, 1: 0.5}
