"""
Proves what speculative decoding promises, for every drafter with every tree and every acceptance rule.

Greedy: the tokens on so many held-out prompts, one by one and four at a time with left padding, are those of plain
`generate()`. Sampling: on a model that is a table of three tokens every branch of the random choices is followed with
its weight; the total variation to plain sampling must be below 1e-5. Results are kept after every line, and a run that
was killed goes on after them.

    python scripts/prove_lossless.py runs/small-lm/model --prompts runs/small-lm/prompts.jsonl \\
        --drafters runs/draft-lm runs/medusa/drafter runs/eagle/drafter --output runs/lossless

Prints the table for docs/lossless.md.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from speculative_sides import load_drafter, load_tokenizer, name_of, read_prompts
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_argen
from hf_argen import (
    AdaptiveNGram,
    Chain,
    DraftModel,
    DynamicTree,
    ExactMatch,
    IndependentSequences,
    NextToken,
    NGram,
    OptTree,
    RejectionSampling,
    SearchTree,
    SpecTr,
    SpeculativeDecoding,
    StaticTree,
    TypicalAcceptance,
)
from hf_argen.storage import write_whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.helpers.table_model import TableModel, distribution

TREES = (
    Chain(4),
    IndependentSequences(3, 3),
    StaticTree(),
    DynamicTree(24, 3, 4),
    OptTree(16, 0.1, 5),
    SearchTree(16, 3, 40),
)
RULES = (RejectionSampling(), ExactMatch(), SpecTr(), TypicalAcceptance())
# The same on three tokens, small enough to follow every branch.
TABLE_TREES = {
    "Chain": Chain(2),
    "IndependentSequences": IndependentSequences(2, 1),
    "StaticTree": StaticTree([[0], [1], [0, 0]]),
    "DynamicTree": DynamicTree(4, 1, 2),
    "OptTree": OptTree(3, 0.05, 3),
    "SearchTree": SearchTree(3, 2, 12),
}
TABLE_PROMPT = [[0, 1, 2, 0, 1]]
TOLERANCE = 1e-5


@dataclass
class Line:
    """
    One combination.

    Attributes:
        drafter, tree, rule: their names.
        equal: batch size -> prompts whose greedy tokens are those of plain `generate()`.
        prompts: how many there were.
        variation: total variation to plain sampling; `None` where it is not promised or not measured.
        accepted: tokens a step, greedy, one prompt at a time.
    """

    drafter: str
    tree: str
    rule: str
    equal: dict[str, int]
    prompts: int
    variation: float | None
    accepted: float


def combinations(drafters: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """All that fit together."""
    for drafter in drafters:
        for tree in TREES:
            if isinstance(tree, SearchTree) and not isinstance(drafter, NGram | AdaptiveNGram):
                continue
            for rule in RULES:
                if not rule.needs_independent or tree.independent:
                    yield drafter, tree, rule


def batches(tokenizer: Any, texts: list[str], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Prompts, padded on the left."""
    for start in range(0, len(texts), size):
        yield dict(
            tokenizer(
                texts[start : start + size], return_tensors="pt", padding=True, return_token_type_ids=False
            )
        )


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    decoding: SpeculativeDecoding,
    prompts: list[Any],
    plain: list[torch.Tensor],
    tokens: int,
) -> tuple[int, float]:
    """How many rows are those of plain decoding, and tokens a step."""
    equal, steps, gained = 0, 0, 0
    for inputs, expected in zip(prompts, plain, strict=True):
        output = hf_argen.generate(
            model, decoding, **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True
        )
        found = output.sequences
        width = max(found.shape[1], expected.shape[1])
        pad = model.generation_config.pad_token_id or 0
        found, wanted = (
            torch.nn.functional.pad(one, (0, width - one.shape[1]), value=pad) for one in (found, expected)
        )
        equal += int((found == wanted).all(dim=1).sum())
        gained += int(output.accept_lengths.sum())
        steps += int((output.accept_lengths > 0).sum())
    return equal, gained / max(steps, 1)


