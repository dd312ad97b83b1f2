"""Masked generation against what MAR's code computed, and its own rules."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from hf_argen import DiffusionStepAnnealing, Masked, compatible_decodings
from hf_argen.generation import sampling
from hf_argen.generation.guidance import Guidance
from hf_argen.generation.predictors.masked import MaskedPredictor
from hf_argen.generation.schedules import MASK_SCHEDULES, hidden_after_steps
from hf_argen.modeling.heads.noise_schedule import noise_schedule

from ..helpers.enumerator import Enumerator, assert_same_distribution
from ..helpers.goldens import assert_close, assert_same_image, golden
from ..helpers.tiny import SMALL_HEADS, tiny_mar

RUNS = [("mar_tiny", name) for name in ("gen_a", "gen_b", "gen_c", "gen_d")]
RUNS += [("mar_tiny_patch2", name) for name in ("gen_a", "gen_b")]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models():
    """The converted model of each case, with the autoencoder that drew its pictures."""
    autoencoder = golden("mar", "kl16_vae_tiny")
    found = {}
    for name in ("mar_tiny", "mar_tiny_patch2"):
        case = golden("mar", name)
        model = case.convert()
        model.image_tokenizer = autoencoder.convert(family="kl_vae")
        found[name] = case, model
    return found


def drawn(case, model, run, **changes):
    """A recorded run, with the authors' seeds."""
    torch.manual_seed(run["seed"])
    np.random.seed(run["seed"])
    labels = [-1] * run["bsz"] if run["labels"] is None else run["labels"]
    options = {
        "guidance_scale": run["cfg"],
        "guidance_schedule": run["cfg_schedule"],
        "temperature": run["temperature"],
        "decoding": Masked(num_steps=run["num_iter"], order="numpy"),
        "return_dict_in_generate": True,
    }
    return model.generate(labels, **{**options, **changes})


def run_of(case, name):
    return next(run for run in case.case["runs"] if run["name"] == name)


@pytest.mark.parametrize("name, run_name", RUNS)
def test_the_authors_seeds_give_their_latents(models, name, run_name):
    case, model = models[name]
    run, tensors = run_of(case, run_name), case.tensors
    output = drawn(case, model, run)
    assert torch.equal(output.orders.flip(1), tensors[f"{run_name}.orders"])
    latents = output.sequences.transpose(1, 2).unflatten(2, model.config.latent_grid)
    expected = tensors[f"{run_name}.tokens"]
    if run_name == "gen_c":
        check_but_for_one_token(case, model, run, latents, expected)
        return
    assert_close(latents, expected, TOLERANCE)
    if f"{run_name}.image" in tensors:
        assert_same_image(output.images * 2 - 1, tensors[f"{run_name}.image"].clamp(-1, 1))
    assert output.steps == output.forward_calls == run["num_iter"]
    assert output.head_calls / output.steps == {"mar_tiny": 100, "mar_tiny_patch2": 25}[name]


def check_but_for_one_token(case, model, run, latents, expected):
    """
    One of the 39 tokens of this run's last step is off in the record itself: the authors' float32 arithmetic depends on the
    processor, and the first step back multiplies its rounding by several hundred. There ours is what float64 gives.
    """
    limit = TOLERANCE * expected.abs().max()
    off = ((latents - expected).abs() > limit).any(dim=1)
    assert off.sum() == 1
    exact = exact_last_step(case, model, run)
    last = case.tensors["gen_c.mask_to_pred"][-1].bool()
    found = latents.flatten(2).transpose(1, 2)[last]
    recorded = expected.flatten(2).transpose(1, 2)[last]
    is_off = off.flatten(1)[last]
    assert (found - exact).abs().max() < limit
    assert ((recorded - exact).abs().amax(dim=1)[is_off] > limit).all()


