"""
What heads of continuous tokens and faster decodings of them give and cost, measured on the trained emoji models.

For each model and decoding: accuracy by the emoji yardstick for trained and for held-out captions, forward calls of the
transformer and of the head per batch, and seconds per picture at several batch sizes, median of runs that take turns with the
plain decoding of the first model. Results are printed as one Markdown table and kept in OUTPUT as they come (the same command
goes on where it was stopped); a sheet of drawn prompts is written for each model.

    python scripts/benchmark_heads.py checkpoints/emoji-mar-* --output runs/heads

MODEL is the folder or Hub repository of a text-conditional masked model of ours that was trained on the emoji set.
`--decodings` names others than the standard list, each by name or as JSON:
'{"type": "diffusion_step_annealing", "most_head_steps": 50, "least_head_steps": 5}'. With `--drafter`, a smaller model of the
same latents with a diffusion head, its drafts for models with that head are measured, too: exactly, one token a step, and as
the authors' code accepts them.
"""

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarking import seconds
from emoji_training import PROMPTS, sheet
from evaluate_emoji import draw
from transformers import AutoProcessor

from hf_argen import AutoModelForImageGeneration, Decoding, compatible_decodings
from hf_argen.data.emoji import EmojiSet, accuracy, to_uint8
from hf_argen.storage import write_whole

STEPS = 16
STANDARD: tuple[dict[str, Any], ...] = (
    {"type": "masked", "num_steps": STEPS},
    {"type": "masked", "num_steps": 64},
    {"type": "diffusion_step_annealing", "num_steps": STEPS},
    {"type": "diffusion_step_annealing", "num_steps": 64},
)
DRAFTED: tuple[dict[str, Any], ...] = (  # with a drafter
    {"type": "continuous_speculative", "num_steps": 64},
    {"type": "continuous_speculative", "num_steps": 64, "tested_steps": 1, "acceptance_temperature": 42.0},
)
CLAIMS = {  # of the papers, against MAR
    "continuous_speculative": "CSpD 2.33x",
    "diffusion_step_annealing": "DiSA 5-10x",
    "shortcut": "FAR 2.3x",
    "mixture": "ARINAR 5x",
}
KINDS = ("name", "held-out")


@dataclass
class Row:
    """
    One line of the table.

    Attributes:
        model, head: name of the model, type of its head.
        decoding: its stored form.
        accuracy: kind of caption -> share of pictures that are the emoji asked for.
        calls, head_calls: of one batch, a drafter's included.
        gained: tokens a row gains by a call that tests drafts, on average; 0 without a drafter.
        seconds: batch size -> of one picture.
    """

    model: str
    head: str
    decoding: dict[str, Any]
    accuracy: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    head_calls: int = 0
    gained: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The decoding's name and the options that differ from their defaults."""
        shown = {**self.decoding, "drafter": Path(self.decoding.get("drafter", "")).name}
        options = [f"{key}={value}" for key, value in shown.items() if key != "type" and value != ""]
        return f"`{self.decoding['type']}` {', '.join(options)}".strip()


class Bench:
    """A model with its processor and the prompts that it is measured on."""

    def __init__(self, source: str, emoji: EmojiSet, options: argparse.Namespace):
        self.name, self.emoji, self.options = Path(source).name, emoji, options
        self.model = AutoModelForImageGeneration.from_pretrained(source, dtype=options.dtype).eval()
        self.processor = AutoProcessor.from_pretrained(source)
        if getattr(self.model.config, "condition_type", None) != "text" or self.processor.tokenizer is None:
            raise SystemExit(f"{source} draws no captions; give a text-conditional model.")
        if "masked" not in compatible_decodings(self.model):
            raise SystemExit(f"{source} is no masked model.")

    def generate(self, decoding: Decoding, prompts: list[str], seed: int = 0) -> Any:
        """Pictures of the prompts, each with a generator of its own, and what was counted."""
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        return self.model.generate(
            **self.processor(prompts).to(self.model.device),
            decoding=decoding,
            generator=generators,
            return_dict_in_generate=True,
        )

    def measure(self, row: Row, plain: tuple["Bench", Decoding]) -> None:
        """Fills a line; times take turns with those of `plain`, so that a slow hour is everyone's."""
        decoding = Decoding.from_dict(row.decoding)  # which keeps a drafter once it has loaded it
        for kind in KINDS:
            targets, prompts = self.emoji.prompts(kind == "held-out", self.options.count, self.options.seed)
            pictures = draw(self.model, self.processor, prompts, self.options.seed, decoding=decoding)
            row.accuracy[kind] = accuracy(pictures, targets, self.emoji.font)
        for size in self.options.batch_sizes:
            prompts = (list(PROMPTS) * size)[:size]
            output = self.generate(decoding, prompts)
            row.calls, row.head_calls = output.forward_calls, output.head_calls
            if (gained := output.accept_lengths) is not None:
                row.gained = gained[gained > 0].float().mean().item()
            other, other_decoding = plain
            ratios, own = [], []
            for run in range(self.options.pairs):
                own.append(seconds(partial(self.generate, decoding, prompts, run)))
                ratios.append(seconds(partial(other.generate, other_decoding, prompts, run)) / own[-1])
            row.seconds[str(size)] = statistics.median(own) / size
            row.seconds[f"speed {size}"] = statistics.median(ratios)


