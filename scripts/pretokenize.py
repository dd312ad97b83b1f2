"""
Tokenizes a set of pictures once, for training on the tokens as often as one likes.

    python scripts/pretokenize.py MODEL SOURCE OUTPUT [--views flip]

MODEL is the folder or Hub repository of one of our image tokenizers, or of a model that holds one. SOURCE is a folder
of pictures, with one subfolder per class or without classes; or a data set of the library `datasets`: its name on the
Hub, a folder with its tables, or one that `save_to_disk` wrote. OUTPUT is a folder that
`hf_argen.training.TokenDataset` opens.

Pictures are cut to size as the authors of the model cut theirs. `--views flip` adds the mirrored picture, `--views
ten-crop` takes four corners and the centre of a somewhat larger cut, each plain and mirrored, as LlamaGen and RAR are
trained; in training one view is chosen at a time.

A run that was killed goes on when the same command is given again, and ends with the files of an unbroken one.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from picture_sources import PictureSource, open_source
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_argen import AutoModelForImageGeneration
from hf_argen.auto import FAMILIES, Family, imported
from hf_argen.cli.opening import cannot_open
from hf_argen.modeling.loading import check_folder
from hf_argen.processors.base import ImageGenerationProcessor, flatten
from hf_argen.training import TokenWriter
from hf_argen.training.token_files import tokenizer_digest

VIEWS = {"one": 1, "flip": 2, "ten-crop": 10}
DTYPES = ("float32", "bfloat16", "float16")


class Picture(NamedTuple):
    """A picture on its way: its views (views, 3, height, width) in [-1, 1], or why it has none."""

    number: int
    pixel_values: torch.Tensor | None
    damage: str = ""


class Batch(NamedTuple):
    """The pictures of a batch that could be read: their numbers and all their views in one tensor; and the others."""

    numbers: list[int]
    pixel_values: torch.Tensor | None
    damages: list[str]


def together(pictures: list[Picture]) -> Batch:
    """One tensor rather than many, since each on its way from a worker takes an open file."""
    whole = [one for one in pictures if one.pixel_values is not None]
    pixels = torch.cat([one.pixel_values for one in whole]) if whole else None
    return Batch([one.number for one in whole], pixels, [one.damage for one in pictures if one.damage])


def views_of(
    image: Image.Image, processor: ImageGenerationProcessor, views: str, crop_range: float
) -> list[Image.Image]:
    """The views of a picture, in the order of the authors' code."""
    height, width = processor.image_size
    if views != "ten-crop":
        plain = processor.cut(image, height, width)
        return [plain] if views == "one" else [plain, ImageOps.mirror(plain)]
    larger = processor.cut(image, int(height * crop_range), int(width * crop_range))
    bottom, right = larger.height - height, larger.width - width
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return [
        picture.crop((left, top, left + width, top + height))
        for picture in (larger, ImageOps.mirror(larger))
        for top, left in corners
    ]


class Views(Dataset):
    """The pictures of a source as the tokenizer takes them; damaged ones are items, too."""

    def __init__(
        self, source: PictureSource, processor: ImageGenerationProcessor, views: str, crop_range: float
    ):
        self.source, self.processor, self.views, self.crop_range = source, processor, views, crop_range

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Picture:
        try:
            with self.source.open(number) as opened:
                image = flatten(opened)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file makes PIL raise nearly anything
            reason = " ".join(str(error).split()) or type(error).__name__
            return Picture(number, None, f"{self.source.name(number)} cannot be read ({reason})")
        views = views_of(image, self.processor, self.views, self.crop_range)
        return Picture(number, self.processor.preprocess(views))


