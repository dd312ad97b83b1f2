"""
Speed of speculative decoding in Spec-Bench's protocol: every method answers every question, greedily, in turn.

    python scripts/benchmark_speculative.py runs/small-lm/model --questions runs/small-lm/prompts.jsonl \\
        --drafters runs/medusa/drafter runs/eagle/drafter --assistant runs/draft-lm --output runs/speculative

Beside ours stand plain `generate()`, transformers' assisted generation (with --assistant) and its prompt lookup; these two
take one row at a time. Speed of a question is its new tokens by its seconds, that of a method the mean over questions,
its ratio that to plain `generate()`. Three runs of the first question come before, and do not count. Of our methods also
the forward calls, and the share of the time that is spent outside of all models' forward passes. With --random H L a Llama
of that width and depth with random weights is measured instead, for the overhead on a GPU. Results are kept after every
question; a run that was killed goes on after them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarking import Rates, report_machine, synchronize
from benchmarking import table as print_table
from speculative_sides import load_drafter, load_tokenizer, name_of, read_questions
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_argen
from hf_argen import AdaptiveNGram, Chain, DynamicTree, NGram, OptTree, SpeculativeDecoding, StaticTree
from hf_argen.storage import write_whole

PLAIN = "generate()"
ASSISTED, LOOKUP = "transformers, assisted", "transformers, prompt lookup"
WARM_UPS = 3
LOOKUP_TOKENS = 10
CONFIDENT = Chain(8, confidence=0.4)
# Small trees, since on a CPU every node more costs.
EAGLE_TREES = {
    "Chain": Chain(5),
    "Chain of 8 that ends early": CONFIDENT,
    "DynamicTree": DynamicTree(16, 3, 3),
    "OptTree": OptTree(8, 0.2, 6),
}
MEDUSA_TREES = {
    "Chain": Chain(4),
    "StaticTree": StaticTree(draw=False),
    "StaticTree of 13": StaticTree(
        [
            *([0], [1], [2], [0, 0], [0, 1], [0, 2], [1, 0]),
            *([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]),
        ],
        draw=False,
    ),
}


@dataclass
class Answer:
    """
    What one method took for one batch of prompts.

    Attributes:
        tokens: new ones, of all rows.
        seconds: wall time.
        accepted, steps: tokens that steps added and steps, of rows that had not ended; 0 where it is not known.
        calls: forward calls of all models.
        forward: seconds within the models' forward passes.
    """

    tokens: int
    seconds: float
    accepted: int = 0
    steps: int = 0
    calls: int = 0
    forward: float = 0.0


@dataclass
class Method:
    """
    A way to generate.

    Args:
        name: as the tables call it.
        generate: inputs and options to ids, or to an output of ours.
        models: whose forward passes are timed.
        single: takes one row at a time only.
    """

    name: str
    generate: Callable[..., Any]
    models: list[torch.nn.Module] = field(default_factory=list)
    single: bool = False


class Bench:
    """
    The models and what is asked of them.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.random:
            self.model: PreTrainedModel = random_llama(*options.random).to(self.device, options.dtype_)
            self.prompts = random_prompts(options)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype_).to(
                self.device
            )
            self.tokenizer = load_tokenizer(options.model)
            self.prompts = read_questions(options.questions)[:: options.every][: options.count]
        self.model.eval()

    def methods(self) -> list[Method]:
        """Plain decoding, those of transformers, and ours."""
        found = [Method(PLAIN, self.model.generate, [self.model])]
        lookup = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        found.append(
            Method(LOOKUP, lambda **kwargs: self.model.generate(**kwargs, **lookup), [self.model], True)
        )
        if self.options.assistant:
            small = AutoModelForCausalLM.from_pretrained(self.options.assistant, dtype=self.model.dtype)
            small = small.to(self.device).eval()
            found.append(
                Method(
                    ASSISTED,
                    lambda **kwargs: self.model.generate(**kwargs, assistant_model=small),
                    [self.model, small],
                    True,
                )
            )
            found.append(self.ours("DraftModel, Chain", SpeculativeDecoding(small, Chain(5)), small))
            name = "DraftModel, Chain of 8 that ends early"
            found.append(self.ours(name, SpeculativeDecoding(small, CONFIDENT), small))
        found.append(self.ours("NGram, Chain", SpeculativeDecoding(NGram(), Chain(LOOKUP_TOKENS))))
        found.append(self.ours("AdaptiveNGram, SearchTree", SpeculativeDecoding(AdaptiveNGram())))
        for source in self.options.drafters:
            drafter = load_drafter(source, self.model)
            who = name_of(drafter)
            trees = MEDUSA_TREES if who == "MedusaDrafter" else EAGLE_TREES
            others = sum(method.name.startswith(f"{who}, ") for method in found) // len(trees)
            for name, tree in trees.items():
                name = f"{who}, {name}" + (f" ({others + 1})" if others else "")  # two drafters of a kind
                found.append(self.ours(name, SpeculativeDecoding(drafter, tree), drafter.model))
        return found

    def ours(self, name: str, decoding: SpeculativeDecoding, *networks: torch.nn.Module) -> Method:
        """A method of this package."""
        return Method(
            name, lambda **kwargs: hf_argen.generate(self.model, decoding, **kwargs), [self.model, *networks]
        )

    def batches(self, size: int) -> list[tuple[str, str, dict[str, torch.Tensor]]]:
        """(name, category, inputs): questions of a category together, `size` at a time; a turn each."""
        by_category: dict[str, list[Any]] = {}
        for question in self.prompts:
            by_category.setdefault(question["category"], []).append(question)
        found = []
        for category, own in by_category.items():
            for start in range(0, len(own) - len(own) % size, size):
                chunk = own[start : start + size]
                name = "+".join(str(question["question_id"]) for question in chunk)
                found.append((name, category, self.inputs([question["turns"][0] for question in chunk])))
        return found

    def inputs(self, turns: list[Any]) -> dict[str, torch.Tensor]:
        if self.options.random:
            ids = torch.tensor(turns)
            return {"input_ids": ids.to(self.device), "attention_mask": torch.ones_like(ids).to(self.device)}
        if self.tokenizer.chat_template:
            turns = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
                )
                for turn in turns
            ]
        found = self.tokenizer(turns, return_tensors="pt", padding=True, return_token_type_ids=False)
        return {name: value.to(self.device) for name, value in found.items()}

    @torch.no_grad()
    def answer(self, method: Method, inputs: dict[str, torch.Tensor]) -> Answer:
        """One run, timed."""
        options = {"max_new_tokens": self.options.tokens, "do_sample": False, "return_dict_in_generate": True}
        with forward_time(method.models) as spent:
            synchronize()
            start = time.perf_counter()
            output = method.generate(**inputs, **options)
            synchronize()
            seconds = time.perf_counter() - start
        lengths = getattr(output, "accept_lengths", None)
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        end = self.model.generation_config.eos_token_id
        ended = (
            torch.zeros_like(new, dtype=torch.bool) if end is None else torch.isin(new, new.new_tensor(end))
        )
        tokens = int(((ended.long().cumsum(dim=1) - ended.long()) == 0).sum())  # up to the end token
        if lengths is None:
            return Answer(tokens, seconds, calls=spent["calls"], forward=spent["seconds"])
        return Answer(
            tokens, seconds, int(lengths.sum()), int((lengths > 0).sum()), spent["calls"], spent["seconds"]
        )


