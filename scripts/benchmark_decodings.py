"""
What faster decodings of next-token models give and cost, measured on trained models rather than on random weights.

For each model and decoding: forward calls of the model per picture, tokens kept per call, accuracy by the emoji
yardstick for trained and for held-out captions, and the time of `generate` against `NextToken`, in pairs of one run,
at several batch sizes; above each table the mean entropy of the distributions that tokens are drawn from. Results
are printed as Markdown, kept in OUTPUT as they come (the same command goes on where it was stopped), and drawn as
accuracy against speed.

    python scripts/benchmark_decodings.py checkpoints/emoji-llamagen checkpoints/emoji-rar \\
        --drafter checkpoints/emoji-llamagen-drafter --output runs/decodings

MODEL is the folder or Hub repository of any text-conditional next-token model of ours that was trained on the emoji
set; DRAFTER a small one with the same tokens. `--decodings` names others than the standard list, each by name or as
JSON: '{"type": "speculative_jacobi", "window": 32}'.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarking import seconds
from tqdm import tqdm
from transformers import AutoProcessor, TopPLogitsWarper

from hf_argen import AutoModelForImageGeneration, Decoding, compatible_decodings
from hf_argen.data.emoji import EmojiSet, accuracy
from hf_argen.storage import write_whole

PLAIN = {"type": "next_token"}
STANDARD: tuple[dict[str, Any], ...] = (
    {"type": "speculative_jacobi"},
    {"type": "speculative_jacobi", "initialization": "horizontal"},
    {"type": "maximal_coupling_jacobi"},
    {"type": "grouped_speculative"},
    {"type": "relaxed_acceptance", "delta": 0.0},
    {"type": "relaxed_acceptance", "delta": 0.1},
)
CLAIMS = {  # of the papers, on their models
    "speculative_jacobi": "2x",
    "maximal_coupling_jacobi": "up to 4.2x",
    "grouped_speculative": "3.7x",
    "relaxed_acceptance": "1.75x over speculative decoding",
}
KINDS = ("name", "held-out")


@dataclass
class Score:
    """
    What a decoding did over the yardstick's prompts of one kind.

    Attributes:
        calls: forward calls of the model per picture, mean over pictures.
        kept: tokens per call, mean over all calls.
        accuracy: share of pictures that are the emoji asked for.
    """

    calls: float
    kept: float
    accuracy: float


@dataclass
class Row:
    """
    One line of the table.

    Attributes:
        decoding: its stored form.
        scores: kind of caption -> [`Score`].
        speed: batch size -> time of `NextToken` over its time, median of pairs.
    """

    decoding: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)
    speed: dict[int, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name and the options that differ from their defaults."""
        options = [f"{key}={value}" for key, value in self.decoding.items() if key not in ("type", "drafter")]
        return f"`{self.decoding['type']}`" + (f" {', '.join(options)}" if options else "")

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Row":
        scores = {kind: Score(**score) for kind, score in stored["scores"].items()}
        return cls(stored["decoding"], scores, {int(size): value for size, value in stored["speed"].items()})