def open_tokenizer(
    place: str, image_size: list[int] | None
) -> tuple[PreTrainedModel, ImageGenerationProcessor]:
    """
    The image tokenizer of a folder or repository, and the processor that brings pictures to its size.

    Args:
        image_size: one side or height and width of the pictures; `None`: those of the tokenizer's grid.

    Raises:
        ValueError: there is no tokenizer there, or it does not take this size.
    """
    path = Path(place).expanduser()
    if not path.exists() and (place.startswith((".", "/", "~")) or place.count("/") != 1):
        raise ValueError(f"There is no folder {place}.")
    place = str(path) if path.exists() else place
    check_folder(place)
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_open(place, error)) from error
    try:
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise ValueError(
                f"{place} holds a model of type {config.model_type!r}, which is none of hf_argen."
            )
        if family.generator is None:
            tokenizer = AutoModel.from_pretrained(place)
        else:
            tokenizer = AutoModelForImageGeneration.from_pretrained(place).image_tokenizer
    except OSError as error:
        raise ValueError(cannot_open(place, error)) from error
    if tokenizer is None:
        raise ValueError(f"{place} holds a model without image tokenizer; give the tokenizer itself.")
    if (
        not hasattr(tokenizer.config, "codebook_size")
        or getattr(tokenizer.config, "quantization", "vq") != "vq"
    ):
        raise ValueError(f"{type(tokenizer).__name__} gives latents, not ids; only ids can be written.")
    return tokenizer.eval(), picture_processor(FAMILIES[tokenizer.config.model_type], tokenizer, image_size)


def picture_processor(
    family: Family, tokenizer: PreTrainedModel, image_size: list[int] | None
) -> ImageGenerationProcessor:
    """The processor of an image tokenizer, for pictures of a size; see `open_tokenizer`."""
    config = tokenizer.config
    factor, grids = config.downsampling_factor, getattr(config, "grid_sizes", [])
    fixed = [side * factor for side in grids[-1]] if grids else None
    if hasattr(config, "image_size"):  # of tokenizers whose tokens are no grid
        fixed = [config.image_size] * 2
    size = fixed if image_size is None else (list(image_size) * 2)[:2]
    if size is None:
        raise ValueError(
            "This image tokenizer takes pictures of any size; say which, as in --image-size 256."
        )
    if fixed is not None and size != fixed:
        raise ValueError(
            f"--image-size is {size[0]}x{size[1]}, but this image tokenizer takes {fixed[0]}x{fixed[1]}; leave it out."
        )
    if any(side < 1 or side % factor for side in size):
        raise ValueError(f"--image-size is {size[0]}x{size[1]}; both sides must be multiples of {factor}.")
    return imported(family.picture_processor)(image_size=size)


