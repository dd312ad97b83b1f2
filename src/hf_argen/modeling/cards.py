"""Model cards: what a saved model is, how it is used, what was measured, and on what terms its weights may be used."""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from ..generation.decoding import available, compatible_decodings

# Who edits a card takes this line out; without it a card is never overwritten.
GENERATED = "<!-- Written by hf_argen. Remove this line once you have edited the card: it stays as it is from then on. -->"
OF_TRANSFORMERS = "This model card has been automatically generated."  # the template that transformers pushes
NO_LICENCE = "unknown"  # in the Hub's list of licences
RECIPE = ("do_sample", "temperature", "top_k", "top_p", "guidance_scale", "guidance_schedule", "decoding")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def provenance(name: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    """What a converted model remembers of the released checkpoint that it came from, as `config.original_checkpoint`."""
    kept = ("description", "repository", "metric", "licence", "licence_note", "note")
    files = [f"{file['repository']}/{file['file']}" for file in preset["files"].values()]
    return {"name": name, "files": files, **{key: preset[key] for key in kept if preset.get(key) is not None}}


def mark_as_trained(config: PreTrainedConfig) -> None:
    """What was measured on a released checkpoint does not hold for the model that training makes of it."""
    origin = getattr(config, "original_checkpoint", None)
    if origin is not None and not origin.get("fine_tuned"):
        kept = {key: value for key, value in origin.items() if key not in ("metric", "note")}
        config.original_checkpoint = {**kept, "fine_tuned": True}


def is_generated(card: str) -> bool:
    """Whether nobody has edited a card."""
    return GENERATED in card or OF_TRANSFORMERS in card


def model_card(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    options: Mapping[str, Any],
    parameters: int,
    name: str,
    tags: Sequence[str] = (),
) -> ModelCard:
    """
    The card of a model, from what is known about it; says nothing of what is not.

    Args:
        model_class: class that loads it.
        config: its configuration.
        options: its generation options, as `GenerationConfig.to_diff_dict` gives them.
        parameters: how many.
        name: folder or repository, for the title and the example.
        tags: for the Hub, beside those of the family.
    """
    origin = getattr(config, "original_checkpoint", None) or {}
    parts = [
        f"# {name.rsplit('/', 1)[-1]}",
        GENERATED,
        _about(model_class, config, origin, parameters),
        _use(model_class, config, name),
        *_recipe(model_class, options),
        *_metrics(origin),
        *_licence(origin),
    ]
    data = _data(model_class, config, origin, name, tags)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _data(
    model_class: type, config: PreTrainedConfig, origin: Mapping[str, Any], name: str, tags: Sequence[str]
) -> ModelCardData:
    task = _task(config)
    papers = [f"arxiv:{number}" for number in _papers(model_class)]
    fields: dict[str, Any] = {
        "library_name": "hf_argen",
        "tags": list(dict.fromkeys([config.model_type, *([task] if task else []), *papers, *tags])),
    }
    if task == "text-to-image":
        fields["pipeline_tag"] = task
    if origin:
        fields |= {"base_model": origin["repository"], "license": origin.get("licence") or NO_LICENCE}
    if metric := origin.get("metric"):
        fields["model_name"] = name.rsplit("/", 1)[-1]
        fields["eval_results"] = [
            EvalResult(
                task_type=task or "image-generation",
                dataset_type=metric["data"].split()[0].lower(),
                dataset_name=metric["data"],
                metric_type=metric["name"].lower(),
                metric_name=metric["name"],
                metric_value=metric["value"],
                source_name="the authors of the checkpoint",
                source_url=f"https://huggingface.co/{origin['repository']}",
            )
        ]
    return ModelCardData(**fields)


def _about(model_class: type, config: PreTrainedConfig, origin: Mapping[str, Any], parameters: int) -> str:
    lines = [
        f"{_title(model_class)}.",
        f"A `{model_class.__name__}` of hf_argen with {parameters / 1e6:.1f} million parameters.",
    ]
    if origin:
        verb = "Fine-tuned from" if origin.get("fine_tuned") else "Converted from"
        files = ", ".join(f"`{file}`" for file in origin["files"])
        lines.append(
            f"{verb} the released checkpoint `{origin['name']}` ({origin['description']}), files {files}."
        )
    lines += [f"Paper: [arXiv {number}](https://arxiv.org/abs/{number})." for number in _papers(model_class)]
    return "\n".join(lines)


def _use(model_class: type, config: PreTrainedConfig, name: str) -> str:
    task = _task(config)
    if task is None:
        code = f'from hf_argen import {model_class.__name__}\n\nmodel = {model_class.__name__}.from_pretrained("{name}")'
    else:
        wanted = '"red apple"' if task == "text-to-image" else "0"
        code = (
            f"import hf_argen\nfrom transformers import pipeline\n\n"
            f'draw = pipeline("{task}", "{name}")\ndraw({wanted}, seed=0)["image"].save("picture.png")'
        )
    return f"## Use\n\n```python\n{code}\n```"


def _recipe(model_class: type, options: Mapping[str, Any]) -> Iterator[str]:
    fitting = compatible_decodings(model_class) if hasattr(model_class, "predictor_class") else []
    if not fitting:
        return
    rows = [f"| `{option}` | `{options[option]!r}` |" for option in RECIPE if options.get(option) is not None]
    stored = ["| option | value |", "| --- | --- |", *rows, ""] if rows else []
    known = available()
    decodings = [
        f"- `{name}`: {known[name].guarantee.value}"
        + (f", bounded by `{known[name].knob}`" if known[name].knob else "")
        for name in fitting
    ]
    yield "\n".join(
        [
            "## Recipe",
            "",
            "What `generate()` does unless told otherwise:" if rows else "No options are stored.",
            "",
            *stored,
            "Decodings that fit, and what each guarantees:",
            "",
            *decodings,
        ]
    )


def _metrics(origin: Mapping[str, Any]) -> Iterator[str]:
    if metric := origin.get("metric"):
        lines = [
            "## Metrics",
            "",
            "Published by the authors for this checkpoint, with the recipe above; not measured again.",
            "",
            "| metric | value | data |",
            "| --- | --- | --- |",
            f"| {metric['name']} | {metric['value']} | {metric['data']} |",
        ]
        yield "\n".join([*lines, "", origin["note"]] if origin.get("note") else lines)


def _licence(origin: Mapping[str, Any]) -> Iterator[str]:
    if origin:
        stated = origin.get("licence")
        text = (
            f"The licence of the weights is `{stated}`" if stated else "No licence of the weights is stated"
        )
        note = origin.get("licence_note")
        yield f"## Licence of the weights\n\n{text}{': ' + note if note else '.'}"


def _module_docstring(model_class: type) -> str:
    return inspect.getdoc(sys.modules[model_class.__module__]) or model_class.__name__


def _title(model_class: type) -> str:
    """The first line of the file of the model, which says what it is."""
    return re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", _module_docstring(model_class).split("\n")[0]).rstrip(".")


def _papers(model_class: type) -> list[str]:
    """The arXiv numbers that the file of the model states."""
    return list(dict.fromkeys(ARXIV.findall(_module_docstring(model_class))))


def _task(config: PreTrainedConfig) -> str | None:
    """The pipeline that draws with the model."""
    kind = getattr(config, "condition_type", None)
    return None if kind is None else f"{kind}-to-image"
