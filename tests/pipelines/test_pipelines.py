"""The pipelines: what goes in, what comes out, what is refused, saving and opening again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, GPT2Config, GPT2Model, Pipeline, pipeline

import hf_argen.assets
from hf_argen import VarForImageGeneration, VarProcessor
from hf_argen.auto import PIPELINES
from hf_argen.pipelines.base import batched

from ..helpers.tiny import spread, text_tokenizer, text_var_config, tiny_var

NAMES = ["goldfish", "volcano", "red fox, Vulpes vulpes", "red wine", "crane"]
SAMPLED = {"do_sample": True, "seed": 3}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tokenizer = text_tokenizer()
    torch.manual_seed(0)
    spread(VarForImageGeneration(text_var_config(len(tokenizer)))).save_pretrained(folder)
    VarProcessor(tokenizer=tokenizer, image_size=(16, 16)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def draw_text(text_folder):
    return pipeline("text-to-image", text_folder)


@pytest.fixture(scope="module")
def draw_class():
    torch.manual_seed(0)
    return pipeline(
        "class-to-image", model=tiny_var(), processor=VarProcessor(class_names=NAMES, image_size=(16, 16))
    )


def source() -> tuple[Image.Image, Image.Image]:
    """A noisy picture and a mask that has its upper left quarter drawn anew."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 8))
    return picture, mask


def pixels(drawn) -> np.ndarray:
    return np.array(drawn["image"])