@torch.no_grad()
def exact_last_step(case, model, run):
    """What the recorded hidden states of the last step give in float64, with the run's random numbers."""
    head = case.convert().head.double()
    steps = [len(case.tensors[f"gen_c.step{step}.z"]) for step in range(run["num_iter"])]
    torch.manual_seed(run["seed"])
    noises = []
    for rows in steps:
        start = torch.randn(rows // 2, 4)
        noises = [torch.randn(rows, 4)[: rows // 2].double() for _ in range(100)]
    hidden = case.tensors[f"gen_c.step{len(steps) - 1}.z"].double()
    net = head.net
    process = noise_schedule(100, hidden.device)

    def exact(tokens, times, condition):
        inner = net.input_proj(tokens).repeat(2, 1)
        activated = torch.nn.functional.silu(times + condition)
        for block in net.blocks:
            inner = block(inner, activated)
        return net.output(inner, activated)

    net.forward = exact
    return head.denoise(
        process,
        start.double(),
        net.embed_times(process.timesteps),
        net.condition_proj(hidden),
        noises,
        run["cfg"],
        run["temperature"],
    )


def test_hidden_tokens_and_guidance_of_every_step(models):
    """Against the recorded masks and strengths."""
    for name, run_name in RUNS:
        case, model = models[name]
        run, tensors = run_of(case, run_name), case.tensors
        total = model.config.num_image_tokens
        hidden = hidden_after_steps(total, run["num_iter"], "cosine")
        recorded = tensors[f"{run_name}.mask_len"].long().tolist()
        assert [max(count, 1) for count in hidden] == recorded
        predictor = MaskedPredictor(model, Guidance(run["cfg"], run["cfg_schedule"], neutral=1.0))
        strengths = [
            1 + predictor.strength(step, run["num_iter"], min(total - count, total - 1))
            for step, count in enumerate(hidden)
        ]
        assert_close(torch.tensor(strengths), tensors[f"{run_name}.cfg_per_step"], 1e-6)


def test_recorded_orders_and_steps(models):
    """Given as a permutation for each picture; every step predicts what the authors' did."""
    case, model = models["mar_tiny_patch2"]
    run = run_of(case, "gen_a")
    orders = case.tensors["gen_a.orders"].flip(1)
    torch.manual_seed(run["seed"])
    decoding = Masked(num_steps=run["num_iter"], order=orders.tolist())
    seen = []
    streamer = type("Steps", (), {"put": lambda self, value: seen.append(value), "end": lambda self: None})()
    output = model.generate(
        run["labels"],
        guidance_scale=run["cfg"],
        temperature=run["temperature"],
        decoding=decoding,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    latents = output.sequences.transpose(1, 2).unflatten(2, model.config.latent_grid)
    assert_close(latents, case.tensors["gen_a.tokens"], TOLERANCE)
    assert len(seen) == run["num_iter"]
    for step, pictures in enumerate(seen):
        known = model.from_tokens(case.tensors["gen_a.tokens_after"][step])
        assert_same_image(pictures, model.decode_images(known))


# Orders and schedules


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
@pytest.mark.parametrize("tokens, steps", [(16, 1), (16, 5), (16, 16), (9, 4), (3, 16)])
def test_schedules(schedule, tokens, steps):
    share = MASK_SCHEDULES[schedule]
    assert share(0.0) == 1 and abs(share(1.0)) < 1e-9
    counts = hidden_after_steps(tokens, steps, schedule)
    assert len(counts) == steps and counts[-1] == 0
    assert all(after <= before for before, after in zip([tokens, *counts], counts, strict=False))
    if steps <= tokens:
        assert all(
            after < before or before == 1 for before, after in zip([tokens, *counts], counts, strict=False)
        )


def test_orders():
    model = tiny_mar()

    def order(decoding, **options):
        output = model.generate([1, 2], decoding=decoding, return_dict_in_generate=True, **options)
        return output.orders.tolist()

    raster = list(range(16))
    assert order(Masked(order="raster")) == [raster, raster]
    given = raster[::-1]
    assert order(Masked(order=np.stack([raster, given])[:, ::-1])) == [given, raster]
    assert order(Masked(order=given)) == [given, given]
    assert order(Masked(order=[given, raster])) == [given, raster]
    first, second = order(Masked())
    assert first != second and sorted(first) == sorted(second) == raster
    still = order(Masked(), do_sample=False)
    assert still[0] == still[1] != raster and order(Masked(), do_sample=False) == still
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 4)]
    same = order(Masked(), generator=generators)
    assert same[0] == same[1]


def test_every_step_sees_the_tokens_before_it():
    """One token at a time row by row, the last one depends on the first."""
    model = tiny_mar()
    decoding = Masked(num_steps=16, order="raster")
    options = {"class_labels": [1], "decoding": decoding, "do_sample": False, "guidance_scale": 1.0}
    plain = model.generate(**options)
    seen = []
    original = model.masked_hidden_states

    def spy(tokens, visible, conditions, valid):
        seen.append(visible.tolist())
        return original(tokens, visible, conditions, valid)

    model.masked_hidden_states = spy
    assert torch.equal(model.generate(**options), plain)
    assert seen == [[list(range(count))] for count in range(16)]


def test_confidence_takes_the_surest():
    """Every step draws all hidden tokens and keeps those of the highest likelihood; rows of unequal length, too."""
    model = tiny_mar(head_config=SMALL_HEADS["mixture"])
    original, seen = model.head.confidence, []

    def spy(tokens, hidden):
        seen.append(original(tokens, hidden))
        return seen[-1]

    model.head.confidence = spy
    options = {"return_dict_in_generate": True, "guidance_scale": 1.5}
    decoding = Masked(num_steps=4, order="confidence")
    orders = model.generate([1, 2], decoding=decoding, **options).orders
    known = [16 - hidden for hidden in (16, *hidden_after_steps(16, 4, "cosine"))]
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(2, -1))
    for step, confidence in enumerate(seen):
        left = orders[:, known[step] :].sort(dim=1).values
        count = known[step + 1] - known[step]
        for row in range(2):
            best = left[row][confidence[row].topk(count).indices]
            assert set(best.tolist()) == set(orders[row, known[step] : known[step + 1]].tolist())
    source, keep = torch.randn(2, 16, 4), torch.zeros(2, 4, 4)
    keep[0, 0], keep[1, 1:3] = 1, 1
    kept = model.generate([1, 2], latents=source, keep_mask=keep, decoding=decoding, **options)
    fixed = keep.flatten(1).bool()
    assert torch.equal(kept.sequences[fixed], source[fixed])
    assert torch.equal(kept.orders.sort(dim=1).values, torch.arange(16).expand(2, -1))
    assert (kept.sequences[~fixed] != 0).any(dim=-1).all()
    with pytest.raises(ValueError, match="A diffusion head does not tell how sure it is of a token"):
        tiny_mar().generate([1], decoding=decoding)


# The distribution


class TwoValues(torch.nn.Module):
    """A head whose tokens are 1 or -1 in all channels, with a probability that the hidden state decides."""

    head_type, has_confidence, calls = "two_values", False, 0

    def probability(self, hidden, guidance):
        logits = 1.5 * hidden[..., 0]
        if guidance is not None:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)
        return logits.sigmoid()

    def sample(self, hidden, guidance=None, temperature=1.0, generator=None, do_sample=True):
        high = self.probability(hidden, guidance)
        drawn = sampling.categorical(torch.stack([1 - high, high], dim=-1), generator)
        return (drawn * 2.0 - 1).unsqueeze(-1).expand(-1, -1, 4)


