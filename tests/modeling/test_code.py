"""CoDe's two models and their tokenizer apart: the passes that fine-tuning runs, against the authors' numbers."""

import copy

import pytest
import torch

from hf_argen import CollaborativeNextScale, MultiScaleVQModel

from ..helpers.goldens import assert_close, assert_same_image, golden


@pytest.fixture(scope="module")
def case():
    return golden("code", "d3_to_d2_s3")


@pytest.fixture(scope="module")
def model(case):
    return case.convert()


@torch.no_grad()
def test_tokenizer(case, model):
    tensors = case.tensors
    ids = model.encode_images(tensors["tok.image"])
    assert torch.equal(ids, tensors["tok.ids"])
    assert_close(model.image_tokenizer.quantizer.scale_inputs(ids), tensors["tok.var_input"])
    assert_same_image(model.image_tokenizer.decode(ids)[..., 1::4, 1::4], tensors["tok.recon_s4"])


@pytest.mark.parametrize("role", ["draft", "refine"])
@torch.no_grad()
def test_teacher_forced(case, model, role):
    """Fine-tuning the drafter runs its scales only; the refiner runs all."""
    expected, part = case.tensors, model if role == "draft" else model.refiner
    logits = expected[f"tf.{role}.logits"]
    ids = expected["tok.ids"][:, : logits.shape[1]]
    part.config.condition_dropout_in_eval = True
    torch.manual_seed(case.case["seeds"]["tf_seed"])
    output = part(input_ids=ids, class_labels=expected["labels"], labels=ids)
    part.config.condition_dropout_in_eval = False
    assert_close(output.logits, logits)
    assert_close(output.loss.view(1), expected[f"tf.{role}.loss"])


@pytest.mark.parametrize("tag", ["greedy", "sample"])
@torch.no_grad()
def test_entry_pass_of_the_refiner(case, model, tag):
    """It reads the drafted scales as in training, so its states are those of a teacher-forced pass."""
    expected, labels = case.tensors, case.tensors["labels"]
    ids = torch.cat([expected[f"{tag}.draft_ids"], expected[f"{tag}.refine_ids"]], dim=1)
    states = expected[f"{tag}.refine_entry_block0_in"]
    output = model.refiner(
        input_ids=ids[:, : states.shape[1]].repeat(2, 1),
        class_labels=torch.cat([labels, torch.full_like(labels, -1)]),
        output_hidden_states=True,
    )
    assert_close(output.hidden_states[0], states)
    assert_close(output.hidden_states[-1], expected[f"{tag}.refine_entry_last_block"])
    discarded = expected[f"{tag}.refine_entry_discarded_logits"]
    assert_close(output.logits[: len(labels), : discarded.shape[1]], discarded)


def test_refiner_works_with_the_tokenizer_of_the_whole(case, model):
    """As a model of its own, in a copy and after the tokenizer was exchanged, but without holding it."""
    labels, image = case.tensors["labels"], case.tensors["tok.image"]
    names = [name for name, _ in model.refiner.named_parameters()]
    assert not [name for name in names if name.startswith("image_tokenizer.")]
    edit = {"pixel_values": image, "keep_mask": torch.ones(80, 80), "return_dict_in_generate": True}
    assert_same_image(
        model.refiner.generate(labels, **edit).images, model.decode_images(case.tensors["tok.ids"]), 1e-5
    )
    double = copy.deepcopy(model)
    assert double.refiner.check_image_tokenizer() is double.image_tokenizer is not model.image_tokenizer
    other = MultiScaleVQModel(model.image_tokenizer.config).eval()
    double.image_tokenizer = other
    assert double.refiner.check_image_tokenizer() is other
    by_pixels = double.refiner(pixel_values=image, class_labels=labels).logits
    assert torch.equal(by_pixels, double.refiner(input_ids=other.encode(image), class_labels=labels).logits)


def test_fine_tuning_the_refiner(case, model):
    """Its loss counts the scales that it will draw; gradients reach it alone."""
    double = copy.deepcopy(model).train()
    ids = case.tensors["tok.ids"]
    labels = ids.clone()
    labels[:, :14] = -100
    double.refiner(input_ids=ids, class_labels=case.tensors["labels"], labels=labels).loss.backward()
    reached = {name.split(".")[0] for name, weight in double.named_parameters() if weight.grad is not None}
    assert reached == {"refiner"}
    decoding = CollaborativeNextScale(draft_scales=3)
    assert double.eval().generate(case.tensors["labels"], decoding=decoding).shape == ids.shape
