"""
Pictures as tokens in files: what a frozen image tokenizer makes of a data set once, to be trained on many times.

A folder holds `tokens.json`, which says what the tokens are, and shards `tokens-00000.safetensors`, each with

- `input_ids` (pictures, views, tokens), the ids of every view of a picture, in the smallest whole number that holds them;
- `class_labels` (pictures,) int64, -1 for none;
- `numbers` (pictures,) int64, the number of each picture in the source, of which damaged ones may be left out.

Every shard covers the same number of pictures of the source and depends on nothing else, so that a run that was killed
goes on with the shards that are missing. Each file is written beside its place and renamed.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.utils.data import Dataset

from ..storage import remove_parts, write_whole

INDEX = "tokens.json"
FORMAT = 1
DESCRIPTIVE = ("model", "source")  # names, which may change while what they name stays the same
RESULTS = ("shards", "skipped")  # entries of the index once all shards are there


def tokenizer_digest(tokenizer: nn.Module) -> str:
    """SHA-256 of the weights of an image tokenizer as float32, the same alone and inside of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


def shard_name(number: int) -> str:
    """Name of the file of a shard."""
    return f"tokens-{number:05d}.safetensors"


def token_dtype(codebook_size: int) -> torch.dtype:
    """The smallest type of whole numbers that holds the ids of a codebook."""
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        if codebook_size - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64