def random_llama(width: int, depth: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    heads = max(width // 128, 1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=int(2.6875 * width),
            num_hidden_layers=depth,
            num_attention_heads=heads,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def random_prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Questions of random ids."""
    generator = torch.Generator().manual_seed(0)
    turns = torch.randint(1, 32000, (options.count, 128), generator=generator).tolist()
    return [{"question_id": i, "category": "random", "turns": [turn]} for i, turn in enumerate(turns)]


@contextmanager
def forward_time(models: list[torch.nn.Module]) -> Iterator[dict[str, Any]]:
    """
    Within the `with` block: seconds in the forward passes of the models, and in their heads, which EAGLE borrows; and how
    many passes of whole models.
    """
    spent: dict[str, Any] = {"seconds": 0.0, "calls": 0}
    depth, start = 0, 0.0

    def before(*_: Any) -> None:
        nonlocal depth, start
        if depth == 0:
            synchronize()
            start = time.perf_counter()
        depth += 1

    def after(module: torch.nn.Module, *_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            synchronize()
            spent["seconds"] += time.perf_counter() - start
            spent["calls"] += any(module is model for model in models)

    heads = [model.get_output_embeddings() for model in models if hasattr(model, "get_output_embeddings")]
    hooks = []
    for module in {id(one): one for one in (*models, *heads) if one is not None}.values():
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


class Store:
    """Answers of earlier runs by batch size, method and question; the file is whole or not there."""

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[str, dict[str, dict[str, Any]]] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        )

    def has(self, size: int, method: str, question: str) -> bool:
        return question in self.answers.get(str(size), {}).get(method, {})

    def add(self, size: int, method: str, question: str, category: str, answer: Answer) -> None:
        own = self.answers.setdefault(str(size), {}).setdefault(method, {})
        own[question] = {"category": category, **vars(answer)}

    def save(self) -> None:
        text = json.dumps(self.answers)
        write_whole(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def of(self, size: int, method: str, category: str | None = None) -> list[Answer]:
        """The answers of a method, to the questions of a category or all."""
        found = self.answers.get(str(size), {}).get(method, {}).values()
        return [
            Answer(**{name: value for name, value in one.items() if name != "category"})
            for one in found
            if category in (None, one["category"])
        ]

    def speed(self, size: int, method: str, category: str | None = None) -> float | None:
        """Mean over questions of tokens a second."""
        speeds = [answer.tokens / answer.seconds for answer in self.of(size, method, category)]
        return statistics.fmean(speeds) if speeds else None


def measure(bench: Bench, store: Store, methods: list[Method]) -> None:
    """Asks what the store does not hold; the methods take turns at every question."""
    for size in bench.options.batch_sizes:
        batches = bench.batches(size)
        able = [method for method in methods if size == 1 or not method.single]
        warm: set[str] = set()
        for name, category, inputs in tqdm(batches, desc=f"batch {size}", unit="question"):
            missing = [method for method in able if not store.has(size, method.name, name)]
            for method in missing:
                if method.name not in warm:
                    warm.add(method.name)
                    for _ in range(WARM_UPS):
                        bench.answer(method, batches[0][2])
                store.add(size, method.name, name, category, bench.answer(method, inputs))
            if missing:
                store.save()


def rows(store: Store, size: int, methods: list[str]) -> list[list[str]]:
    """A line for each method: ratios to plain decoding by category and in all, and what its steps are like."""
    categories = sorted({one["category"] for one in store.answers[str(size)][PLAIN].values()})
    found = []
    for method in methods:
        answers = store.of(size, method)
        if not answers:
            continue
        ratios = [
            store.speed(size, method, one) / store.speed(size, PLAIN, one) for one in (*categories, None)
        ]
        steps, tokens = (sum(getattr(answer, name) for answer in answers) for name in ("steps", "tokens"))
        accepted = f"{sum(answer.accepted for answer in answers) / steps:.2f}" if steps else ""
        outside = 1 - sum(answer.forward for answer in answers) / sum(answer.seconds for answer in answers)
        calls = sum(answer.calls for answer in answers) / tokens
        found.append(
            [
                method,
                *(f"{ratio:.2f}x" for ratio in ratios),
                accepted or "1.00",
                f"{calls:.2f}",
                f"{outside:.0%}",
            ]
        )
    return found


def report(store: Store, options: argparse.Namespace, methods: list[str]) -> None:
    """Prints a table for each batch size, and draws the ratios."""
    for size in options.batch_sizes:
        if str(size) not in store.answers:
            continue
        categories = sorted({one["category"] for one in store.answers[str(size)][PLAIN].values()})
        number = len(store.of(size, PLAIN))
        print_table(
            f"Batch {size}, {number} batches of questions, {options.tokens} new tokens at most.",
            [
                "method",
                *categories,
                "all",
                "tokens a step",
                "forward calls a token",
                "outside of forward passes",
            ],
            rows(store, size, methods),
        )


def plot(store: Store, sizes: list[int], methods: list[str], path: Path) -> None:
    """Bars of the ratios over all questions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(methods) + 1.5), dpi=120)
    for i, size in enumerate(sizes):
        ratios = [
            (store.speed(size, method) or 0.0) / (store.speed(size, PLAIN) or 1.0) for method in methods
        ]
        axes.barh(
            [place + 0.4 * i for place in range(len(methods))], ratios, height=0.38, label=f"batch {size}"
        )
    axes.set_yticks([place + 0.2 for place in range(len(methods))], methods)
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as plain generate()")
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="language model, its folder or repository")
    parser.add_argument("--questions", type=Path, help="in Spec-Bench's form")
    parser.add_argument(
        "--drafters", nargs="*", default=[], help="Medusa's heads, EAGLE, other language models"
    )
    parser.add_argument("--assistant", help="small language model for assisted generation and for ours")
    parser.add_argument(
        "--random", type=int, nargs=2, metavar=("WIDTH", "DEPTH"), help="a Llama of random weights"
    )
    parser.add_argument("--count", type=int, default=80, help="questions, at most")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="ask every N-th question")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens, at most")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("runs/speculative"))
    options = parser.parse_args(arguments)
    if not options.random and not (options.model and options.questions):
        parser.error("give a model and --questions, or --random WIDTH DEPTH")
    options.dtype_ = getattr(torch, options.dtype)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    report_machine(options)
    Rates.measure(options.device, [options.dtype_]).report()
    bench, store = Bench(options), Store(options.output / "answers.json")
    methods = bench.methods()
    measure(bench, store, methods)
    names = [method.name for method in methods]
    report(store, options, names)
    plot(store, options.batch_sizes, names, options.output / "speculative.png")
    print(f"\nDrawn: {options.output / 'speculative.png'}")


if __name__ == "__main__":
    main()