@torch.no_grad()
def by_brute_force(model, sizes, guidance):
    """Probability of every picture of four tokens: over all orders, given what is known before each set."""
    own = model.conditions(class_labels=torch.tensor([2]))
    null = model.null_conditions(own)
    both = {name: torch.cat([value, null[name]]) for name, value in own.items()}

    @cache
    def chances(known: tuple[tuple[int, int], ...]) -> list[float]:
        """Of 1 at every place, given the values at some."""
        visible = torch.tensor([[place for place, _ in known]] * 2, dtype=torch.long)
        seen = torch.tensor([[value for _, value in known]] * 2, dtype=torch.float)
        hidden = model.masked_hidden_states(seen.unsqueeze(-1).expand(-1, -1, 4), visible, both, None)
        return model.head.probability(hidden, guidance)[0].tolist()

    expected = {}
    for order in itertools.permutations(range(4)):
        for values in itertools.product((-1, 1), repeat=4):
            probability, known = 1 / 24, 0
            for size in sizes:
                high = chances(tuple((place, values[place]) for place in sorted(order[:known])))
                for place in order[known : known + size]:
                    probability *= high[place] if values[place] == 1 else 1 - high[place]
                known += size
            expected[values] = expected.get(values, 0.0) + probability
    return expected


@pytest.mark.parametrize("steps, sizes", [(2, [2, 2]), (3, [1, 1, 2])])
def test_distribution_by_all_branches(steps, sizes):
    """Random orders, sets of tokens, guidance: every branch followed with its weight."""
    torch.manual_seed(3)
    model = tiny_mar(grid_size=2)
    model.head = TwoValues()
    assert [4 - hidden for hidden in hidden_after_steps(4, steps, "cosine")] == list(
        itertools.accumulate(sizes)
    )

    def run():
        drawn = model.generate(
            [2], decoding=Masked(num_steps=steps), guidance_scale=4.0, guidance_schedule="constant"
        )
        return tuple(int(value) for value in drawn[0, :, 0])

    found = Enumerator(most_runs=100_000).distribution(run)
    assert_same_distribution(found, by_brute_force(model, sizes, 4.0))
    with pytest.raises(AssertionError):
        assert_same_distribution(found, by_brute_force(model, sizes, 1.0), tolerance=1e-3)


