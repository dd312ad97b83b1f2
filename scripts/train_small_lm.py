"""
Trains the small language model on which speculative decoding is measured: a Llama of 11 million parameters on the source
and documentation that ships with Python.

Whole modules are held out, by a check sum of their name; no line of them is trained on. First a byte-level BPE of 4096
tokens is made, then the text is cut to windows. A run that was killed goes on from its last checkpoint when the same
command is given again.

    python scripts/train_small_lm.py --output runs/small-lm
    python scripts/train_small_lm.py --output runs/small-lm --name draft --hidden-size 128 --layers 2

The second is a model that drafts for the first. Writes OUTPUT/NAME (bfloat16, with tokenizer), OUTPUT/train.npy and
OUTPUT/held_out.npy (token ids), and OUTPUT/prompts.jsonl: beginnings of held-out functions and documentation in
Spec-Bench's form, for benchmark_speculative.py.
"""

import argparse
import ast
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_argen.training import MuonWithAdamW, training_arguments

END = "<|endoftext|>"
VOCABULARY = 4096
HEAD_DIM = 64
MODEL = {
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
WINDOW = 512
WEIGHT_DECAY = 0.1
HELD_OUT = 20  # one module of so many
LEFT_OUT = {"site-packages", "__pycache__", "ensurepip", "test", "tests", "idle_test", "lib2to3"}
SUFFIXES = {".py", ".txt", ".rst", ".html"}
PROMPT_LINES = 12
LONGEST_FILE = 1_000_000  # characters; beyond that it is a table


def library_files(root: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Files of the standard library, in order: the top-level module that each belongs to, and its path."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix in SUFFIXES and path.is_file() and not LEFT_OUT & set(parts):
            yield parts[0].removesuffix(path.suffix), path


def is_held_out(module: str) -> bool:
    """Whether a module is for measuring only."""
    return zlib.crc32(module.encode()) % HELD_OUT == 0


def texts(root: Path | None = None) -> dict[bool, list[tuple[str, str]]]:
    """Held out or not -> (module, text) of every file that can be read."""
    found: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for module, path in library_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if 0 < len(text) <= LONGEST_FILE:
            found[is_held_out(module)].append((module, text))
    return found


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def encoded(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All texts as one row of ids, each after an end token."""
    end = tokenizer.eos_token_id
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return np.array([id_ for row in rows for id_ in (end, *row)], dtype=np.uint16)


def prompts(held_out: list[tuple[str, str]], most: int) -> list[dict[str, Any]]:
    """Questions: beginnings of held-out functions (category "code") and of docstrings ("documentation")."""
    found: dict[str, list[str]] = {"code": [], "documentation": []}
    for _, text in held_out:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not node.body:
                continue
            start = max(node.lineno - 1 - PROMPT_LINES, 0)
            first = node.body[0].lineno
            if node.end_lineno - first >= 6:
                found["code"].append("".join(lines[start:first]))
            documentation = ast.get_docstring(node)
            if documentation and len(documentation) > 300:
                found["documentation"].append(documentation[:150])
    generator = np.random.default_rng(0)
    questions = []
    for category, own in found.items():
        order = generator.permutation(len(own))[: most // 2]
        questions += [{"category": category, "turns": [own[i]]} for i in order]
    return [{"question_id": i, **question} for i, question in enumerate(questions)]


class Windows(Dataset):
    """Windows of a row of ids, next to each other."""

    def __init__(self, ids: np.ndarray, length: int):
        self.ids, self.length = ids, length

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.ids[index * self.length : (index + 1) * self.length].astype(np.int64)
        ids = torch.from_numpy(row)
        return {"input_ids": ids, "labels": ids}


def prepare(options: argparse.Namespace, root: Path | None = None) -> PreTrainedTokenizerFast:
    """Tokenizer, ids and prompts in the output folder; made once."""
    folder = options.output
    if (folder / "prompts.jsonl").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    found = texts(root)
    tokenizer = make_tokenizer([text for _, text in found[False]], options.vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    for held_out, name in ((False, "train"), (True, "held_out")):
        np.save(folder / f"{name}.npy", encoded([text for _, text in found[held_out]], tokenizer))
    lines = [json.dumps(question) for question in prompts(found[True], options.prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    modules = sorted({module for module, _ in found[True]})
    (folder / "held_out.json").write_text(json.dumps(modules), encoding="utf-8")
    print(f"Held out: {', '.join(modules)}")
    return tokenizer


def build(tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> LlamaForCausalLM:
    """The model before its training."""
    end = tokenizer.eos_token_id
    width = options.hidden_size
    shape = {
        "hidden_size": width,
        "intermediate_size": round(2.7 * width / 32) * 32,
        "num_hidden_layers": options.layers,
        "num_attention_heads": width // HEAD_DIM,
        "num_key_value_heads": width // HEAD_DIM,
    }
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **{**shape, **MODEL}, **ids))


def model_card(parameters: int, loss: float, held_out: str) -> str:
    """README.md of the model folder."""
    return f"""---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama]
---

# A small language model of Python's own source

A Llama with {parameters / 1e6:.1f} million parameters and {VOCABULARY} byte pairs, trained on the source and documentation
of Python's standard library (copyright Python Software Foundation). It is made to measure speculative decoding on, not to
be useful.

Held out, whole modules of it: {held_out}. Loss there: {loss:.3f} nats a token.

Made by `scripts/train_small_lm.py`.
"""


def train(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, float]:
    """Trains, or goes on with the training in the output folder; also the loss on what was held out, nats a token."""
    torch.manual_seed(options.seed)
    model = build(tokenizer, options)
    folder = options.output / f"training-{options.name}"
    arguments = training_arguments(
        folder,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup_steps,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_steps=options.save_steps,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=options.save_steps,
        logging_steps=min(50, options.save_steps),
        seed=options.seed,
        report_to="none",
        dataloader_num_workers=0,
    )
    held_out = np.load(options.output / "held_out.npy")[: options.window * options.eval_windows]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Windows(np.load(options.output / "train.npy"), options.window),
        eval_dataset=Windows(held_out, options.window),
        optimizers=(MuonWithAdamW(model, options.learning_rate, weight_decay=WEIGHT_DECAY), None),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    loss = trainer.evaluate()["eval_loss"]
    return model, loss


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/small-lm"))
    parser.add_argument("--vocab-size", type=int, default=VOCABULARY)
    parser.add_argument(
        "--name", default="model", help="of the folder in OUTPUT, to train several on the same ids"
    )
    parser.add_argument("--hidden-size", type=int, default=320, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens of a row of the batch")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-steps", type=int, default=-1, help="in place of epochs")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=200)
    parser.add_argument("--eval-windows", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    tokenizer = prepare(options)
    model, loss = train(options, tokenizer)
    model.to(torch.bfloat16).eval()
    folder = options.output / options.name
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    held_out = json.loads((options.output / "held_out.json").read_text(encoding="utf-8"))
    card = model_card(model.num_parameters(), loss, ", ".join(held_out))
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"Held-out loss: {loss:.3f} nats a token, {model.num_parameters():,} parameters")
    print(f"Written: {folder}")


if __name__ == "__main__":
    main()
