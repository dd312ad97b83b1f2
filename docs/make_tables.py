"""
Writes the parts of README.md and docs/ that follow from the code. Run it after adding or changing a decoding:

    python docs/make_tables.py

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; tests/test_docs.py fails when one is out of date.
"""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from hf_argen.auto import FAMILIES
from hf_argen.generation.decoding import Decoding, available
from hf_argen.generation.decoding.speculative.acceptance import AcceptanceRule
from hf_argen.generation.decoding.speculative.drafters import Drafter
from hf_argen.generation.decoding.speculative.trees import Tree

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/decodings.md")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def own_decodings() -> dict[str, type[Decoding]]:
    """The decodings of the package itself, by name, plain ones first."""
    own = {name: cls for name, cls in available().items() if cls.__module__.startswith("hf_argen.")}
    return dict(sorted(own.items(), key=lambda item: (len(item[1].__mro__), item[0])))


def guarantee(cls: type[Decoding]) -> str:
    return f"{cls.guarantee.value}, bounded by `{cls.knob}`" if cls.knob else cls.guarantee.value


def fits(cls: type[Decoding]) -> str:
    """What it decodes: names of families, and whether it takes language models."""
    generators = {
        name: family.load(family.generator) for name, family in FAMILIES.items() if family.generator
    }
    names = [f"`{name}`" for name, model_class in generators.items() if cls.fits(model_class)]
    if getattr(cls, "fits_language_models", False):
        names.append("language models of transformers")
    return ", ".join(names)


def paper(cls: type[Decoding]) -> str:
    """The arXiv number that the file of the decoding states."""
    found = ARXIV.search(f"{inspect.getmodule(cls).__doc__} {cls.__doc__}")
    return f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else ""


def table() -> str:
    rows = [
        f"| `{name}` | `{cls.__name__}` | {guarantee(cls)} | {fits(cls)} | {paper(cls)} |"
        for name, cls in own_decodings().items()
    ]
    return "\n".join(
        ["| name | class | guarantee | fits | arXiv |", "| --- | --- | --- | --- | --- |", *rows]
    )


def documentation(cls: type[Decoding]) -> tuple[str, dict[str, str]]:
    """The text of a docstring without its list of arguments, and that list as name -> meaning."""
    text, _, arguments = inspect.cleandoc(cls.__doc__).partition("\nArgs:\n")
    meanings: dict[str, str] = {}
    for line in arguments.splitlines():
        name, colon, rest = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     ") and colon:
            last = name
            meanings[last] = rest
        elif line.strip():
            meanings[last] += f" {line.strip()}"
    return text.strip(), meanings


def sections() -> str:
    """A section per decoding: what its docstring says, and its options, inherited ones included."""
    parts = []
    for name, cls in own_decodings().items():
        text, _ = documentation(cls)
        meanings: dict[str, str] = {}
        for parent in reversed(cls.__mro__):
            if issubclass(parent, Decoding):
                meanings |= documentation(parent)[1]
        options = [
            f"- `{field.name}` (default `{field.default!r}`): {meanings[field.name]}"
            for field in dataclasses.fields(cls)
        ]
        about = f"Guarantee: {guarantee(cls)}. Fits {fits(cls)}. arXiv {paper(cls)}."
        section = [f"## {name}", f"`hf_argen.{cls.__name__}`. {about}", text, "\n".join(options)]
        parts.append("\n\n".join(filter(None, section)))
    return "\n\n".join(parts)


def speculative_parts() -> str:
    """A list for each exchangeable part of speculative decoding: what there is, with its options."""
    parts = []
    for title, kind in (("Drafters", Drafter), ("Trees", Tree), ("Acceptance rules", AcceptanceRule)):
        rows = [f"### {title}"]
        for name, cls in sorted(kind.known().items()):
            text, meanings = documentation(cls)
            options = [
                f"  - `{field.name}` (default `{field.default!r}`): {meanings[field.name]}"
                for field in dataclasses.fields(cls)
            ]
            rows.append(
                "\n".join([f"- `{cls.__name__}`, stored as `{name}`. {' '.join(text.split())}", *options])
            )
        parts.append("\n\n".join([rows[0], "\n".join(rows[1:])]))
    return "\n\n".join(parts)


PARTS = {"decodings": table, "decoding sections": sections, "speculative parts": speculative_parts}


def filled(page: str) -> str:
    """The text of a page with its generated parts made anew."""

    def part(match: re.Match) -> str:
        return f"{match[1]}\n\n{PARTS[match[2]]()}\n\n<!-- end -->"

    return re.sub(r"(<!-- generated: ([\w ]+) -->).*?<!-- end -->", part, page, flags=re.DOTALL)


def main() -> int:
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