# Fewer steps of the head


@pytest.mark.parametrize(
    "annealing, expected",
    [
        ("linear", [50, 42, 35, 27, 20, 12, 5]),
        ("cosine", [50, 46, 38, 27, 16, 8, 5]),
        ("two_stage", [50, 50, 50, 5, 5, 5, 5]),
        ("constant", [5] * 7),
    ],
)
def test_annealed_steps(annealing, expected):
    """The authors' formulas, for seven steps."""
    decoding = DiffusionStepAnnealing(annealing=annealing)
    assert [decoding.head_steps(step, 7) for step in range(7)] == expected
    assert decoding.head_steps(0, 1) == 50


def test_annealing_is_masked_generation_with_these_steps():
    """Where least and most agree it is plain generation with so many; otherwise calls follow the schedule."""
    model = tiny_mar()
    options = {"class_labels": [1, 2], "guidance_scale": 1.5, "return_dict_in_generate": True}

    def draw(decoding):
        return model.generate(**options, decoding=decoding, generator=torch.Generator().manual_seed(0))

    same = draw(DiffusionStepAnnealing(num_steps=4, most_head_steps=5, least_head_steps=5))
    assert torch.equal(same.sequences, draw(Masked(num_steps=4)).sequences)  # its head has 5
    annealed = draw(DiffusionStepAnnealing(num_steps=4, most_head_steps=8, least_head_steps=2))
    assert annealed.head_calls == 8 + 6 + 4 + 2
    shortcut = tiny_mar(head_config=SMALL_HEADS["shortcut"])
    output = shortcut.generate(**options, decoding=DiffusionStepAnnealing(num_steps=2, most_head_steps=12))
    assert output.head_calls == 8 + 4  # powers of two


@pytest.mark.parametrize(
    "decoding, message",
    [
        ({"most_head_steps": 0}, "most_head_steps is 0; it must be a whole number"),
        ({"least_head_steps": 60}, "least_head_steps is 60, above most_head_steps, 50"),
        ({"annealing": "exponential"}, "annealing is 'exponential'; known are linear"),
        ({"most_head_steps": 2000}, "a training of 1000 steps has 1000 for 2000 of them"),
    ],
)
def test_bad_annealing(decoding, message):
    with pytest.raises(ValueError, match=message):
        tiny_mar().generate([1], decoding={"type": "diffusion_step_annealing", **decoding})


def test_annealing_needs_a_head_of_steps():
    model = tiny_mar(head_config=SMALL_HEADS["energy"])
    assert compatible_decodings(model) == ["masked"]
    with pytest.raises(ValueError, match="cannot be decoded by 'diffusion_step_annealing'; it can by masked"):
        model.generate([1], decoding="diffusion_step_annealing")


# Keeping a part


def test_kept_tokens_stay():
    """Rows of unequal numbers of kept tokens, each drawn as it would be alone."""
    model = tiny_mar()
    source = torch.randn(2, 16, 4)
    keep = torch.zeros(2, 4, 4)
    keep[0, :2], keep[1, 0, 0] = 1, 1
    options = {"do_sample": False, "guidance_scale": 2.0, "decoding": Masked(num_steps=4)}
    together = model.generate([1, 2], latents=source, keep_mask=keep, **options)
    fixed = keep.flatten(1).bool()
    assert torch.equal(together[fixed], source[fixed])
    assert not torch.isclose(together[~fixed], source[~fixed]).any(dim=-1).all()
    for row in range(2):
        rows = slice(row, row + 1)
        alone = model.generate([row + 1], latents=source[rows], keep_mask=keep[rows], **options)
        assert_close(together[rows], alone, 1e-3)


def test_pictures_and_masks_in_pixels():
    model = tiny_mar(patch_size=2, grid_size=2)
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    keep = torch.zeros(8, 8)
    keep[:4] = 1
    drawn = model.generate([1, 2], pixel_values=pixels, keep_mask=keep, do_sample=False)
    source = model.to_tokens(model.encode_images(pixels))
    assert torch.allclose(model.to_tokens(drawn)[:, :2], source[:, :2].expand(2, -1, -1), atol=1e-6)


