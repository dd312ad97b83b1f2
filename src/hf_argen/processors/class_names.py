"""Names of classes: the ImageNet list, and the way from a name to an id."""

import difflib
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources

NUM_IMAGENET_CLASSES = 1000
MAX_SUGGESTIONS = 4


@cache
def imagenet_class_names() -> tuple[str, ...]:
    """The names of the 1000 ImageNet classes in the order of their ids; synonyms are separated by commas."""
    text = resources.files(__package__).joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def find_class(name: str, class_names: Sequence[str]) -> int:
    """
    The id of a class by its name; each of the synonyms that one class has will do.

    A name that several classes carry goes to the one that has no other name, else to the one that has it first.

    Raises:
        ValueError: no class has the name (the closest ones are offered), or several have it equally.
    """
    wanted = _normal(name)
    synonyms = [[_normal(one) for one in names.split(",")] for names in class_names]
    by_rank = [
        [i for i, names in enumerate(class_names) if _normal(names) == wanted],
        [i for i, own in enumerate(synonyms) if own[0] == wanted],
        [i for i, own in enumerate(synonyms) if wanted in own],
    ]
    for found in by_rank:
        if len(found) == 1:
            return found[0]
        if found:
            choices = " and ".join(f"{i} ({class_names[i]})" for i in found)
            raise ValueError(f"Several classes are called {name!r}: {choices}; give the id.")
    known = list(dict.fromkeys(one for own in synonyms for one in own))
    close = _closest(wanted, known)
    hint = (
        f"the closest are {', '.join(repr(one) for one in close)}" if close else "see processor.class_names"
    )
    raise ValueError(f"There is no class {name!r}; {hint}.")


def _closest(wanted: str, known: Sequence[str]) -> list[str]:
    """Names that are spelled alike, and names that hold all the words."""
    words = set(wanted.split())
    alike = difflib.get_close_matches(wanted, known, n=3)
    holding = sorted((one for one in known if words and words <= set(one.split())), key=len)
    return list(dict.fromkeys([*holding[:2], *alike, *holding]))[:MAX_SUGGESTIONS]


def _normal(name: str) -> str:
    return re.sub(r"\s+", " ", name).strip().lower()