def total_variation(decoding: Any) -> float:
    """Between the whole output distributions of the decoding and of plain sampling."""
    model = TableModel(3, 0)
    found, plain = (distribution(one, model, TABLE_PROMPT, 3) for one in (decoding, NextToken()))
    return sum(abs(found.get(key, 0.0) - plain.get(key, 0.0)) for key in found.keys() | plain.keys()) / 2


def table_decoding(drafter: Any, tree: Any, rule: Any) -> SpeculativeDecoding | None:
    """The combination on the model that is a table; `None` where the rule promises nothing or the drafter is a network."""
    if isinstance(rule, TypicalAcceptance):
        return None
    if isinstance(drafter, DraftModel):
        drafter = DraftModel(TableModel(3, 1))
    elif not isinstance(drafter, NGram | AdaptiveNGram):
        return None
    return SpeculativeDecoding(drafter, TABLE_TREES[type(tree).__name__], rule)


def prove(options: argparse.Namespace) -> list[Line]:
    """All lines, those of earlier runs included."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(options.model)
    texts = read_prompts(options.prompts)[: options.count]
    drafters = [NGram(), AdaptiveNGram(), *(load_drafter(source, model) for source in options.drafters)]
    path = options.output / "lossless.json"
    lines = [Line(**one) for one in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
    done = {(line.drafter, line.tree, line.rule) for line in lines}
    prompts = {size: list(batches(tokenizer, texts, size)) for size in options.batch_sizes}
    plain: dict[int, list[torch.Tensor]] = {}
    for drafter, tree, rule in tqdm(list(combinations(drafters)), unit="combination"):
        names = (name_of(drafter), type(tree).__name__, type(rule).__name__)
        if names in done:
            continue
        if not plain:
            plain = {
                size: [
                    model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False) for inputs in own
                ]
                for size, own in prompts.items()
            }
        equal, accepted = {}, 0.0
        for size in options.batch_sizes:
            found = greedy(
                model, SpeculativeDecoding(drafter, tree, rule), prompts[size], plain[size], options.tokens
            )
            equal[str(size)] = found[0]
            accepted = accepted or found[1]
        on_table = table_decoding(drafter, tree, rule)
        variation = None if on_table is None else total_variation(on_table)
        lines.append(Line(*names, equal, len(texts), variation, accepted))
        text = json.dumps([asdict(line) for line in lines], indent=1)
        write_whole(path, lambda target, text=text: target.write_text(text, encoding="utf-8"))
    return lines


def table(lines: list[Line]) -> str:
    """The result in Markdown."""
    sizes = sorted(lines[0].equal, key=int)
    head = [
        "drafter",
        "tree",
        "rule",
        *(f"equal at batch {size}" for size in sizes),
        "total variation",
        "tokens a step",
    ]
    rows = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for line in lines:
        equal = [f"{line.equal[size]} of {line.prompts}" for size in sizes]
        variation = "" if line.variation is None else f"{line.variation:.0e}"
        rows.append(
            "| "
            + " | ".join([line.drafter, line.tree, line.rule, *equal, variation, f"{line.accepted:.2f}"])
            + " |"
        )
    return "\n".join(rows)


def failures(lines: list[Line]) -> list[Line]:
    """Lines that break a promise."""
    return [
        line
        for line in lines
        if any(equal < line.prompts for equal in line.equal.values()) or (line.variation or 0.0) > TOLERANCE
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True, help="questions in Spec-Bench's form")
    parser.add_argument(
        "--drafters", nargs="*", default=[], help="folders of language models, Medusa's heads, EAGLE"
    )
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--tokens", type=int, default=48, help="generated for each")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/lossless"))
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    lines = prove(options)
    print(table(lines))
    broken = failures(lines)
    for line in broken:
        print(f"NOT LOSSLESS: {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