def read_index(folder: str | os.PathLike) -> dict[str, Any] | None:
    """
    The index of a folder of token files, `None` where there is none.

    Raises:
        ValueError: it is damaged, or of a later version of this package.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete the folder and tokenize the pictures again."
        ) from error
    if not isinstance(index, dict) or "format" not in index:
        raise ValueError(f"{path} is no index of token files; give another folder.")
    if index["format"] != FORMAT:
        raise ValueError(
            f"{path} has the format {index['format']}; this version of hf_argen reads format {FORMAT}."
        )
    return index


class TokenWriter:
    """
    Writes a folder of token files, shard by shard, and goes on where an earlier writer with the same plan was stopped.

    Args:
        folder: of the files; made if it does not exist.
        plan: all that the tokens depend on, plain JSON, with `pictures` (how many the source has), `shard_size`,
            `codebook_size`, `num_views` and `grid_sizes`; and, for people to read, `model` and `source`.
    """

    def __init__(self, folder: str | os.PathLike, plan: dict[str, Any]):
        self.folder, self.plan = Path(folder), {"format": FORMAT, **plan}
        if self.plan["shard_size"] < 1:
            raise ValueError(f"A shard shall hold {self.plan['shard_size']} pictures; give 1 or more.")
        if self.plan["pictures"] < 1:
            raise ValueError("There are no pictures to tokenize.")

    @property
    def shape(self) -> tuple[int, int]:
        """(views, tokens) of a picture."""
        return self.plan["num_views"], sum(height * width for height, width in self.plan["grid_sizes"])

    def begin(self) -> None:
        """
        Writes the index, or compares it with that of the run that is gone on with.

        Raises:
            ValueError: the folder holds something else, or the tokens of another run, or cannot be written.
        """
        known = read_index(self.folder)
        if known is None:
            if self.folder.exists() and not self.folder.is_dir():
                raise ValueError(f"{self.folder} is a file; give a folder.")
            if self.folder.exists() and any(
                not path.name.endswith(".part") for path in self.folder.iterdir()
            ):
                raise ValueError(f"{self.folder} is not empty and holds no tokens; give another folder.")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{self.folder} cannot be made ({error.strerror}).") from error
            self._write_index(self.plan)
            return
        for name in self.plan | known:
            own, other = self.plan.get(name), known.get(name)
            if name not in DESCRIPTIVE + RESULTS and own != other:
                raise ValueError(
                    f"{self.folder} was begun with {name} {_shown(other)}, not {_shown(own)}; give what it was begun "
                    "with to go on, or another folder."
                )
        self.plan = {name: value for name, value in known.items() if name not in RESULTS}

    def shards(self) -> list[range]:
        """The numbers of the pictures of each shard."""
        count, size = self.plan["pictures"], self.plan["shard_size"]
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def missing(self) -> list[int]:
        """
        The shards that have still to be written, by number.

        Raises:
            ValueError: one that is there is damaged.
        """
        there = [(self.folder / shard_name(number)).is_file() for number in range(len(self.shards()))]
        for number, is_there in enumerate(there):
            if is_there:
                self._notes(number)
        return [number for number, is_there in enumerate(there) if not is_there]

    def write(
        self,
        shard: int,
        input_ids: torch.Tensor,
        class_labels: Sequence[int],
        numbers: Sequence[int],
        skipped: Sequence[str] = (),
    ) -> None:
        """
        Writes a shard.

        Args:
            input_ids: (pictures, views, tokens).
            class_labels: of each picture, -1 for none.
            numbers: of each picture in the source.
            skipped: names of the pictures of this shard that could not be read.

        Raises:
            ValueError: another shape, ids outside of the codebook, or the file cannot be written.
        """
        if input_ids.shape != (len(numbers), *self.shape) or len(class_labels) != len(numbers):
            raise ValueError(
                f"{len(numbers)} pictures have {len(class_labels)} labels and ids of the shape "
                f"{tuple(input_ids.shape)}; expected {(len(numbers), *self.shape)}."
            )
        size = self.plan["codebook_size"]
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < size:
            raise ValueError(
                f"ids lie between {int(input_ids.min())} and {int(input_ids.max())}; the codebook has {size} codes."
            )
        tensors = {
            "input_ids": input_ids.to("cpu", token_dtype(size)).contiguous(),
            "class_labels": torch.tensor(list(class_labels), dtype=torch.int64),
            "numbers": torch.tensor(list(numbers), dtype=torch.int64),
        }
        # One entry only: safetensors writes several in an order that differs from process to process.
        notes = {"skipped": json.dumps(list(skipped), ensure_ascii=False)}
        content = save(tensors, metadata=notes)
        write_whole(self.folder / shard_name(shard), lambda path: path.write_bytes(content))

    def finish(self) -> dict[str, Any]:
        """
        Completes the index of a run of which no shard is missing, and returns it.

        Raises:
            ValueError: a shard is missing or damaged, or none holds a picture.
        """
        if missing := self.missing():
            raise ValueError(f"{shard_name(missing[0])} is missing in {self.folder}.")
        notes = [self._notes(number) for number in range(len(self.shards()))]
        if not any(count for count, _ in notes):
            raise ValueError(f"None of the {self.plan['pictures']} pictures could be read.")
        results = {
            "shards": [count for count, _ in notes],
            "skipped": [name for _, names in notes for name in names],
        }
        index = {**self.plan, **results}
        self._write_index(index)
        remove_parts(self.folder)
        return index

    def _notes(self, shard: int) -> tuple[int, list[str]]:
        """How many pictures a shard holds, and the names of those that were skipped."""
        with _opened(self.folder / shard_name(shard)) as file:
            count, *shape = file.get_slice("input_ids").get_shape()
            skipped = json.loads((file.metadata() or {}).get("skipped", "[]"))
        if tuple(shape) != self.shape or count + len(skipped) != len(self.shards()[shard]):
            raise ValueError(f"{self.folder / shard_name(shard)} is of another run; delete it and run again.")
        return count, skipped

    def _write_index(self, index: dict[str, Any]) -> None:
        text = json.dumps(index, ensure_ascii=False, indent=1) + "\n"
        write_whole(self.folder / INDEX, lambda path: path.write_text(text, encoding="utf-8"))


class TokenDataset(Dataset):
    """
    The pictures of a folder that `scripts/pretokenize.py` wrote. An item is what the models' `forward` takes, without
    the batch: `input_ids` and `labels` (tokens,) int64, `class_labels` () int64, -1 for none.

    Where a picture has several views, one of them is given, chosen by seed, epoch and picture alone, so that a resumed
    run sees those that an unbroken one would have seen. `Trainer` needs an [`EpochCallback`] to change them from epoch
    to epoch. The files are mapped into memory, not read.

    >>> rows = TokenDataset("tokens")
    >>> rows.check_fits(model)
    >>> Trainer(model, training_arguments("runs"), train_dataset=rows, callbacks=[EpochCallback(rows)])

    Args:
        folder: of the token files.
        seed: of the choice of views.
        view: give always this one instead, as an evaluation wants it; 0 is the plain picture, or with ten crops the
            upper left one.

    Attributes:
        index: the content of `tokens.json`.
        class_names: name of each class, `None` where the source had none.

    Raises:
        ValueError: no such folder, or its files are incomplete or damaged, or there is no such view.
    """

    def __init__(self, folder: str | os.PathLike, seed: int = 0, view: int | None = None):
        self.folder, self.seed, self.view = Path(folder), seed, view
        index = read_index(folder)
        if index is None:
            raise ValueError(
                f"{self.folder} holds no tokens (it has no {INDEX}); make them with scripts/pretokenize.py."
            )
        if "shards" not in index:
            raise ValueError(
                f"{self.folder} is not complete; run scripts/pretokenize.py again with the same options to go on."
            )
        self.index = index
        self.num_views: int = index["num_views"]
        self.class_names: list[str] | None = index["class_names"]
        if view is not None and not 0 <= view < self.num_views:
            raise ValueError(f"There is no view {view}; every picture has {self.num_views}, counted from 0.")
        for number in range(len(index["shards"])):
            if not (self.folder / shard_name(number)).is_file():
                raise ValueError(
                    f"{shard_name(number)} is missing in {self.folder}; run scripts/pretokenize.py again."
                )
        self._ends = list(accumulate(index["shards"]))
        self._shards: dict[int, dict[str, torch.Tensor]] = {}
        # Shared, so that workers of a loader which outlive an epoch learn of the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose views are given."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the views of this epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shard, row = self._place(index)
        ids = shard["input_ids"][row, self.view_of(index)].to(torch.int64)
        return {"input_ids": ids, "labels": ids.clone(), "class_labels": shard["class_labels"][row].clone()}

    def view_of(self, index: int) -> int:
        """The view of picture `index` that this epoch gives."""
        if self.view is not None:
            return self.view
        index = index + len(self) if index < 0 else index
        draw = hashlib.sha256(f"{self.seed} {self.epoch} {index}".encode()).digest()
        return int.from_bytes(draw[:8], "little") % self.num_views

    def number_of(self, index: int) -> int:
        """The number of picture `index` in the source; they differ after a damaged picture that was left out."""
        shard, row = self._place(index)
        return int(shard["numbers"][row])

    def check_fits(self, model: nn.Module) -> None:
        """
        Refuses a model whose tokens are not those of the files.

        Raises:
            ValueError: another codebook, grid or image tokenizer, or fewer classes.
        """
        config, index = model.config, self.index
        grids = [list(grid) for grid in config.grid_sizes]
        tokenizer = getattr(model, "image_tokenizer", None)
        for what, own, other in (
            ("a codebook of size", config.vocab_size, index["codebook_size"]),
            ("the token grids", grids, index["grid_sizes"]),
            (
                "an image tokenizer with the digest",
                index["tokenizer_sha256"] if tokenizer is None else tokenizer_digest(tokenizer),
                index["tokenizer_sha256"],
            ),
        ):
            if own != other:
                raise ValueError(
                    f"The model has {what} {_shown(own)}, the tokens in {self.folder} were made with {_shown(other)}; "
                    "tokenize the pictures with the tokenizer of the model."
                )
        names, num_classes = self.class_names, getattr(config, "num_classes", None)
        is_class_model = getattr(config, "condition_type", "class") == "class"
        if is_class_model and names is not None and num_classes is not None and len(names) > num_classes:
            raise ValueError(
                f"The model has {num_classes} classes, the tokens in {self.folder} have {len(names)}."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # another process maps the files itself

    def _place(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        """The tensors of a picture's shard, and its row in them."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no picture {index}; there are {len(self)}.")
        index = index + len(self) if index < 0 else index
        number = bisect_right(self._ends, index)
        start = self._ends[number] - self.index["shards"][number]
        if number not in self._shards:
            path = self.folder / shard_name(number)
            with _opened(path) as file:
                shard = {name: file.get_tensor(name) for name in ("input_ids", "class_labels", "numbers")}
            if any(len(tensor) != self.index["shards"][number] for tensor in shard.values()):
                raise ValueError(f"{path} does not fit its {INDEX}; tokenize the pictures again.")
            self._shards[number] = shard
        return self._shards[number], index - start


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it and run scripts/pretokenize.py again."
        ) from error


def _shown(value: Any) -> str:
    """A value of an index, short enough for a message."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
