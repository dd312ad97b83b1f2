"""Where pictures with classes come from: a folder of files, or a data set of the library `datasets`."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TABLES = {".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".zip"}
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` leaves
SAMPLES = 64  # pictures whose content goes into the digest of a data set


class PictureSource(ABC):
    """
    Numbered pictures.

    Attributes:
        labels: class of each picture, -1 for none.
        class_names: name of each class; `None` where classes have no names, or there are none.
        digest: changes when the pictures do.
    """

    labels: list[int]
    class_names: list[str] | None
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, number: int) -> Image.Image:
        """A picture, not yet decoded; a damaged one raises here or when it is used."""

    @abstractmethod
    def name(self, number: int) -> str:
        """The name of a picture, to tell which one it is."""


class FolderPictures(PictureSource):
    """
    The picture files of a folder in the order of their names: those of its subfolders, each a class, or without
    subfolders its own, without classes. Names of files and classes are compared letter by letter, so that the folders
    of ImageNet give the usual ids. The digest is that of the names and sizes of the files.

    Raises:
        ValueError: no pictures, a class without pictures, or pictures beside classes.
    """

    def __init__(self, root: Path):
        self.root = root
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
        own = sorted(path.name for path in root.iterdir() if path.is_file() and _is_picture(path.name))
        if own and folders:
            raise ValueError(
                f"{root} holds pictures ({own[0]}) beside the folder {folders[0]!r}; give a folder with one subfolder "
                "per class, or one without subfolders."
            )
        self.class_names = folders or None
        self.files, self.labels = own, [-1] * len(own)
        for label, folder in enumerate(folders):
            found = sorted(_pictures_below(root, folder))
            if not found:
                raise ValueError(
                    f"The class {folder!r} of {root} holds no pictures; remove it, or put some there."
                )
            self.files += found
            self.labels += [label] * len(found)
        if not self.files:
            raise ValueError(f"{root} holds no pictures ({', '.join(sorted(PICTURES))}).")
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file}\t{(root / file).stat().st_size}\n".encode(errors="surrogateescape"))
        self.digest = digest.hexdigest()

    def open(self, number: int) -> Image.Image:
        return Image.open(self.root / self.files[number])

    def name(self, number: int) -> str:
        return str(self.root / self.files[number])


class DatasetPictures(PictureSource):
    """
    The rows of a data set of `datasets`. The digest is that of all labels and of the content of some pictures.

    Args:
        dataset: a map-style `datasets.Dataset`.
        source: its name, for messages.
        image_column: column of the pictures; `None`: the only one of the type `Image`.
        label_column: column of the classes; `None`: the only one of the type `ClassLabel`, if there is one.

    Raises:
        ValueError: no such column, more than one that it could be, or a column of another type.
    """

    def __init__(
        self, dataset: Any, source: str, image_column: str | None = None, label_column: str | None = None
    ):
        import datasets

        self.source, features = source, dataset.features
        self.image_column = _column(source, features, "--image-column", image_column, datasets.Image)
        if self.image_column is None:
            raise ValueError(f"{source} has no column of pictures; its columns are {', '.join(features)}.")
        label_column = _column(source, features, "--label-column", label_column, datasets.ClassLabel)
        self.labels, self.class_names = [-1] * len(dataset), None
        if label_column is not None:
            self.labels = _labels(source, label_column, dataset[label_column])
            self.class_names = getattr(features[label_column], "names", None)
        self.rows = dataset.select_columns([self.image_column]).cast_column(
            self.image_column, datasets.Image(decode=False)
        )
        if not len(self):
            raise ValueError(f"{source} has no rows.")
        digest = hashlib.sha256(repr((self.class_names, self.labels)).encode())
        for sample in range(min(SAMPLES, len(self))):
            digest.update(hashlib.sha256(self._content(sample * len(self) // SAMPLES)).digest())
        self.digest = digest.hexdigest()

    def open(self, number: int) -> Image.Image:
        return Image.open(io.BytesIO(self._content(number)))

    def name(self, number: int) -> str:
        path = self.rows[number][self.image_column]["path"]
        return f"row {number} of {self.source}" + (f" ({path})" if path else "")

    def _content(self, number: int) -> bytes:
        cell = self.rows[number][self.image_column] or {"bytes": b"", "path": None}
        if cell["bytes"] is None:
            return Path(cell["path"]).read_bytes() if cell["path"] else b""
        return cell["bytes"]


def open_source(
    source: str,
    split: str | None = None,
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> PictureSource:
    """
    The pictures that a name means: an image folder, a folder that `datasets` saved or can read, or the name of one of
    its data sets.

    Raises:
        ValueError: there is no such source, or it does not fit the other arguments.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not _is_of_datasets(path):
        given = {
            "--split": split,
            "--subset": subset,
            "--image-column": image_column,
            "--label-column": label_column,
        }
        for option, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{source} is a folder of pictures, where {option} {value} means nothing; leave it out."
                )
        return FolderPictures(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{source} is a file; give a folder, or the name of a data set.")
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"There is no folder {source}.")
    dataset = _load(source, path, split, subset)
    return DatasetPictures(dataset, source, image_column, label_column)


