"""What `argen generate` was asked for; the record in a picture is made of it."""

import dataclasses
import json
import math
import secrets
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

from .. import __version__
from ..assets import DEFAULT_NAME
from .opening import DTYPES, QUANTIZATIONS

BATCH = 8  # pictures that are drawn at once
MAX_PICTURES = 1000
MAX_SEED = 2**63


@dataclass
class DrawRequest:
    """
    Everything that the pictures depend on.

    Args:
        model: see [`open_pipeline`]; `None` is the model that comes with the package.
        prompts, classes: what to draw, one of the two.
        count: pictures of each.
        seed: of the first picture of each; the i-th has `seed + i`. `None` draws one.
        decoding: name, or JSON of its stored form.
        guidance, top_k, top_p, temperature: `None` for the model's own.
        dtype, quantize, device: how and where the weights are held.
        weights: what [`fingerprint`] tells of the model that drew a picture; only in records.
        company: of a picture that was drawn together with others: {"pictures": [[prompt or class, seed], ...],
            "index": its own place}. A batch of another size is rounded differently; only in records.
    """

    model: str | None = None
    prompts: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    count: int = 1
    seed: int | None = None
    decoding: str | None = None
    guidance: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    dtype: str = "auto"
    quantize: str | None = None
    device: str | None = None
    weights: str | None = None
    company: dict[str, Any] | None = None

    most_pictures: ClassVar[int | None] = MAX_PICTURES
    example: ClassVar[str] = "argen generate 'red apple'"

    def check(self) -> None:
        """
        Fills in the seed and refuses what no model could draw.

        Raises:
            ValueError: see there.
        """
        from ..processors.base import check_prompt

        if self.prompts and self.classes:
            raise ValueError("Prompts and --class are both given; a model draws from one of them.")
        wanted = self.prompts or self.classes
        if not wanted:
            raise ValueError(f"Nothing to draw; give a prompt, as in: {self.example}")
        for prompt in self.prompts:
            check_prompt(prompt)
        if any(not name.strip() for name in self.classes):
            raise ValueError("A class is empty; give its name or id.")
        if self.count < 1:
            raise ValueError(f"-n is {self.count}; it must be at least 1.")
        if self.most_pictures is not None and self.count * len(wanted) > self.most_pictures:
            raise ValueError(
                f"-n {self.count} makes {self.count * len(wanted)} pictures; {self.most_pictures} are the most at a "
                "time, and argen sample draws any number."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} is unknown; give {', '.join(DTYPES)}.")
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise ValueError(f"--quantize {self.quantize!r} is unknown; give {' or '.join(QUANTIZATIONS)}.")
        for option, value in (
            ("--guidance", self.guidance),
            ("--top-p", self.top_p),
            ("--temperature", self.temperature),
        ):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{option} is {value}; it must be a number.")
        if self.seed is None:
            self.seed = secrets.randbelow(2**31)
        if not 0 <= self.seed <= MAX_SEED - self.count:
            raise ValueError(
                f"--seed is {self.seed}; with {self.count} more it must stay within 0 and 2^63, since picture i has "
                "the seed + i."
            )

    def pictures(self) -> list[tuple[str, int]]:
        """(prompt or class, seed) of each picture."""
        assert self.seed is not None
        return [(text, self.seed + i) for text in self.prompts or self.classes for i in range(self.count)]

    def batches(self) -> list[tuple[list[tuple[str, int]], list[int]]]:
        """What is drawn at once: pictures as in `pictures`, and the places of those that are wanted."""
        if self.company is not None:
            together = [(text, seed) for text, seed in self.company["pictures"]]
            return [(together, [self.company["index"]])]
        parts = (self.pictures()[start : start + BATCH] for start in range(0, len(self.pictures()), BATCH))
        return [(part, list(range(len(part)))) for part in parts]

    def options(self) -> dict[str, Any]:
        """What `generate()` is told."""
        options = {
            "guidance_scale": self.guidance,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "temperature": self.temperature,
            "decoding": parsed_decoding(self.decoding),
        }
        return {name: value for name, value in options.items() if value is not None}

    def resolved(self, model: Any, weights: str | None = None) -> Self:
        """With what `model` fills in and the fingerprint of its weights, so that the record stands on its own."""
        from ..generation.decoding import Decoding, available, resolve

        config = model.generation_config
        given = parsed_decoding(self.decoding)
        decoding = resolve(given) if given is not None else Decoding.from_config(config)
        if decoding is None:
            name = getattr(model, "default_decoding", model.predictor_class.default_decoding)
            decoding = available()[name]()
        stored = (decoding if given is not None else decoding.under(self.options())).to_dict()

        def or_own(value: Any, name: str) -> Any:
            return getattr(config, name, None) if value is None else value

        name = self.model or DEFAULT_NAME
        if name != DEFAULT_NAME and Path(name).expanduser().exists():
            name = str(Path(name).expanduser().absolute())  # it shall mean the same from any folder
        return dataclasses.replace(
            self,
            model=name,
            decoding=stored["type"] if len(stored) == 1 else json.dumps(stored),
            guidance=or_own(self.guidance, "guidance_scale"),
            top_k=or_own(self.top_k, "top_k"),
            top_p=or_own(self.top_p, "top_p"),
            temperature=or_own(self.temperature, "temperature"),
            dtype=str(model.dtype).removeprefix("torch.") if self.quantize is None else self.dtype,
            device=model.input_device.type,
            weights=weights,
        )

    def one(self, index: int) -> Self:
        """The request for one of the pictures, which gives the same picture to the bit."""
        text, seed = self.pictures()[index]
        start = index - index % BATCH
        together = [list(one) for one in self.pictures()[start : start + BATCH]]
        company = {"pictures": together, "index": index - start} if len(together) > 1 else None
        which = {"prompts": [text]} if self.prompts else {"classes": [text]}
        return dataclasses.replace(self, **which, count=1, seed=seed, company=self.company or company)

    def record(self) -> dict[str, Any]:
        """The entry of a picture, plain JSON: `prompt` or `class`, the other options, the version."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, [])}
        record = {"model": fields.pop("model")} if "model" in fields else {}
        for plural, name in (("prompts", "prompt"), ("classes", "class")):
            if plural in fields:
                values = fields.pop(plural)
                record[name] = values[0] if len(values) == 1 else values
        return {**record, **fields, "version": __version__}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """
        The request that a record was made of.

        Raises:
            ValueError: the record is damaged, or of a version that knew other options.
        """
        fields = {name: value for name, value in record.items() if name != "version"}
        for plural, name in (("prompts", "prompt"), ("classes", "class")):
            if name in fields:
                value = fields.pop(name)
                fields[plural] = value if isinstance(value, list) else [value]
        hints = get_type_hints(cls)
        kinds = {one.name: hints[one.name] for one in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name not in kinds:
                raise ValueError(
                    f"The record is of version {record.get('version')} and has the entry {name!r}, which this one "
                    f"({__version__}) does not know."
                )
            if not _is_of(value, kinds[name]):
                raise ValueError(f"The record is damaged: its entry {name!r} is {value!r}.")
        return cls(**fields)

    def command(self) -> str:
        """The command line that draws the pictures."""
        words = ["argen", "generate", *self.prompts]
        for name in self.classes:
            words += ["--class", name]
        for option, value, default in (
            ("-n", self.count, 1),
            ("--model", self.model, None),
            ("--seed", self.seed, None),
            ("--decoding", self.decoding, None),
            ("--guidance", self.guidance, None),
            ("--top-k", self.top_k, None),
            ("--top-p", self.top_p, None),
            ("--temperature", self.temperature, None),
            ("--dtype", self.dtype, "auto"),
            ("--quantize", self.quantize, None),
            ("--device", self.device, None),
        ):
            if value != default:
                words += [option, str(value)]
        return shlex.join(words)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is what the field of a request takes."""
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if kind == dict[str, Any] | None:
        return value is None or _is_company(value)
    return isinstance(value, kind | int if kind == float | None else kind) and not isinstance(value, bool)


def _is_company(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("pictures"), list):
        return False
    pictures, index = value["pictures"], value.get("index")
    are_pictures = all(
        isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], int)
        for one in pictures
    )
    return are_pictures and isinstance(index, int) and 0 <= index < len(pictures) <= MAX_PICTURES


def parsed_decoding(given: str | None) -> str | dict[str, Any] | None:
    """
    A name as it is, a stored decoding from JSON.

    Raises:
        ValueError: it starts like JSON and is none.
    """
    if given is None or not given.lstrip().startswith("{"):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise ValueError(f"--decoding {given!r} is not JSON ({error}).") from error
