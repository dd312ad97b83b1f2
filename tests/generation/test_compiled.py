"""
Compiled steps give what eager ones give, and are compiled once.

Most tests take the backend "eager": what has to be one graph, and which graphs there are, Dynamo decides before any back
end, and Inductor takes seconds for each. One test a family compares Inductor's numbers.
"""

import copy
import gc
import pickle

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig, GenerationConfig

import hf_argen
from hf_argen import (
    DraftModel,
    LlamaGenForImageGeneration,
    Masked,
    SpeculativeDecoding,
    StaticTree,
    VarForImageGeneration,
)
from hf_argen.generation.compilation import CompiledSteps

from ..helpers.language_models import language_model, prompts
from ..helpers.tiny import (
    spread,
    text_var_config,
    tiny_llamagen,
    tiny_mar,
    tiny_maskgit,
    tiny_rar,
    tiny_var,
    tokenizer_config,
)

EAGER = CompileConfig(backend="eager")
SHALLOW = {"num_hidden_layers": 1}  # Dynamo follows every layer


def small_var() -> VarForImageGeneration:
    """Of one layer and two scales: one graph."""
    return tiny_var(**SHALLOW, image_tokenizer_config=tokenizer_config(patch_nums=[1, 4]))


def shallow_llamagen() -> LlamaGenForImageGeneration:
    return tiny_llamagen(**SHALLOW)


def tree_of_a_draft_model() -> SpeculativeDecoding:
    return SpeculativeDecoding(
        DraftModel(shallow_llamagen()), tree=StaticTree([[0], [1], [0, 0]], draw=False)
    )


def chain_of_a_draft_model() -> SpeculativeDecoding:
    return SpeculativeDecoding(DraftModel(shallow_llamagen()))


# Name: the model, its decoding, and how many graphs a request takes of the model and of its drafter.
REQUESTS = {
    "next scale": (tiny_var, lambda: None, (2, 0)),
    "next token": (tiny_llamagen, lambda: None, (1, 0)),
    "next token, rar": (lambda: tiny_rar(**SHALLOW), lambda: None, (1, 0)),
    "masked": (lambda: tiny_mar(**SHALLOW, decoder_num_hidden_layers=1), lambda: Masked(num_steps=3), (3, 0)),
    "masked ids": (lambda: tiny_maskgit(**SHALLOW), lambda: Masked(num_steps=3), (3, 0)),
    "n-grams draft": (shallow_llamagen, SpeculativeDecoding, (1, 0)),
    "a model drafts a chain": (shallow_llamagen, chain_of_a_draft_model, (1, 2)),
    "a model drafts a tree": (shallow_llamagen, tree_of_a_draft_model, (1, 2)),
}


