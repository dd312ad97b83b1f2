"""CoDe: drafter and refiner give the authors' tokens and pictures."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from hf_argen import CollaborativeNextScale, Decoding
from hf_argen.generation import sampling

from ..helpers.goldens import assert_close, assert_same_image, golden

TAGS = ["greedy", "sample", "sample_s1", "sample_s4", "sample_globalrng", "inpaint"]


@pytest.fixture(scope="module")
def case():
    return golden("code", "d3_to_d2_s3")


@pytest.fixture(scope="module")
def model(case):
    return case.convert()


def run(case, model, tag, **more):
    call = next(call for call in case.case["generation"] if call["tag"] == tag)
    options = {
        "decoding": CollaborativeNextScale(
            draft_scales=call["steps"], top_k=list(call["top_k"]), temperature=list(call["temp"])
        ),
        "guidance_scale": call["cfg"],
        "top_p": call["top_p"],
        "do_sample": True,
        "return_dict_in_generate": True,
        "output_logits": True,
        **more,
    }
    if call["g_seed"] is None:
        torch.manual_seed(case.case["seeds"]["global_seed"])
    else:
        options["generator"] = torch.Generator().manual_seed(call["g_seed"])
    if "inpaint" in call:
        y0, x0, y1, x1 = (round(80 * edge) for edge in call["inpaint"])
        mask = torch.zeros(80, 80)
        mask[y0:y1, x0:x1] = 1
        kept = mask if torch.equal(mask[1::4, 1::4], case.tensors["inpaint.mask_in_s4"][0, 0]) else 1 - mask
        options |= {"pixel_values": case.tensors["tok.image"], "keep_mask": kept}
    return model.generate(case.tensors["labels"], **options)


@pytest.mark.parametrize("tag", TAGS)
def test_recorded_generation(case, model, tag):
    output, expected = run(case, model, tag), case.tensors
    ids = torch.cat([expected[f"{tag}.draft_ids"], expected[f"{tag}.refine_ids"]], dim=1)
    assert torch.equal(output.sequences, ids)
    if f"{tag}.image" in expected:
        assert_same_image(output.images, expected[f"{tag}.image"])
    else:
        assert_same_image(output.images[..., 1::4, 1::4], expected[f"{tag}.image_s4"])
    if f"{tag}.f_hat" in expected:
        assert_close(output.feature_maps[-1], expected[f"{tag}.f_hat"])
    if f"{tag}.refine_logits" in expected:
        logits = torch.cat([expected[f"{tag}.draft_logits"], expected[f"{tag}.refine_logits"]], dim=1)
        assert_close(output.logits, logits)
    steps = next(call["steps"] for call in case.case["generation"] if call["tag"] == tag)
    assert output.forward_calls == 5
    if f"{tag}.draft_f_hat" in expected:
        assert_close(output.feature_maps[steps - 1], expected[f"{tag}.draft_f_hat"])
    quantizer, grids = model.image_tokenizer.quantizer, model.config.grid_sizes
    handed_over = [quantizer.scale_input(output.feature_maps[i], grids[i + 1]) for i in range(steps)]
    assert_close(torch.cat(handed_over, dim=1), expected[f"{tag}.token_hub"])


@pytest.mark.parametrize("tag", ["greedy", "sample"])
def test_draws_that_the_refiner_discards(case, tag):
    """They come from its own logits of the drafted scales; that they advance the generator is all that counts."""
    call = next(call for call in case.case["generation"] if call["tag"] == tag)
    generator = torch.Generator().manual_seed(call["g_seed"])
    lengths = [n * n for n in case.case["refiner_kwargs"]["patch_nums"]][: call["steps"]]
    logits = case.tensors[f"{tag}.refine_entry_discarded_logits"]
    drawn = []
    for step, scores in enumerate(logits.split(lengths, dim=1)):
        warpers = [TopKLogitsWarper(call["top_k"][step]), TopPLogitsWarper(call["top_p"] or 1.0)]
        for warper in warpers:
            scores = warper(None, scores.flatten(0, 1)).view_as(scores)
        drawn.append(sampling.categorical((scores / call["temp"][step]).softmax(dim=-1), generator))
    assert torch.equal(torch.cat(drawn, dim=1), case.tensors[f"{tag}.discarded_ids"])


def test_options_of_a_call_come_before_stored_ones(model):
    """The values per scale that a released model stores are not applied in silence over those of a call."""
    model.generation_config.decoding = CollaborativeNextScale(draft_scales=2, top_k=[40] * 5).to_dict()
    try:
        by_scale = model.generate([1, 2], do_sample=True, generator=torch.Generator().manual_seed(0))
        greedy, best = (
            model.generate([1, 2], **options)
            for options in ({"do_sample": True, "top_k": 1}, {"do_sample": False})
        )
    finally:
        CollaborativeNextScale().store(model.generation_config)
    assert torch.equal(greedy, best) and not torch.equal(by_scale, best)


def test_streamer_gets_the_pictures_of_both_models(model):
    class Pictures(list):
        put = list.append

        def end(self):
            self.append(None)

    streamer = Pictures()
    output = model.generate([1, 2], streamer=streamer, return_dict_in_generate=True)
    assert len(streamer) == output.steps + 1 == 6 and streamer[-1] is None
    for picture, feature_map in zip(streamer, output.feature_maps, strict=False):
        assert torch.equal(picture, model.decode_images(feature_map))


def test_smooth_mixture_has_no_temperature(case, model):
    """As in the authors' code, the temperatures of the scales bear on the ids alone; the mixture makes the picture."""
    outputs = [
        model.generate(
            case.tensors["labels"],
            decoding=CollaborativeNextScale(draft_scales=2, temperature=[temperature] * 5, smooth=True),
            generator=torch.Generator().manual_seed(0),
            do_sample=True,
            return_dict_in_generate=True,
        )
        for temperature in (1.0, 5.0)
    ]
    assert not torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[0].images, outputs[1].images)