class Bench:
    """A model with its processor and the prompts that it is measured on."""

    def __init__(self, source: str, emoji: EmojiSet, options: argparse.Namespace):
        self.emoji, self.options = emoji, options
        self.model = AutoModelForImageGeneration.from_pretrained(source, dtype=options.dtype).eval()
        self.processor = AutoProcessor.from_pretrained(source)
        if getattr(self.model.config, "condition_type", None) != "text" or self.processor.tokenizer is None:
            raise SystemExit(f"{source} draws no captions; give a text-conditional model.")
        if "next_token" not in compatible_decodings(self.model):
            raise SystemExit(f"{source} is no next-token model.")
        self.drafter = None
        if options.drafter is not None:
            drafter = AutoModelForImageGeneration.from_pretrained(options.drafter, dtype=options.dtype)
            self.drafter = drafter.eval()

    def build(self, stored: dict[str, Any]) -> Decoding:
        """A decoding, with the drafter where it needs one."""
        decoding = Decoding.from_dict(stored)
        if getattr(decoding, "drafter", "") is None:
            decoding.drafter = self.drafter
        return decoding

    def draw(self, decoding: Decoding, prompts: list[str], seed: int) -> Any:
        """Pictures of the prompts, each with a generator of its own, and what the decoding counted."""
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        return self.model.generate(
            **self.processor(prompts).to(self.model.device),
            decoding=decoding,
            generator=generators,
            return_dict_in_generate=True,
        )

    # Acceptance and accuracy

    def score(self, stored: dict[str, Any], kind: str) -> Score:
        """Over the yardstick's prompts of a kind."""
        decoding = self.build(stored)
        targets, prompts = self.emoji.prompts(kind == "held-out", self.options.count, self.options.seed)
        images, calls, kept = [], 0, 0
        for start in tqdm(range(0, len(prompts), self.options.draw_batch), desc=stored["type"], leave=False):
            output = self.draw(
                decoding, prompts[start : start + self.options.draw_batch], self.options.seed + start
            )
            images.append(output.images)
            kept += output.sequences.numel()
            if output.accept_lengths is None:
                calls += output.sequences.numel()
            else:  # the prompt's own call gives the first token of each row
                calls += len(output.sequences) + int((output.accept_lengths > 0).sum())
        hits = accuracy(torch.cat(images), targets, self.emoji.font)
        return Score(calls / len(prompts), kept / calls, hits)

    def entropy(self, kind: str) -> float:
        """Bits per token of the distributions that `NextToken` drew from, mean over places and pictures."""
        prompts = self.emoji.prompts(kind == "held-out", self.options.count, self.options.seed)[1]
        config = self.model.generation_config
        total, count = 0.0, 0
        for start in range(0, len(prompts), self.options.draw_batch):
            chunk = prompts[start : start + self.options.draw_batch]
            inputs = self.processor(chunk).to(self.model.device)
            output = self.model.generate(
                **inputs,
                generator=[
                    torch.Generator().manual_seed(self.options.seed + start + i) for i in range(len(chunk))
                ],
                decoding=PLAIN,
                return_dict_in_generate=True,
                output_logits=True,
            )
            log_probs = nucleus(output.logits / (config.temperature or 1.0), config.top_p).log_softmax(dim=-1)
            entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(dim=-1)
            total, count = total + float(entropy.sum()), count + entropy.numel()
        return total / count / torch.log(torch.tensor(2.0)).item()

    # Time

    def speed(self, stored: dict[str, Any], batch_size: int) -> float:
        """How many times as fast as `NextToken` it draws: pairs on the same prompts, median."""
        plain, decoding = self.build(PLAIN), self.build(stored)
        prompts = self.emoji.prompts(count=batch_size * self.options.pairs, seed=self.options.seed + 1)[1]
        for one in (plain, decoding):
            self.draw(one, prompts[:batch_size], 0)
        ratios = []
        for pair in range(self.options.pairs):
            chunk = prompts[pair * batch_size : (pair + 1) * batch_size]
            order = (plain, decoding) if pair % 2 == 0 else (decoding, plain)
            spent = {id(one): seconds(partial(self.draw, one, chunk, pair)) for one in order}
            ratios.append(spent[id(plain)] / spent[id(decoding)])
        return statistics.median(ratios)


def nucleus(logits: torch.Tensor, top_p: float | None) -> torch.Tensor:
    """Logits with those outside the nucleus at minus infinity."""
    if not top_p or top_p >= 1:
        return logits
    return TopPLogitsWarper(top_p)(None, logits.reshape(-1, logits.shape[-1])).view_as(logits)


class Store:
    """Results of earlier runs, one JSON file per model; each is whole or not there."""

    def __init__(self, path: Path):
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.entropy: dict[str, float] = found.get("entropy", {})
        self.rows = [Row.from_dict(row) for row in found.get("rows", [])]

    def row(self, decoding: dict[str, Any]) -> Row:
        """The line of a decoding, new or as far as it was measured."""
        for row in self.rows:
            if row.decoding == decoding:
                return row
        self.rows.append(Row(decoding))
        return self.rows[-1]

    def save(self) -> None:
        """Writes what is known."""
        text = json.dumps({"entropy": self.entropy, "rows": [asdict(row) for row in self.rows]}, indent=1)
        write_whole(self.path, lambda path: path.write_text(text, encoding="utf-8"))


