"""The trained models under checkpoints/ that decodings are measured on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from hf_argen import (
    AutoModelForImageGeneration,
    Chain,
    ContinuousSpeculative,
    Eagle,
    EagleDrafter,
    ExactMatch,
    LlamaGenVQModel,
    SpeculativeDecoding,
    generate,
)
from hf_argen.data.emoji import EmojiSet, accuracy, psnr

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
TOKENIZER = CHECKPOINTS / "emoji-vq"
LANGUAGE_MODEL = CHECKPOINTS / "python-lm"
# Their drafters, and how many tokens a step gives with them.
DRAFTED = {"python-lm": ("python-lm-eagle", 2.0), "python-lm-deep": ("python-lm-deep-eagle3", 2.5)}


def dtypes_of(weights: Path) -> set[torch.dtype]:
    with safe_open(weights, framework="pt") as file:
        return {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118


def test_it_is_half_precision_and_described():
    assert dtypes_of(TOKENIZER / "model.safetensors") == {torch.bfloat16}
    card = (TOKENIZER / "README.md").read_text(encoding="utf-8")
    for part in ("train_next_token.py", "PSNR", "OFL-1.1", "license: apache-2.0"):
        assert part in card


def test_pictures_survive_it(load_script):
    script = load_script("evaluate_emoji")
    tokenizer = LlamaGenVQModel.from_pretrained(TOKENIZER, dtype="float32").eval()
    emoji = EmojiSet.load(64)
    pictures = emoji.pixel_values(range(0, len(emoji), 8))
    assert tokenizer.encode(pictures[:1]).shape == (1, 256)
    found = script.reconstruct(tokenizer, pictures)
    assert psnr(found, pictures.add(1).mul(0.5), value_range=1.0).mean() >= 26


@pytest.mark.parametrize("name", ["emoji-llamagen", "emoji-rar"])
def test_a_next_token_model_draws_what_it_is_asked_for(load_script, name):
    """Captions are read and pictures are whole; by chance one in 1,391 would be right."""
    script = load_script("evaluate_emoji")
    model = AutoModelForImageGeneration.from_pretrained(CHECKPOINTS / name, dtype="bfloat16").eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINTS / name)
    emoji = EmojiSet.load(64)
    targets, prompts = emoji.prompts(count=16)
    assert accuracy(script.draw(model, processor, prompts), targets, emoji.font) >= 0.4


@pytest.mark.parametrize(
    "name", [f"emoji-mar-{head}" for head in ("diffusion", "flow", "shortcut", "mixture", "energy")]
)
def test_a_masked_model_draws_what_it_is_asked_for(load_script, name):
    script = load_script("evaluate_emoji")
    weights = CHECKPOINTS / name / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    assert dtypes_of(weights) == {torch.bfloat16}
    card = (CHECKPOINTS / name / "README.md").read_text(encoding="utf-8")
    for part in ("train_masked.py", "by Unicode name", "OFL-1.1", "license: apache-2.0"):
        assert part in card
    model = AutoModelForImageGeneration.from_pretrained(CHECKPOINTS / name, dtype="bfloat16").eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINTS / name)
    emoji = EmojiSet.load(64)
    targets, prompts = emoji.prompts(count=16)
    assert accuracy(script.draw(model, processor, prompts), targets, emoji.font) >= 0.5


def test_drafts_of_tokens_are_accepted():
    """The small MAR drafts for the large one as the authors' code lets it: some drafts of one token a step stay."""
    model, drafter = (
        AutoModelForImageGeneration.from_pretrained(CHECKPOINTS / f"emoji-mar-{name}", dtype="float32").eval()
        for name in ("diffusion", "drafter")
    )
    processor = AutoProcessor.from_pretrained(CHECKPOINTS / "emoji-mar-diffusion")
    output = model.generate(
        **processor(["red apple", "green heart"]),
        decoding=ContinuousSpeculative(
            num_steps=64, drafter=drafter, tested_steps=1, acceptance_temperature=42.0
        ),
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        return_dict_in_generate=True,
    )
    gained = output.accept_lengths[output.accept_lengths > 0]
    assert gained.float().mean() > 1.1


def read_prompts(category: str, count: int) -> list[str]:
    """Beginnings of held-out functions or documentation."""
    lines = (LANGUAGE_MODEL / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    return [question["turns"][0] for question in questions if question["category"] == category][:count]


@pytest.mark.parametrize("name", DRAFTED)
def test_a_language_model_knows_python(name):
    """Held-out source costs it far fewer nats than the even guess, and the card names what was held out."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    losses = []
    for text in read_prompts("code", 8):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        losses.append(model(ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 3.2
    card = (CHECKPOINTS / name / "README.md").read_text(encoding="utf-8")
    for part in ("train_small_lm.py", "Held out", "psf-2.0"):
        assert part in card


@pytest.mark.parametrize("name", DRAFTED)
@pytest.mark.parametrize("category", ["code", "documentation"])
def test_a_trained_drafter_is_accepted(category, name):
    """The text is the plain one, and a step gives several tokens of it."""
    drafter, least = DRAFTED[name]
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    eagle = Eagle.from_pretrained(CHECKPOINTS / drafter, dtype=torch.float32).eval()
    decoding = SpeculativeDecoding(EagleDrafter(eagle), Chain(6), ExactMatch())
    gained = steps = 0
    for text in read_prompts(category, 6):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        plain = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        output = generate(
            model, decoding, **inputs, max_new_tokens=48, do_sample=False, return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, plain)
        gained += int(output.accept_lengths.sum())
        steps += int((output.accept_lengths > 0).sum())
    assert gained / steps > least