def test_drafter_alone(case, model):
    expected = case.tensors
    output = model.generate(
        expected["labels"],
        decoding="next_scale",
        guidance_scale=case.case["generation"][0]["cfg"],
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, expected["plain_draft.ids"])
    assert_same_image(output.images[..., 1::4, 1::4], expected["plain_draft.image_s4"])


@torch.no_grad()
def test_a_pair_of_separate_models(case, tmp_path):
    """Any two VARs of the same scales collaborate; the refiner may be named by its folder."""
    expected = case.tensors
    drafter = _as_var(case, "drafter")
    _as_var(case, "refiner").save_pretrained(tmp_path / "refiner")
    decoding = CollaborativeNextScale(refiner=str(tmp_path / "refiner"), draft_scales=3)
    ids = drafter.generate(expected["labels"], decoding=decoding, guidance_scale=1.5, do_sample=False)
    assert torch.equal(ids, torch.cat([expected["greedy.draft_ids"], expected["greedy.refine_ids"]], dim=1))

    decoding.store(drafter.generation_config)
    assert drafter.generation_config.decoding == {
        "type": "collaborative_next_scale",
        "refiner": str(tmp_path / "refiner"),
        "draft_scales": 3,
    }
    drafter.save_pretrained(tmp_path / "drafter")
    loaded = type(drafter).from_pretrained(tmp_path / "drafter")
    assert Decoding.from_config(loaded.generation_config).draft_scales == 3
    assert torch.equal(loaded.generate(expected["labels"], guidance_scale=1.5, do_sample=False), ids)


def _as_var(case, role):
    from hf_argen import convert_original

    files, config = case.files("tokenizer", role), case.original_config()
    files["transformer"] = files.pop(role)
    return convert_original("var", files, {"tokenizer": config["tokenizer"], "transformer": config[role]})


@pytest.mark.parametrize("draft_scales", [0, 5])
def test_drafting_none_or_all(case, model, draft_scales):
    with pytest.raises(ValueError, match=r"must lie in \[1, 4\]"):
        model.generate([1], decoding=CollaborativeNextScale(draft_scales=draft_scales))


def test_refiner_missing_or_of_other_scales(case, model):
    plain = _as_var(case, "drafter")
    with pytest.raises(ValueError, match="needs a refiner"):
        plain.generate([1], decoding="collaborative_next_scale")
    other = golden("var", "d3_saln_l2_q0").convert()
    with pytest.raises(ValueError, match="they must agree"):
        plain.generate([1], decoding=CollaborativeNextScale(refiner=other, draft_scales=2))


def test_save_and_load(case, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(run(case, loaded, "sample").sequences, run(case, model, "sample").sequences)