@pytest.fixture
def calls(monkeypatch):
    """The batch sizes of the calls of generate()."""
    sizes = []
    real = VarForImageGeneration.generate

    def counted(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        sizes.append(len(output.sequences))
        return output

    monkeypatch.setattr(VarForImageGeneration, "generate", counted)
    return sizes


def test_forms_of_results(draw_text, calls):
    one = draw_text("red apple")
    assert set(one) == {"image"} and one["image"].size == (16, 16) and one["image"].mode == "RGB"
    several = draw_text("red apple", num_images_per_prompt=3)
    assert [type(drawn) for drawn in several] == [dict] * 3
    many = draw_text(("red apple", "blue car"), num_images_per_prompt=2)
    assert [len(drawn) for drawn in many] == [2, 2]
    assert [list(drawn) for drawn in draw_text(["red apple"])] == [["image"]]
    assert calls == [1, 3, 4, 1]


def test_lists_are_drawn_in_batches(draw_text, calls):
    prompts = ["red apple", "blue car", "green tree", "a cat", "a dog"]
    whole = draw_text(prompts, **SAMPLED)
    assert calls == [5]
    parts = draw_text(prompts, batch_size=2, **SAMPLED)
    assert calls[1:] == [2, 2, 1]
    streamed = draw_text((prompt for prompt in prompts), batch_size=3, **SAMPLED)
    assert len(calls) == 4  # nothing is drawn before it is asked for
    for a, b, c in zip(whole, parts, streamed, strict=True):
        assert np.array_equal(pixels(a), pixels(b)) and np.array_equal(pixels(a), pixels(c))
    assert calls[4:] == [3, 2]


def test_seed_makes_a_picture_independent_of_its_company(draw_text):
    many = draw_text(["red apple", "a cat"], num_images_per_prompt=3, guidance_scale=2.0, **SAMPLED)
    alone = draw_text("a cat", num_images_per_prompt=2, guidance_scale=2.0, **SAMPLED)
    assert np.array_equal(pixels(many[1][0]), pixels(alone[0]))
    assert np.array_equal(pixels(many[1][1]), pixels(alone[1]))
    assert not np.array_equal(pixels(alone[0]), pixels(alone[1]))
    last = draw_text("a cat", guidance_scale=2.0, do_sample=True, seed=5)
    assert np.array_equal(pixels(many[1][2]), pixels(last))


def test_generators(draw_text):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    by_generator = draw_text(["red apple"] * 3, generator=generators, do_sample=True, batch_size=2)
    by_seed = draw_text("red apple", num_images_per_prompt=3, **SAMPLED)
    for a, b in zip(by_generator, by_seed, strict=True):  # convolutions round differently in another batch
        assert np.abs(pixels(a).astype(int) - pixels(b).astype(int)).max() <= 1
    first = draw_text("red apple", generator=torch.Generator().manual_seed(9), do_sample=True)
    again = draw_text("red apple", generator=torch.Generator().manual_seed(9), do_sample=True)
    assert np.array_equal(pixels(first), pixels(again))
    with pytest.raises(ValueError, match="1 generators were given for 2 pictures"):
        draw_text(["red apple"] * 2, generator=generators[:1])


def test_options_reach_generate(text_folder, draw_text, monkeypatch):
    seen = {}
    real = VarForImageGeneration.generate

    def spy(self, *args, **kwargs):
        seen.update(kwargs)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(VarForImageGeneration, "generate", spy)
    options = {"guidance_scale": 2.0, "top_k": 7, "top_p": 0.9, "temperature": 0.8, "do_sample": True}
    draw = pipeline("text-to-image", text_folder, **options)
    draw("red apple", decoding={"type": "next_scale", "smooth": True}, top_k=5)
    assert {name: seen[name] for name in options} == {**options, "top_k": 5}
    assert seen["decoding"] == {"type": "next_scale", "smooth": True}


def test_class_names_and_ids(draw_class):
    by_name = draw_class(["Red fox", "vulpes vulpes", 2], **SAMPLED)
    for drawn in by_name:
        assert np.array_equal(pixels(drawn), pixels(draw_class(2, **SAMPLED)))
    assert len(draw_class(torch.tensor([0, -1]))) == 2
    assert set(draw_class("volcano")) == {"image"}


def test_a_processor_is_made_for_a_class_model():
    draw = pipeline("class-to-image", model=tiny_var())
    assert draw(1)["image"].size == (16, 16)
    assert pipeline("class-to-image", model=tiny_var(num_classes=1000))("red fox")["image"].size == (16, 16)


def test_inpainting_keeps_what_is_black(draw_text):
    picture, mask = source()
    draw = pipeline("image-inpainting", model=draw_text.model, processor=draw_text.processor)
    drawn = pixels(draw(picture, mask, prompt="red apple", **SAMPLED))
    old = np.array(picture)
    black = np.array(mask) == 0
    assert np.array_equal(drawn[black], old[black])
    assert not np.array_equal(drawn[~black], old[~black])
    raw = pixels(draw(picture, mask, prompt="red apple", paste=False, **SAMPLED))
    assert np.array_equal(raw[~black], drawn[~black]) and not np.array_equal(raw[black], old[black])
    assert np.array_equal(pixels(draw(picture, Image.new("L", (16, 16)), prompt="red apple", **SAMPLED)), old)


def test_inpainting_repaints_a_token_that_the_mask_touches(draw_text, monkeypatch):
    seen = {}
    real = VarForImageGeneration.generate

    def spy(self, *args, **kwargs):
        seen.update(kwargs)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(VarForImageGeneration, "generate", spy)
    picture, _ = source()
    mask = Image.new("1", (16, 16), 0)
    mask.putpixel((5, 0), 1)
    pipeline("image-inpainting", model=draw_text.model, processor=draw_text.processor)(picture, mask)
    assert (seen["keep_mask"] == 0).nonzero().tolist() == [[0, 0, 1]]


def test_inpainting_forms(draw_text, draw_class):
    picture, mask = source()
    draw = pipeline("image-inpainting", model=draw_text.model, processor=draw_text.processor)
    assert [len(some) for some in draw([picture] * 2, mask, num_images_per_prompt=2)] == [2, 2]
    assert len(draw(picture, mask, num_images_per_prompt=2)) == 2
    assert len(draw(image=picture, mask_image=mask, prompt=["red apple", "a cat", "a dog"])) == 3
    row = {"image": picture, "mask_image": mask, "prompt": "a cat"}
    alone = draw(picture, mask, prompt="a cat", **SAMPLED)
    assert np.array_equal(pixels(draw(row, **SAMPLED)), pixels(alone))
    assert np.array_equal(pixels(draw([row, row], **SAMPLED)[1]), pixels(alone))
    of_class = pipeline("image-inpainting", model=draw_class.model, processor=draw_class.processor)
    named = of_class(picture, mask, class_labels="volcano", **SAMPLED)
    assert np.array_equal(pixels(named), pixels(of_class(picture, mask, class_labels=1, **SAMPLED)))
    assert set(of_class(picture, mask)) == {"image"}


@pytest.mark.parametrize("task", PIPELINES)
def test_saved_pipelines_open_again(task, draw_text, draw_class, tmp_path):
    of = draw_class if task == "class-to-image" else draw_text
    first = pipeline(task, model=of.model, processor=of.processor)
    first.save_pretrained(tmp_path / "saved")
    assert "custom_pipelines" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = pipeline(task, str(tmp_path / "saved"))
    assert type(again) is type(first) and isinstance(again, Pipeline)
    again.save_pretrained(tmp_path / "twice")
    twice = pipeline(task, tmp_path / "twice")
    inputs = {"text-to-image": ["a cat"], "class-to-image": ["volcano"], "image-inpainting": source()}[task]
    for other in (again, twice):
        assert np.array_equal(pixels(other(*inputs, **SAMPLED)), pixels(first(*inputs, **SAMPLED)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        first.save_pretrained(tmp_path / "file")


def test_default_model(monkeypatch, text_folder, tmp_path, caplog):
    monkeypatch.setattr(hf_argen.assets, "DEFAULT_MODEL", tmp_path)
    with pytest.raises(ValueError, match="no model of its own; name one: --model"):
        pipeline("text-to-image")
    monkeypatch.setattr(hf_argen.assets, "DEFAULT_MODEL", type(tmp_path)(text_folder))
    assert set(pipeline("text-to-image")("red apple")) == {"image"}
    assert pipeline("image-inpainting").model.config.condition_type == "text"
    assert not caplog.records
    assert type(hf_argen.AutoModelForImageGeneration.from_pretrained()) is VarForImageGeneration
    with pytest.raises(ValueError, match="No model that draws classes comes with hf_argen"):
        pipeline("class-to-image")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda draw: draw(""), "prompt '' is empty"),
        (lambda draw: draw(["red apple", " "]), "prompt ' ' is empty"),
        (lambda draw: draw([]), "list of inputs is empty"),
        (lambda draw: draw(None), "given as NoneType; give text"),
        (lambda draw: draw(["a cat", 7]), "given as int; give text"),
        (lambda draw: draw("x" * 10_000), "has 10000 characters"),
        (lambda draw: draw("a cat", num_images_per_prompt=0), "num_images_per_prompt is 0"),
        (lambda draw: draw("a cat", num_images_per_prompt=10**9), "must lie in"),
        (lambda draw: draw("a cat", num_return_sequences=2), "use num_images_per_prompt"),
        (lambda draw: draw("a cat", seed=0, generator=torch.Generator()), "Both seed and generator"),
        (lambda draw: draw("a cat", return_dict_in_generate=True), "call model.generate"),
        (lambda draw: draw(["a cat"], batch_size=0), "batch_size is 0"),
        (lambda draw: draw("a cat", topk=3), "no keyword 'topk'. Did you mean 'top_k'"),
        (lambda draw: draw("a cat", decoding="next_scal"), "Did you mean 'next_scale'"),
        (lambda draw: draw("a cat", guidance_scale=-1.0), "guidance"),
    ],
)
def test_bad_input(draw_text, call, message):
    with pytest.raises(ValueError, match=message):
        call(draw_text)


