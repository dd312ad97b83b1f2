"""The trained image tokenizer that small next-token models start from."""

from pathlib import Path

import torch
from safetensors import safe_open

from hf_argen import LlamaGenVQModel
from hf_argen.data.emoji import EmojiSet, psnr

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "emoji-vq"


def test_it_is_half_precision_and_described():
    with safe_open(TOKENIZER / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
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