def annealed(decoding: dict[str, Any], head: torch.nn.Module) -> dict[str, Any]:
    """Of DiSA without numbers of its own: from the head's own number of steps to a tenth, as in the paper."""
    if decoding["type"] != "diffusion_step_annealing" or "most_head_steps" in decoding:
        return decoding
    most = head.sampling_steps
    return {**decoding, "most_head_steps": most, "least_head_steps": max(1, most // 10)}


def table(rows: list[Row], batch_sizes: list[int]) -> str:
    """The results in Markdown."""
    sizes = [f"{what} at batch {size}" for size in batch_sizes for what in ("seconds a picture", "speed")]
    head = [
        "model",
        "head",
        "decoding",
        "calls",
        "head calls",
        "tokens gained a call",
        "by name",
        "by held-out caption",
        *sizes,
        "paper",
    ]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        cells = [row.model, row.head, row.title, str(row.calls), str(row.head_calls)]
        cells.append(f"{row.gained:.2f}" if row.gained else "")
        cells += [f"{row.accuracy[kind]:.1%}" for kind in KINDS]
        for size in batch_sizes:
            cells += [f"{row.seconds[str(size)]:.3f}", f"{row.seconds[f'speed {size}']:.2f}x"]
        claim = CLAIMS.get(row.decoding["type"], CLAIMS.get(row.head, ""))
        lines.append("| " + " | ".join([*cells, claim]) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="the first is what the others are timed against"
    )
    parser.add_argument("--decodings", nargs="+", help="names or JSON, in place of the standard list")
    parser.add_argument("--drafter", help="a smaller model with a diffusion head, which drafts")
    parser.add_argument("--count", type=int, default=300, help="prompts of each kind")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="where time is taken")
    parser.add_argument("--pairs", type=int, default=5, help="timed runs per decoding and batch size")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, where it is not found by itself")
    parser.add_argument("--output", type=Path, default=Path("runs/heads"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    emoji = EmojiSet.load(font=options.font)
    decodings = list(STANDARD)
    if options.decodings:
        decodings = [json.loads(one) if one.startswith("{") else {"type": one} for one in options.decodings]
    if options.drafter:
        decodings += [{**one, "drafter": options.drafter} for one in DRAFTED]
    store = options.output / "heads.json"
    rows = [Row(**row) for row in json.loads(store.read_text(encoding="utf-8"))] if store.is_file() else []
    plain = None
    for source in options.models:
        bench = Bench(source, emoji, options)
        plain = plain or (bench, Decoding.from_dict(decodings[0]))
        head = bench.model.head.head_type
        for decoding in decodings:
            if decoding["type"] not in compatible_decodings(bench.model):
                continue
            row = Row(bench.name, head, annealed(decoding, bench.model.head))
            if any((one.model, one.decoding) == (row.model, row.decoding) for one in rows):
                continue
            bench.measure(row, plain)
            rows.append(row)
            text = json.dumps([asdict(one) for one in rows], indent=1)
            write_whole(store, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        drawn = draw(bench.model, bench.processor, list(PROMPTS), decoding=Decoding.from_dict(decodings[0]))
        sheet(to_uint8(drawn)).save(options.output / f"{bench.name}.png")
    print(table(rows, options.batch_sizes))


if __name__ == "__main__":
    main()