def test_a_bad_prompt_in_a_list_stops_before_anything_is_drawn(draw_text, calls):
    with pytest.raises(ValueError, match="is empty"):
        draw_text(["a cat"] * 3 + [""], batch_size=2)
    assert calls == []


def test_bad_classes(draw_class):
    for labels, message in [
        ("red focks", "no class 'red focks'; the closest are 'red fox'"),
        (["volcano", 99], "class label 99 is out of range"),
        (["volcano", -2], "class label -2 is negative"),
        ([], "list of inputs is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw_class(labels)


def test_bad_inpainting(draw_text, draw_class):
    picture, mask = source()
    draw = pipeline("image-inpainting", model=draw_text.model, processor=draw_text.processor)
    for inputs, message in [
        ({"image": picture}, "needs image and mask_image"),
        ({"image": picture, "mask_image": mask.resize((8, 8))}, "make them equal"),
        ({"image": [picture] * 2, "mask_image": [mask] * 3}, r"lengths \[2, 3\]"),
        ({"image": [], "mask_image": mask}, "list of inputs is empty"),
        ({"image": "cat.png", "mask_image": mask}, "give PIL images"),
        ({"image": picture, "mask_image": "mask.png"}, "give PIL images"),
        ({"image": picture, "mask_image": mask, "class_labels": 1}, "draws prompts, not classes"),
        ({"image": picture, "mask_image": mask, "prompt": ["a cat", None]}, "Some inputs have a prompt"),
        ({"image": {"image": picture, "mask": mask}}, "has the entry 'mask'"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw(**inputs)
    of_class = pipeline("image-inpainting", model=draw_class.model, processor=draw_class.processor)
    with pytest.raises(ValueError, match="draws classes, not prompts"):
        of_class(picture, mask, prompt="a cat")


def test_models_that_do_not_fit(text_folder, draw_text, draw_class, tmp_path):
    with pytest.raises(ValueError, match=r"draws from prompts; use pipeline\('text-to-image'\)"):
        pipeline("class-to-image", text_folder)
    with pytest.raises(ValueError, match=r"draws from class labels; use pipeline\('class-to-image'\)"):
        pipeline("text-to-image", model=draw_class.model)
    with pytest.raises(ValueError, match="needs its processor"):
        pipeline("text-to-image", model=draw_text.model)
    other = GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    GPT2Model(other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2Model is no image generator"):
        pipeline("text-to-image", str(tmp_path))
    with pytest.raises(ValueError, match="GPT2Model is no image generator"):
        pipeline("text-to-image", model=GPT2Model(other), processor=draw_text.processor)


def test_the_tokenizer_is_saved_with_it(draw_text, tmp_path):
    draw_text.save_pretrained(tmp_path)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("red apple")["input_ids"]
        == (draw_text.processor.tokenizer("red apple")["input_ids"])
    )


def test_batched():
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batched([], 2)) == []