def _load(source: str, path: Path, split: str | None, subset: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        what = f"{source} is no folder of pictures" if path.is_dir() else f"There is no folder {source}"
        raise ValueError(
            f"{what}, and data sets need the library datasets; install it with: pip install 'hf-argen[train]'"
        ) from error
    try:
        if (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file():
            if subset is not None:
                raise ValueError(f"it was saved without subsets; leave out --subset {subset}")
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.Dataset):
                if split is not None:
                    raise ValueError(f"it was saved as one split; leave out --split {split}")
                return loaded
        else:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else source, subset, split=split)
            if isinstance(loaded, datasets.Dataset):
                return loaded
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"The data set {source} cannot be opened: {lines[0]}") from error
    split = next(iter(loaded)) if split is None and len(loaded) == 1 else split
    if split not in loaded:
        asked = "" if split is None else f", but not {split!r}"
        raise ValueError(f"{source} has the splits {', '.join(loaded)}{asked}; give one as --split.")
    return loaded[split]


def _column(source: str, features: Any, option: str, asked: str | None, kind: type) -> str | None:
    if asked is None:
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(found) > 1:
            raise ValueError(f"{source} has the columns {', '.join(found)}; give one as {option}.")
        return found[0] if found else None
    if asked not in features:
        raise ValueError(
            f"{source} has no column {asked!r} ({option}); its columns are {', '.join(features)}."
        )
    is_number = option == "--label-column" and "int" in str(getattr(features[asked], "dtype", ""))
    if not isinstance(features[asked], kind) and not is_number:
        wanted = "classes or whole numbers" if option == "--label-column" else "pictures"
        raise ValueError(f"The column {asked!r} of {source} holds no {wanted}; give another as {option}.")
    return asked


def _labels(source: str, column: str, values: Any) -> list[int]:
    labels = [-1 if value is None else int(value) for value in values]
    if labels and min(labels) < -1:
        raise ValueError(
            f"The column {column!r} of {source} holds {min(labels)}; classes count from 0, -1 for none."
        )
    return labels


def _is_of_datasets(path: Path) -> bool:
    """Whether a folder is for `datasets`: saved by it, or with tables and without pictures."""
    if (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file():
        return True
    has_tables = False
    for _, _, files in os.walk(path, followlinks=True):
        if any(map(_is_picture, files)):
            return False
        has_tables |= any(Path(file).suffix.lower() in TABLES for file in files)
    return has_tables


def _pictures_below(root: Path, folder: str) -> Iterator[str]:
    """Paths of the pictures of a class, seen from `root`."""
    for place, folders, files in os.walk(root / folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from ((Path(place) / name).relative_to(root).as_posix() for name in files if _is_picture(name))


def _is_picture(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in PICTURES