@pytest.mark.parametrize(
    "keep, message",
    [
        (torch.ones(4, 4), "keep_mask keeps all of a picture; nothing is left to draw"),
        (torch.zeros(4, 4), "keep_mask keeps nothing of a picture; leave the source picture out"),
        (torch.ones(3, 4), r"keep_mask has the shape \(3, 4\)"),
    ],
)
def test_masks_of_nothing_or_everything(keep, message):
    with pytest.raises(ValueError, match=message):
        tiny_mar().generate([1], latents=torch.zeros(1, 16, 4), keep_mask=keep)


def test_ids_are_no_latents():
    with pytest.raises(ValueError, match="The tokens of this model are latents; give these"):
        tiny_mar().generate([1], input_ids=torch.zeros(1, 16, dtype=torch.long), keep_mask=torch.ones(4, 4))


# What a step may and may not


def test_time_limit_ends_in_one_step():
    """What is left when time is up is predicted at once."""
    model = tiny_mar()
    output = model.generate(
        [1], decoding=Masked(num_steps=16), max_time=1e-9, return_dict_in_generate=True, do_sample=False
    )
    assert output.steps == 2 and torch.isfinite(output.sequences).all()
    assert (output.sequences != 0).all()


@pytest.mark.parametrize(
    "decoding, message",
    [
        ({"num_steps": 0}, "num_steps is 0; it must be a whole number of at least 1"),
        ({"num_steps": 2.5}, "num_steps is 2.5"),
        ({"num_steps": 17}, "num_steps is 17; this model has 16 tokens"),
        ({"schedule": "cubic"}, "schedule is 'cubic'; known are cosine"),
        ({"order": "spiral"}, "order is 'spiral'; known are random, raster"),
        ({"order": 3}, "order is 3; give one of random, raster, confidence, numpy, or a permutation"),
        (
            {"order": [0.5] * 16},
            "or a permutation of the positions, one for all pictures or a list of one for each",
        ),
        ({"order": [[0, 1], 2]}, "or a permutation of the positions"),
        ({"order": [0, 1, 2]}, "An order has 3 positions; it must be a permutation of 0 to 15"),
        ({"order": [0] * 16}, "must be a permutation of 0 to 15, each once"),
        ({"order": [list(range(16))] * 3}, "There are 3 orders for 2 pictures"),
    ],
)
def test_bad_decodings(decoding, message):
    with pytest.raises(ValueError, match=message):
        tiny_mar().generate([1, 2], decoding={"type": "masked", **decoding})


def test_bad_options():
    model = tiny_mar()
    for options, message in (
        ({"temperature": 0.0}, "temperature is 0.0; it must be a number above 0"),
        ({"max_new_tokens": 4}, "draws whole pictures of 16 tokens"),
        ({"logits_processor": LogitsProcessorList([lambda ids, scores: scores])}, "have no logits for"),
        (
            {"stopping_criteria": StoppingCriteriaList([lambda ids, scores: True])},
            "reads a sequence of ids",
        ),
        ({"guidance_schedule": [1.0, 2.0], "guidance_scale": 2.0}, "has 2 factors; this model takes"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate([1], **options)


def test_factors_of_guidance_by_step():
    model = tiny_mar()
    options = {"class_labels": [1], "do_sample": False, "decoding": Masked(num_steps=2)}
    zero = model.generate(**options, guidance_scale=3.0, guidance_schedule=[0.0, 0.0])
    none = model.generate(**options, guidance_scale=1.0)
    full = model.generate(**options, guidance_scale=3.0, guidance_schedule=[1.0, 1.0])
    assert_close(zero, none, 1e-3)
    assert torch.equal(full, model.generate(**options, guidance_scale=3.0, guidance_schedule="constant"))
    assert not torch.allclose(full, none, rtol=1e-2)


# The predictor


@torch.no_grad()
def test_fork_and_drop():
    model = tiny_mar()
    predictor = MaskedPredictor(model, Guidance(2.0, "constant", neutral=1.0))
    predictor.start({"class_labels": torch.tensor([1, 2])})
    tokens, places = torch.randn(2, 3, 4), torch.tensor([[0, 5, 7], [1, 2, 3]])
    predictor.commit(tokens, places)
    expected = predictor.predict()
    predictor.fork(2)
    rows = [0, 0, 1, 1, 2, 2, 3, 3]
    assert_close(predictor.predict(), expected[rows], 1e-5)
    predictor.drop(torch.tensor([0, 1]))
    assert predictor.length.tolist() == [3, 3] and predictor.calls == 2
    assert_close(predictor.predict(), expected[[1, 1, 3, 3]], 1e-5)
