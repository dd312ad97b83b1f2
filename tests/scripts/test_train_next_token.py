"""The training script of the small next-token models, on a few emoji."""

import argparse
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoProcessor

from hf_argen import AutoModelForImageGeneration

TINY_TOKENIZER = {"base_channels": 8, "channel_multiplier": [1, 1, 2], "codebook_size": 64}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "text_embed_dim": 16}
TINY_TEXT = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def script(load_script):
    module = load_script("train_next_token")
    module.TOKENIZER |= TINY_TOKENIZER
    module.REVIVAL_PICTURES = 8
    module.TEXT_ENCODER |= TINY_TEXT
    module.DRAFTER_TEXT_ENCODER |= TINY_TEXT
    for shape in (module.LLAMAGEN, module.RAR, module.DRAFTER):
        shape |= TINY
    return module


def short(stage):
    return replace(stage, epochs=2, batch_size=8, warmup_steps=2)


@pytest.mark.parametrize("family", ["llamagen", "llamagen-drafter", "rar"])
def test_a_model_is_trained_and_saved(script, emoji, family, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "next-token"  # the tokenizer is trained once for all
    shared = sys.modules["emoji_training"]
    monkeypatch.setattr(shared, "PROMPTS", shared.PROMPTS[:2])
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    options = argparse.Namespace(
        **dict.fromkeys(("text_encoder", "start", "corruption")),
        beginnings=(16, 0.5) if family == "llamagen" else None,
        output=folder,
        sheets=folder / "sheets",
        seed=0,
        save_minutes=60.0,
    )
    tokenizer = folder / "tokenizer" / "model.safetensors"
    before = tokenizer.stat().st_mtime_ns if tokenizer.is_file() else None
    stages = [short(one) for one in (script.TOKENIZER_STAGE, script.STAGES[family])]
    model, processor = script.train(family, emoji, *stages, options)
    assert before in (None, tokenizer.stat().st_mtime_ns)
    if family == "rar":
        assert model.randomness_ratio == 0.0  # annealed

    card = script.model_card(family, sys.modules["evaluate_emoji"].Yardstick(0.75, 0.5, 25.4, (9, 9)), 10**6)
    sys.modules["emoji_training"].save(folder / family, model.to(torch.bfloat16), processor, card=card)
    assert "75.0%" in card and "OFL-1.1" in card
    again = AutoModelForImageGeneration.from_pretrained(folder / family)
    prompts = AutoProcessor.from_pretrained(folder / family)(["red apple", "two cats"])
    drawn = again.generate(**prompts, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    assert drawn.shape == (2, 256)
    assert again.generation_config.top_p == script.SAMPLING["top_p"]
    if family == "rar":
        assert str(folder) not in (folder / family / "config.json").read_text()
        more = {"output": folder / "further", "start": folder / family, "corruption": (0.5, 0.1)}
        options = argparse.Namespace(**vars(options) | more)
        further, words = script.train(family, emoji, stages[0], replace(stages[1], epochs=1), options)
        assert (
            not (folder / "further" / "tokenizer").exists() and words(["red apple"]).keys() == prompts.keys()
        )
        assert further.randomness_ratio == 0.0
        weights = (one.head.out_proj.weight.float() for one in (again, further))
        assert 0 < torch.dist(*weights) < 1


def test_a_first_head_looks_at_the_caption(script, emoji, tmp_path):
    """Before any training one head of each layer reads little but the caption, and the others do not."""
    processor = script.prompt_processor(emoji, tmp_path / "processor", script.LlamaGenProcessor)
    torch.manual_seed(0)
    model = script.build_llamagen(script.build_tokenizer(), processor).eval()
    heads = model.config.num_attention_heads
    ids = torch.randint(64, (2, 1, 256))
    prompts = [processor([words]) for words in ("red apple", "two cats")]

    @torch.no_grad()
    def read(ids, prompt):
        """What the heads of the first layer read for the last token, (heads, head_dim)."""
        found = []
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda module, inputs: found.append(inputs[0][0, -1].view(heads, -1))
        )
        model(input_ids=ids, **prompt)
        hook.remove()
        return found[0]

    def by_caption():
        """Of each head, how much more it changes with the caption than with the picture."""
        here = read(ids[0], prompts[0])
        other_caption, other_picture = read(ids[0], prompts[1]), read(ids[1], prompts[0])
        return (here - other_caption).norm(dim=-1) / (here - other_picture).norm(dim=-1)

    assert by_caption().max() < 1
    script.begin_attention(model)
    ratios = by_caption()
    assert ratios[0] > 3 and ratios.argmax() == 0


def test_a_text_encoder_that_was_trained_elsewhere(script, emoji, tmp_path):
    processor = script.prompt_processor(emoji, tmp_path / "processor", script.LlamaGenProcessor)
    tokenizer = script.build_tokenizer()
    rar, llamagen = script.build_rar(tokenizer, processor), script.build_llamagen(tokenizer, processor)
    encoder_of = sys.modules["emoji_training"].encoder_of
    assert encoder_of(rar) is rar.model.text_encoder
    assert encoder_of(llamagen) is llamagen.text_encoder
    rar.save_pretrained(tmp_path / "rar")
    script.begin_with_encoder(llamagen, tmp_path / "rar")
    theirs, ours = rar.model.text_encoder.state_dict(), llamagen.text_encoder.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items())


def test_pictures_are_read_with_fewer_random_tokens_in_the_end(script):
    torch.manual_seed(0)
    ids = torch.full((400, 50), 7)
    shares = [
        (script.CORRUPTION(ids, 64, progress) != 7).float().mean().item() for progress in (0.0, 0.5, 1.0)
    ]
    first, last = script.CORRUPTION.first, script.CORRUPTION.last
    for share, most in zip(shares, (first, (first + last) / 2, last), strict=True):
        assert abs(share - most / 2 * 63 / 64) < 0.03


def test_some_batches_are_the_first_tokens_alone(script, monkeypatch):
    torch.manual_seed(0)
    ids = torch.arange(20).view(2, 10)
    drawn = [script.Beginnings(3, 0.25)(ids, ids + 1) for _ in range(400)]
    assert 60 < sum(read.shape[1] == 3 for read, _ in drawn) < 140
    for read, labels in drawn:
        assert torch.equal(read, ids[:, : read.shape[1]]) and torch.equal(labels, read + 1)
    monkeypatch.setattr(sys, "argv", ["train_next_token.py", "rar", "--beginnings", "16", "0.5"])
    with pytest.raises(SystemExit):
        script.main()


def test_the_text_encoder_learns(script, emoji, tmp_path):
    processor = script.prompt_processor(emoji, tmp_path / "processor", script.LlamaGenProcessor)
    model = script.build_llamagen(script.build_tokenizer(), processor).train()
    torch.nn.init.normal_(model.head.out_proj.weight)
    ids = torch.randint(64, (2, 256))
    model(input_ids=ids, labels=ids, **processor(["red apple", "two cats"])).loss.backward()
    assert model.text_encoder.shared.weight.grad.abs().sum() > 0
    model.config.freeze_text_encoder = True
    model.train().zero_grad()
    model(input_ids=ids, labels=ids, **processor(["red apple", "two cats"])).loss.backward()
    assert model.text_encoder.shared.weight.grad is None