def draw(model, labels=(1, 2), **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return model.generate(list(labels), generator=generator, **options)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Ids are equal; latents agree as far as another order of additions lets them."""
    if expected.is_floating_point():
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(found, expected)


def graphs(model) -> int:
    return sum(len(steps._functions) for steps in model.__dict__.get("_compiled_steps", ()))


@pytest.mark.parametrize("name", REQUESTS)
def test_like_eager_and_compiled_once(name):
    """After the first picture nothing is compiled any more: not for other classes, strengths of guidance, or draws."""
    make, decoding, expected_graphs = REQUESTS[name]
    model, decoding = make(), decoding()
    is_masked = name.startswith("masked")
    greedy = {} if is_masked else {"do_sample": False}
    sampled = {"do_sample": True, "temperature": 0.8, **({} if is_masked else {"top_k": 8})}
    others = [
        {"labels": (1, 2), "guidance_scale": 2.0, **greedy},
        {"labels": (3, 0), "guidance_scale": 1.6, **greedy},
        {"labels": (4, 4), "guidance_scale": 2.0, **sampled},
    ]
    expected = [draw(model, **one, decoding=decoding) for one in others]
    assert_same(draw(model, **others[0], decoding=decoding, compile_config=EAGER), expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for one, other in zip(others, expected, strict=True):
            assert_same(draw(model, **one, decoding=decoding, compile_config=EAGER), other)
    drafter = decoding.drafter.model if name.startswith("a model") else None
    assert (graphs(model), graphs(drafter) if drafter else 0) == expected_graphs


def test_without_guidance_and_from_a_caption():
    """Other shapes have other graphs, beside those that are there."""
    torch.manual_seed(0)
    model = small_var()
    for labels in ((1,), (1, 2), (1,)):
        assert torch.equal(draw(model, labels, compile_config=EAGER), draw(model, labels))
    assert graphs(model) == 2
    config = text_var_config(30)
    config.num_hidden_layers = 1
    text = spread(VarForImageGeneration(config))
    embeds = torch.randn(1, text.config.text_embed_dim)
    expected = text.generate(prompt_embeds=embeds, guidance_scale=1.5, do_sample=False)
    options = {"guidance_scale": 1.5, "do_sample": False, "compile_config": EAGER}
    assert torch.equal(text.generate(prompt_embeds=embeds, **options), expected)


def test_padded_captions_of_llamagen():
    """What hides padding is an input of the graph."""
    sizes = {"condition_type": "text", "text_embed_dim": 12, "max_prompt_tokens": 4}
    model = tiny_llamagen(**sizes, **SHALLOW)
    embeds = torch.randn(2, 4, 12)
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    inputs = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "do_sample": False}
    expected = model.generate(**inputs, guidance_scale=2.0)
    assert torch.equal(model.generate(**inputs, guidance_scale=2.0, compile_config=EAGER), expected)


def test_parts_of_a_picture_are_kept():
    model = tiny_var(**SHALLOW)
    source = torch.randint(16, (1, 21))
    inputs = {"input_ids": source, "keep_mask": torch.tensor([[1.0, 0, 0, 1]] * 4), "do_sample": False}
    expected = model.generate([1], **inputs, return_dict_in_generate=True)
    found = model.generate([1], **inputs, return_dict_in_generate=True, compile_config=EAGER)
    torch.testing.assert_close(found.images, expected.images)
    assert torch.equal(found.sequences, expected.sequences)


# Inductor: what compiles where nothing else is asked for


@pytest.fixture
def one_process():
    """Inductor compiles in this process; those that it starts otherwise take longer than such graphs do."""
    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "make, decoding, options",
    [
        (small_var, lambda: None, {"do_sample": False}),
        (shallow_llamagen, lambda: None, {"do_sample": False, "max_new_tokens": 8}),
        (shallow_llamagen, chain_of_a_draft_model, {"do_sample": False, "max_new_tokens": 8}),
        (
            lambda: tiny_mar(**SHALLOW, decoder_num_hidden_layers=1),
            lambda: Masked(num_steps=1),
            {},
        ),
    ],
    ids=["var", "llamagen", "drafter", "mar"],
)
def test_inductor(make, decoding, options):
    """The tokens of eager decoding, in float32; and no step copies the cache that it writes to."""
    model, decoding = make(), decoding()
    options = {"guidance_scale": 2.0, "decoding": decoding, **options}
    expected = draw(model, **options)
    with torch._inductor.config.patch(fx_graph_cache=False):
        found, codes = run_and_get_code(draw, model, **options, compile_config=CompileConfig())
    assert_same(found, expected)
    assert graphs(model) == 1
    gc.collect()
    lent = [cache for steps in model._compiled_steps for caches in steps._caches.values() for cache in caches]
    assert codes and len(lent) == (0 if "mar" in type(model).__name__.lower() else 1)
    for cache in lent:
        shape = tuple(cache.layers[0].keys.shape)
        assert not any(f"empty_strided_cpu({shape}" in code for code in codes)


# What stays with a model


def test_configurations():
    """From `generation_config`, of the call or the model; `disable_compile` wins; another configuration compiles anew."""
    model = small_var()
    expected = draw(model)
    given = GenerationConfig(compile_config=CompileConfig(backend="eager"))
    assert torch.equal(draw(model, generation_config=given), expected) and graphs(model) == 1
    draw(model, compile_config=EAGER, disable_compile=True, num_return_sequences=2)
    assert graphs(model) == 1
    model.generation_config.compile_config = CompileConfig(backend="aot_eager")
    assert torch.equal(draw(model), expected) and graphs(model) == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        draw(model)


def test_copies_compile_for_themselves():
    """Graphs are of the weights of one model; a copy, and what is loaded from a file, have none."""
    model = small_var()
    draw(model, compile_config=EAGER)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert graphs(other) == 0
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.mul_(0.5)
        assert torch.equal(draw(other, compile_config=EAGER), draw(other))


def test_trained_weights_are_seen():
    model = shallow_llamagen()
    before = draw(model, do_sample=False, compile_config=EAGER)
    spread(model)
    expected = draw(model, do_sample=False)
    assert not torch.equal(before, expected)
    assert torch.equal(draw(model, do_sample=False, compile_config=EAGER), expected)


def test_caches_come_back():
    """Memory stays where it is from request to request, is lent to one at a time, and comes back clean."""
    steps = CompiledSteps(EAGER)

    class Borrower:
        pass

    def lend(borrower):
        return steps.lend_cache(borrower, 2, 3, 8, torch.float32, torch.device("cpu"))

    first, second = Borrower(), Borrower()
    cache, other = lend(first), lend(second)
    assert cache is not other
    states = torch.full((3, 2, 8, 4), torch.nan)
    for layer in range(2):
        cache.update(states, states, layer)
    cache.show_whole()
    address = cache.layers[0].keys.data_ptr()
    del first
    gc.collect()
    again = lend(Borrower())
    assert again is cache and again.layers[0].keys.data_ptr() == address
    assert again.get_seq_length() == 0 and not again.layers[0].whole
    assert not again.layers[1].values.any()


# What is refused


@pytest.mark.parametrize(
    "config, match",
    [
        ({"backend": "eager"}, r"compile_config is a dict; give a CompileConfig of transformers"),
        (True, r"compile_config is a bool; give a CompileConfig of transformers"),
        (CompileConfig(dynamic=True), r"compile_config has dynamic=True, but steps are compiled for static"),
        (CompileConfig(backend="no such"), r"compile_config is refused by torch.compile: .*no such"),
        (CompileConfig(mode="fastest"), r"compile_config is refused by torch.compile: .*fastest"),
        (CompileConfig(options={"no such": 1}), r"compile_config is refused by torch.compile: .*no such"),
    ],
)
def test_configurations_that_are_none(config, match):
    with pytest.raises(ValueError, match=match):
        tiny_var().generate([1], compile_config=config)


def test_decodings_and_models_that_are_not_compiled():
    able = "diffusion_step_annealing, masked, next_scale, next_token, speculative_decoding"
    match = rf"compile_config: steps of 'speculative_jacobi' are not compiled, but those of {able} are; leave"
    with pytest.raises(ValueError, match=match):
        tiny_llamagen().generate([1], decoding="speculative_jacobi", compile_config=EAGER)
    with pytest.raises(
        ValueError, match=r"steps of this LlamaGen\w+ are not compiled, SoftCFG weighs the past"
    ):
        tiny_llamagen().generate([1], guidance_scale=2.0, guidance_schedule="soft_cfg", compile_config=EAGER)
    with pytest.raises(ValueError, match=r"not compiled, a causal model has a longer past at every step"):
        tiny_mar(causal=True).generate([1], compile_config=EAGER)
    spread_out = tiny_var()
    spread_out.hf_device_map = {"model": 0, "head": "cpu"}
    with pytest.raises(ValueError, match=r"not compiled, it is spread over several devices; leave it out"):
        spread_out.generate([1], compile_config=EAGER)
    with pytest.raises(ValueError, match="Decodings of hf_argen do not support compile_config"):
        hf_argen.generate(language_model(), "next_token", **prompts(), compile_config=EAGER)
