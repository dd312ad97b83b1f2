"""What the scripts on speculative decoding share: drafters from folders, and prompts in Spec-Bench's form."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hf_argen import DraftModel, Eagle, EagleDrafter, MedusaDrafter, MedusaHeads
from hf_argen.auto import DRAFTERS


def load_drafter(source: str, model: PreTrainedModel) -> Any:
    """The drafter in a folder or repository: a language model, Medusa's heads or EAGLE."""
    kind = AutoConfig.from_pretrained(source).model_type
    if kind not in DRAFTERS:
        drafter = DraftModel(source)
        drafter.load(model)
        return drafter
    network = (Eagle if kind == "eagle" else MedusaHeads).from_pretrained(source, dtype=model.dtype)
    return (EagleDrafter if kind == "eagle" else MedusaDrafter)(network.to(model.device).eval())


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model, which pads on the left, with any token where it has none for that."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def name_of(drafter: Any) -> str:
    """How tables call a drafter."""
    config = getattr(getattr(drafter, "model", None), "config", None)
    is_third = isinstance(drafter, EagleDrafter) and config is not None and config.version == 3
    return f"{type(drafter).__name__}{' 3' if is_third else ''}"


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Questions in Spec-Bench's form: one JSON object a line with `question_id`, `category` and `turns`."""
    questions = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for question in questions:
        if not {"question_id", "category", "turns"} <= question.keys():
            raise ValueError(
                f"A line of {str(path)!r} has no question_id, category and turns; it has {list(question)}."
            )
    return questions


def read_prompts(path: Path) -> list[str]:
    """The first turns of all questions, the categories in turn."""
    by_category: dict[str, list[str]] = {}
    for question in read_questions(path):
        by_category.setdefault(question["category"], []).append(question["turns"][0])
    longest = max(map(len, by_category.values()))
    return [own[i] for i in range(longest) for own in by_category.values() if i < len(own)]