def plan_of(
    options: argparse.Namespace,
    source: PictureSource,
    tokenizer: PreTrainedModel,
    processor: ImageGenerationProcessor,
) -> dict[str, Any]:
    """All that the tokens depend on, for `TokenWriter`."""
    config, size = tokenizer.config, processor.image_size
    if hasattr(config, "num_latent_tokens"):
        grids = [[1, config.num_latent_tokens]]
    else:
        grids = [list(grid) for grid in config.grid_sizes]
    return {
        "tokenizer": config.model_type,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "model": options.model,
        "source": options.source,
        "source_sha256": source.digest,
        "pictures": len(source),
        "class_names": source.class_names,
        "codebook_size": config.codebook_size,
        "grid_sizes": grids or [[side // config.downsampling_factor for side in size]],
        "image_size": list(size),
        "views": options.views,
        "num_views": VIEWS[options.views],
        "crop_range": options.crop_range if options.views == "ten-crop" else None,
        "dtype": options.dtype,
        "shard_size": options.shard_size,
    }


def tokenize(
    writer: TokenWriter, pictures: Views, tokenizer: PreTrainedModel, options: argparse.Namespace
) -> None:
    """Writes the shards that are missing."""
    shards, missing = writer.shards(), writer.missing()
    per_batch = max(1, options.batch_size // writer.shape[0])
    batches = {
        number: [list(shards[number][i : i + per_batch]) for i in range(0, len(shards[number]), per_batch)]
        for number in missing
    }
    loader = iter(
        DataLoader(
            pictures,
            batch_sampler=[batch for number in missing for batch in batches[number]],
            num_workers=options.workers,
            collate_fn=together,
        )
    )
    todo = sum(len(shards[number]) for number in missing)
    with tqdm(total=len(pictures), initial=len(pictures) - todo, unit="picture") as bar:
        for number in missing:
            numbers: list[int] = []
            ids = [torch.empty(0, *writer.shape, dtype=torch.int64)]
            skipped: list[str] = []
            for pictures_of_batch in batches[number]:
                batch = next(loader)
                if batch.damages and not options.skip_damaged:
                    raise ValueError(
                        f"{batch.damages[0]}; run again with --skip-damaged to go on without such pictures."
                    )
                numbers += batch.numbers
                skipped += batch.damages
                if batch.pixel_values is not None:
                    encoded = encode(batch.pixel_values, tokenizer, options.batch_size)
                    ids.append(encoded.unflatten(0, (len(batch.numbers), -1)))
                bar.update(len(pictures_of_batch))
            labels = [pictures.source.labels[number] for number in numbers]
            writer.write(number, torch.cat(ids), labels, numbers, skipped)


@torch.inference_mode()
def encode(pixel_values: torch.Tensor, tokenizer: PreTrainedModel, batch_size: int) -> torch.Tensor:
    """Ids (pictures, tokens) int64 on the CPU, a few pictures at once."""
    parts = [tokenizer.encode(part.to(tokenizer.device)) for part in pixel_values.split(batch_size)]
    return torch.cat(parts).cpu()


def check(options: argparse.Namespace) -> None:
    """Refuses options that mean nothing."""
    for name, least in (("batch_size", 1), ("shard_size", 1), ("workers", 0), ("crop_range", 1.0)):
        if getattr(options, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be {least} or above."
            )
    if options.image_size is not None and len(options.image_size) > 2:
        raise ValueError("--image-size takes one side, or height and width.")
    source = Path(options.source).expanduser()
    if source.is_dir() and options.output.expanduser().resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{options.output} lies inside of {options.source}; give a folder outside of it.")


def run(options: argparse.Namespace) -> None:
    """Does the whole work; bad input raises ValueError."""
    check(options)
    source = open_source(
        options.source, options.split, options.subset, options.image_column, options.label_column
    )
    tokenizer, processor = open_tokenizer(options.model, options.image_size)
    writer = TokenWriter(options.output.expanduser(), plan_of(options, source, tokenizer, processor))
    try:
        tokenizer.to(options.device, getattr(torch, options.dtype))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {options.device} cannot be used ({str(error).splitlines()[0]})."
        ) from error
    writer.begin()
    tokenize(writer, Views(source, processor, options.views, options.crop_range), tokenizer, options)
    index = writer.finish()
    for name in index["skipped"]:
        print(f"Left out: {name}")
    views, tokens = writer.shape
    classes = "no classes" if source.class_names is None else f"{len(source.class_names)} classes"
    print(f"{options.output}: {sum(index['shards'])} pictures, {classes}, {views} x {tokens} tokens each")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    parser.add_argument("--split", help="of a data set, as datasets takes it: train, train[:10%%], ...")
    parser.add_argument("--subset", help="of a data set that has several")
    parser.add_argument("--image-column", help="of a data set with several columns of pictures")
    parser.add_argument("--label-column", help="of a data set with several columns of classes")
    parser.add_argument("--views", choices=VIEWS, default="one")
    parser.add_argument(
        "--crop-range",
        type=float,
        default=1.1,
        help="of ten-crop: size of the cut that the crops are taken from",
    )
    parser.add_argument(
        "--image-size", type=int, nargs="+", metavar="PIXELS", help="of a tokenizer that takes any"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="pictures, views counted, that are tokenized at once"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shard-size", type=int, default=10_000, help="pictures per file")
    parser.add_argument("--workers", type=int, default=2, help="processes that read pictures; 0: none beside")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out pictures that cannot be read")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    try:
        run(options)
    except ValueError as error:
        raise SystemExit(f"pretokenize: {error}") from error


if __name__ == "__main__":
    main()