def measure(bench: Bench, store: Store, decodings: Sequence[dict[str, Any]]) -> None:
    """Measures what the store does not hold yet."""
    for kind in KINDS:
        if kind not in store.entropy:
            store.entropy[kind] = bench.entropy(kind)
            store.save()
    for decoding in decodings:
        row = store.row(decoding)
        for kind in KINDS:
            if kind not in row.scores:
                row.scores[kind] = bench.score(decoding, kind)
                store.save()
        for size in bench.options.batch_sizes:
            if size not in row.speed:
                row.speed[size] = 1.0 if decoding == PLAIN else bench.speed(decoding, size)
                store.save()


def table(name: str, store: Store, batch_sizes: Sequence[int]) -> str:
    """The results of a model in Markdown."""
    sizes = [f"speed at batch {size}" for size in batch_sizes]
    head = [
        "decoding",
        "guarantee",
        "calls per picture",
        "tokens per call",
        "accuracy by name",
        "by held-out caption",
        *sizes,
        "paper",
    ]
    entropies = ", ".join(f"{value:.2f} bits ({kind})" for kind, value in store.entropy.items())
    lines = [f"### {name}", "", f"Mean entropy of a token: {entropies}.", ""]
    lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in store.rows:
        first, second = (row.scores[kind] for kind in KINDS)
        cells = [
            row.title,
            type(Decoding.from_dict(row.decoding)).guarantee.value,
            f"{first.calls:.0f} / {second.calls:.0f}",
            f"{first.kept:.2f} / {second.kept:.2f}",
            f"{first.accuracy:.1%}",
            f"{second.accuracy:.1%}",
            *(f"{row.speed[size]:.2f}x" for size in batch_sizes),
            CLAIMS.get(row.decoding["type"], ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(stores: dict[str, Store], batch_size: int, path: Path) -> None:
    """Accuracy by name against speed, one colour per model and one marker per decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    markers: dict[str, str] = {}
    for colour, (name, store) in enumerate(stores.items()):
        for row in store.rows:
            marker = markers.setdefault(row.title.replace("`", ""), "osD^vPX*<>"[len(markers) % 10])
            point = row.speed[batch_size], 100 * row.scores["name"].accuracy
            axes.scatter(*point, color=f"C{colour}", marker=marker, s=70)
        axes.plot([], [], color=f"C{colour}", linewidth=6, label=name)
    for title, marker in markers.items():
        axes.plot([], [], color="grey", marker=marker, linestyle="", label=title)
    axes.set_xlabel(f"times as fast as NextToken, batch {batch_size}")
    axes.set_ylabel("accuracy by Unicode name, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, bbox_inches="tight")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--drafter", help="small model for the decodings that need one; they are left out without"
    )
    parser.add_argument("--decodings", nargs="+", help="names or JSON, in place of the standard list")
    parser.add_argument("--count", type=int, default=300, help="prompts of each kind")
    parser.add_argument("--draw-batch", type=int, default=50, help="pictures at once where no time is taken")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="where time is taken")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs per decoding and batch size")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, where it is not found by itself")
    parser.add_argument("--output", type=Path, default=Path("runs/decodings"))
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The decodings to measure, the plain one first."""
    if options.decodings is None:
        listed = [dict(one) for one in STANDARD]
    else:
        listed = [json.loads(one) if one.startswith("{") else {"type": one} for one in options.decodings]
    needs = {one["type"] for one in listed if hasattr(Decoding.from_dict(one), "drafter")}
    listed = [one for one in listed if options.drafter is not None or one["type"] not in needs]
    return [PLAIN, *(one for one in listed if one != PLAIN)]


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    emoji = EmojiSet.load(font=options.font)
    decodings = chosen(options)
    stores = {}
    for source in options.models:
        name = Path(source).name
        store = stores[name] = Store(options.output / f"{name}.json")
        measure(Bench(source, emoji, options), store, decodings)
        print(table(name, store, options.batch_sizes), end="\n\n")
    plot(stores, options.batch_sizes[0], options.output / "decodings.png")
    print(f"Drawn: {options.output / 'decodings.png'}")


if __name__ == "__main__":
    main()
