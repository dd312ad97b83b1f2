"""Tokenizing a set of pictures to files."""

import io
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, Trainer

from hf_argen import AutoModelForImageGeneration, KlVaeModel, TitokModel
from hf_argen.auto import FAMILIES, imported, new_processor
from hf_argen.training import EpochCallback, TokenDataset, training_arguments

from ..helpers import kills as faults
from ..helpers.tiny import (
    kl_vae_config,
    llamagen_vq_config,
    tiny_llamagen,
    tiny_rar,
    tiny_var,
    titok_config,
)
from . import killed_work

MODELS = {"llamagen": tiny_llamagen, "rar": tiny_rar, "var": tiny_var}
COUNTS = {"blue": 3, "green": 2, "red": 4}
NUM_PICTURES = sum(COUNTS.values())


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("pretokenize")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder per family, and the tokenizer of LlamaGen alone, with and without grid."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        torch.manual_seed(len(name))
        make().save_pretrained(folder / name)
    tokenizer = AutoModelForImageGeneration.from_pretrained(folder / "llamagen").image_tokenizer
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.config.grid_size = None
    tokenizer.save_pretrained(folder / "tokenizer-any-size")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """An image folder of three classes, with a file that is no picture."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    noise = np.random.default_rng(0)
    for name, count in COUNTS.items():
        (folder / name / "more").mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(0, 256, (19 + number, 23, 3), dtype=np.uint8)
            place = folder / name / "more" if number == 1 else folder / name
            Image.fromarray(pixels).save(place / f"{number}.png")
    (folder / "red" / "notes.txt").write_text("not a picture")
    return folder


def opened(folder: Path) -> list[Image.Image]:
    """The pictures in the order of the files."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    return [Image.open(folder / file) for file in files]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(script, *arguments, workers: int = 0) -> None:
    script.run(script.parse([*map(str, arguments), "--device", "cpu", "--workers", str(workers)]))


@pytest.mark.parametrize("family", MODELS)
def test_tokens_are_those_of_the_model(script, models, pictures, family, tmp_path):
    run(script, models / family, pictures, tmp_path, "--views", "flip", "--batch-size", 4, "--shard-size", 4)
    model = AutoModelForImageGeneration.from_pretrained(models / family)
    pixels = new_processor(model.config).preprocess(opened(pictures))
    for view, expected in enumerate((pixels, pixels.flip(-1))):
        rows = TokenDataset(tmp_path, view=view)
        rows.check_fits(model)
        ids = torch.stack([rows[i]["input_ids"] for i in range(len(rows))])
        assert torch.equal(ids, model.encode_images(expected))
    assert rows.class_names == sorted(COUNTS)
    labels = [int(rows[i]["class_labels"]) for i in range(len(rows))]
    assert labels == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_a_tokenizer_alone_gives_the_same_files(script, models, pictures, tmp_path):
    run(script, models / "llamagen", pictures, tmp_path, workers=2)
    before = contents(tmp_path)
    for name, options in (("tokenizer", ()), ("tokenizer-any-size", ("--image-size", 8))):
        run(script, models / name, pictures, tmp_path, *options)  # goes on, with nothing left to do
        (tmp_path / "tokens-00000.safetensors").unlink()
        run(script, models / name, pictures, tmp_path, *options)
        assert contents(tmp_path) == before


def test_ten_crops(script, models, pictures, tmp_path):
    run(script, models / "llamagen", pictures, tmp_path, "--views", "ten-crop", "--crop-range", "1.7")
    model = AutoModelForImageGeneration.from_pretrained(models / "llamagen")
    processor = new_processor(model.config)
    larger = [np.asarray(processor.cut(picture, 13, 13)) for picture in opened(pictures)]
    places = [(0, 0), (0, 5), (5, 0), (5, 5), (2, 2)]  # 2.5 is rounded to the even number
    for view in range(10):
        pixels = np.stack([picture[:, ::-1] if view >= 5 else picture for picture in larger])
        top, left = places[view % 5]
        cut = torch.from_numpy(pixels[:, top : top + 8, left : left + 8].copy()).permute(0, 3, 1, 2)
        rows = TokenDataset(tmp_path, view=view)
        ids = torch.stack([rows[i]["input_ids"] for i in range(len(rows))])
        assert torch.equal(ids, model.encode_images(cut.float() / 127.5 - 1))


def test_pictures_of_another_shape_and_type(script, models, pictures, tmp_path):
    options = ("--image-size", 8, 12, "--dtype", "bfloat16", "--shard-size", 100)
    run(script, models / "tokenizer-any-size", pictures, tmp_path, *options)
    rows = TokenDataset(tmp_path)
    assert rows.index["grid_sizes"] == [[4, 6]] and rows.index["dtype"] == "bfloat16"
    tokenizer = AutoModel.from_pretrained(models / "tokenizer-any-size").to(torch.bfloat16)
    processor = imported(FAMILIES["llamagen_vq"].picture_processor)(image_size=(8, 12))
    expected = tokenizer.encode(processor.preprocess(opened(pictures)))
    assert torch.equal(torch.stack([rows[i]["labels"] for i in range(len(rows))]), expected)


def test_a_folder_without_classes(script, models, pictures, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, picture in enumerate(opened(pictures)):
        picture.save(flat / f"{number}.PNG")
    run(script, models / "llamagen", flat, tmp_path / "tokens")
    rows = TokenDataset(tmp_path / "tokens")
    assert rows.class_names is None and len(rows) == NUM_PICTURES
    assert {int(rows[i]["class_labels"]) for i in range(len(rows))} == {-1}
    assert "9 pictures, no classes, 1 x 16 tokens each" in capsys.readouterr().out


def test_every_tokenizer_has_its_way_of_cutting_pictures():
    tokenizers = [family for family in FAMILIES.values() if family.generator is None]
    assert tokenizers
    for family in tokenizers:
        assert hasattr(imported(family.picture_processor), "cut"), family.name


def test_tokens_that_are_no_grid(script, pictures, tmp_path):
    """TiTok's, in one row; tokenizers of latents are refused before anything is read."""
    torch.manual_seed(0)
    TitokModel(titok_config()).save_pretrained(tmp_path / "titok")
    run(script, tmp_path / "titok", pictures, tmp_path / "tokens")
    assert TokenDataset(tmp_path / "tokens")[0]["input_ids"].shape == (5,)
    for name, latents in (
        ("kl", KlVaeModel(kl_vae_config(grid_size=4))),
        ("vae", TitokModel(titok_config(quantization="vae", legacy=False, pixel_decoder_config=None))),
    ):
        latents.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="gives latents, not ids; only ids can be written"):
            run(script, tmp_path / name, pictures, tmp_path / "none")


# Kills


def test_a_killed_run_ends_as_an_unbroken_one(script, models, pictures, tmp_path, kills):
    model = models / "tokenizer"
    options = ("--views", "flip", "--shard-size", "2", "--batch-size", "4")
    inside = (*options, "--workers", "0", "--device", "cpu")
    _, changes = faults.run(killed_work.pretokenize, model, pictures, tmp_path / "unbroken", *inside)
    expected = contents(tmp_path / "unbroken")
    assert len(expected) == 6
    moments = sorted({round(1 + i * (changes - 2) / max(kills - 1, 1)) for i in range(kills)})
    for moment in moments:
        out = tmp_path / f"killed-{moment}"
        assert faults.kill_at_change(killed_work.pretokenize, (model, pictures, out, *inside), moment)
        found = contents(out) if out.exists() else {}
        assert all(
            expected[name] == content for name, content in found.items() if name.endswith(".safetensors")
        )
        if found.get("tokens.json") != expected["tokens.json"]:  # nothing was left to do but to clear up
            with pytest.raises(ValueError, match=r"is not complete|holds no tokens"):
                TokenDataset(out)
        run(script, model, pictures, out, *options)
        assert contents(out) == expected


def test_whole_shards_are_not_made_again(script, models, pictures, tmp_path, monkeypatch):
    run(script, models / "tokenizer", pictures, tmp_path, "--shard-size", 4)
    (tmp_path / "tokens-00001.safetensors").unlink()
    read = []
    original = script.Views.__getitem__
    monkeypatch.setattr(
        script.Views, "__getitem__", lambda self, number: read.append(number) or original(self, number)
    )
    run(script, models / "tokenizer", pictures, tmp_path, "--shard-size", 4)
    assert read == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("rar", (), "was begun with tokenizer llamagen_vq, not maskgit_vq"),
        ("llamagen", ("--views", "flip"), "was begun with views one, not flip"),
        ("llamagen", ("--dtype", "bfloat16"), "was begun with dtype float32, not bfloat16"),
        ("llamagen", ("--shard-size", "7"), "was begun with shard_size 10000, not 7"),
    ],
)
def test_another_run_is_refused(script, models, pictures, tmp_path, model, options, message):
    run(script, models / "llamagen", pictures, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(script, models / model, pictures, tmp_path, *options)
    assert contents(tmp_path) == before


def test_other_weights_and_other_pictures_are_refused(script, models, pictures, tmp_path):
    run(script, models / "tokenizer", pictures, tmp_path / "tokens")
    torch.manual_seed(5)
    AutoModel.from_config(llamagen_vq_config(grid_size=4)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was begun with tokenizer_sha256"):
        run(script, tmp_path / "other", pictures, tmp_path / "tokens")
    fewer = tmp_path / "fewer"
    for name in ("a", "b"):
        (fewer / name).mkdir(parents=True)
        opened(pictures)[0].save(fewer / name / "0.png")
    with pytest.raises(ValueError, match="was begun with source_sha256"):
        run(script, models / "tokenizer", fewer, tmp_path / "tokens")


# Damaged pictures


@pytest.fixture
def damaged(pictures, tmp_path) -> Path:
    """A flat folder of seven files, three of which are no pictures."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for number, picture in enumerate(opened(pictures)[:4]):
        picture.save(folder / f"{2 * number}.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "1.png").write_bytes(b"")
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "5.jpg").write_bytes(b"<html>not found</html>")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture(script, models, damaged, tmp_path, capsys, workers):
    out = tmp_path / "tokens"
    with pytest.raises(ValueError, match=r"1\.png cannot be read \(.*\); run again with --skip-damaged"):
        run(script, models / "tokenizer", damaged, out, "--shard-size", 3, workers=workers)
    assert sorted(contents(out)) == ["tokens.json"]
    # The run that stopped is gone on with.
    run(script, models / "tokenizer", damaged, out, "--shard-size", 3, "--skip-damaged", workers=workers)
    rows = TokenDataset(out)
    assert [rows.number_of(i) for i in range(len(rows))] == [0, 2, 4, 6]
    assert rows.index["shards"] == [2, 1, 1]
    printed = capsys.readouterr().out
    for name in ("1.png", "3.png", "5.jpg"):
        assert f"Left out: {damaged / name} cannot be read (" in printed
    assert "4 pictures, no classes" in printed


def test_nothing_but_damaged_pictures(script, models, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "0.png").touch()
    with pytest.raises(ValueError, match="None of the 1 pictures could be read"):
        run(script, models / "tokenizer", folder, tmp_path / "tokens", "--skip-damaged")
    with pytest.raises(ValueError, match="is not complete"):
        TokenDataset(tmp_path / "tokens")


# Data sets of the library


def rows_of(pictures: Path, damage: int | None = None) -> datasets.Dataset:
    """The same pictures as a data set, one of them damaged."""

    def encoded(picture):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    cells = [encoded(picture) for picture in opened(pictures)]
    if damage is not None:
        cells[damage]["bytes"] = cells[damage]["bytes"][:50]
    labels = [label for label, count in enumerate(COUNTS.values()) for _ in range(count)]
    kinds = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(COUNTS)),
        "number": datasets.Value("int64"),
        "text": datasets.Value("string"),
    }
    columns = {"image": cells, "label": labels, "number": labels, "text": ["a"] * len(cells)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


@pytest.fixture
def saved(pictures, tmp_path, monkeypatch) -> dict[str, Path]:
    """The data set in every form that lies in a folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = rows_of(pictures)
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "tables").mkdir()
    rows.to_parquet(tmp_path / "tables" / "train-00000-of-00001.parquet")
    return {name: tmp_path / name for name in ("plain", "splits", "tables")}


def test_a_data_set_gives_the_tokens_of_the_folder(script, models, pictures, saved, tmp_path):
    run(script, models / "tokenizer", pictures, tmp_path / "of-folder")
    expected = contents(tmp_path / "of-folder")
    for name, options in (
        ("plain", ()),
        ("splits", ("--split", "train")),
        ("tables", ()),
        ("tables", ("--split", "train", "--image-column", "image", "--label-column", "label")),
    ):
        out = tmp_path / f"of-{name}"
        run(script, models / "tokenizer", saved[name], out, *options)
        found = contents(out)
        assert found["tokens-00000.safetensors"] == expected["tokens-00000.safetensors"]
        assert TokenDataset(out).class_names == list(COUNTS)
    # The forms are one data set, of which any goes on with the run of another.
    run(script, models / "tokenizer", saved["plain"], out)
    run(script, models / "tokenizer", saved["splits"], tmp_path / "one", "--split", "test", workers=1)
    assert len(TokenDataset(tmp_path / "one")) == 1
    run(script, models / "tokenizer", saved["plain"], tmp_path / "number", "--label-column", "number")
    rows = TokenDataset(tmp_path / "number")
    assert rows.class_names is None and int(rows[8]["class_labels"]) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("splits", (), "has the splits train, test; give one as --split"),
        ("splits", ("--split", "dev"), "has the splits train, test, but not 'dev'; give one as --split"),
        ("plain", ("--split", "train"), "was saved as one split; leave out --split train"),
        ("plain", ("--subset", "small"), "was saved without subsets; leave out --subset small"),
        ("tables", ("--split", "dev"), 'cannot be opened: Unknown split "dev"'),
        (
            "plain",
            ("--image-column", "picture"),
            r"has no column 'picture' \(--image-column\); its columns are",
        ),
        ("plain", ("--image-column", "text"), "The column 'text' of .* holds no pictures"),
        ("plain", ("--label-column", "text"), "The column 'text' of .* holds no classes or whole numbers"),
    ],
)
def test_what_a_data_set_has_not(script, models, saved, tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        run(script, models / "tokenizer", saved[name], tmp_path / "tokens", *options)
    assert not (tmp_path / "tokens").exists()


def test_a_damaged_row(script, models, pictures, tmp_path):
    rows_of(pictures, damage=5).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"row 5 of .*rows cannot be read"):
        run(script, models / "tokenizer", tmp_path / "rows", tmp_path / "tokens")


def test_columns_that_could_be_several(script, models, pictures, tmp_path):
    rows = rows_of(pictures)
    second = rows.select_columns(["image"]).rename_column("image", "second")
    datasets.concatenate_datasets([rows, second], axis=1).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="has the columns image, second; give one as --image-column"):
        run(script, models / "tokenizer", tmp_path / "two", tmp_path / "tokens")
    rows.select_columns(["label"]).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="has no column of pictures; its columns are label"):
        run(script, models / "tokenizer", tmp_path / "none", tmp_path / "tokens")


def test_without_the_library(script, models, saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source, what in (
        (saved["plain"], "is no folder of pictures"),
        ("someone/cats", "There is no folder"),
    ):
        with pytest.raises(ValueError, match=rf"{what}.*install it with: pip install 'hf-argen\[train\]'"):
            run(script, models / "tokenizer", source, tmp_path / "tokens")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "0"), "--batch-size is 0; it must be 1 or above"),
        (("--shard-size", "0"), "--shard-size is 0; it must be 1 or above"),
        (("--crop-range", "0.9"), "--crop-range is 0.9; it must be 1.0 or above"),
        (("--image-size", "16"), "--image-size is 16x16, but this image tokenizer takes 8x8; leave it out"),
        (("--image-size", "8", "8", "8"), "--image-size takes one side, or height and width"),
        (("--split", "train"), "is a folder of pictures, where --split train means nothing"),
        (("--device", "abacus"), "--device abacus cannot be used"),
    ],
)
def test_bad_options(script, models, pictures, tmp_path, options, message):
    arguments = [
        str(models / "tokenizer"),
        str(pictures),
        str(tmp_path / "tokens"),
        "--workers",
        "0",
        *options,
    ]
    with pytest.raises(ValueError, match=message):
        script.run(script.parse(arguments))
    assert not (tmp_path / "tokens").exists()


def test_bad_models(script, models, pictures, tmp_path):
    for model, options, message in (
        ("./missing", (), r"There is no folder \./missing"),
        ("someone/missing", (), "There is no folder 'someone/missing', and as a repository of the Hub it"),
        (pictures, (), "cannot be opened"),
        (models / "tokenizer-any-size", (), "takes pictures of any size; say which, as in --image-size 256"),
        (models / "tokenizer-any-size", ("--image-size", 9), "is 9x9; both sides must be multiples of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(script, model, pictures, tmp_path / "tokens", *options)
    bare = tiny_llamagen(image_tokenizer_config=None, vocab_size=16, grid_size=4)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="holds a model without image tokenizer; give the tokenizer itself"):
        run(script, tmp_path / "bare", pictures, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_bad_sources(script, models, pictures, tmp_path):
    empty, mixed, hollow = (tmp_path / name for name in ("empty", "mixed", "hollow"))
    for folder in (empty, mixed / "class", hollow / "class"):
        folder.mkdir(parents=True)
    opened(pictures)[0].save(mixed / "0.png")
    opened(pictures)[0].save(hollow / "class" / "0.png")
    (hollow / "without").mkdir()
    for source, message in (
        ("./missing", r"There is no folder \./missing"),
        (models / "tokenizer" / "config.json", "is a file; give a folder, or the name of a data set"),
        (empty, "holds no pictures"),
        (mixed, r"holds pictures \(0.png\) beside the folder 'class'"),
        (hollow, "The class 'without' of .* holds no pictures; remove it, or put some there"),
        ("someone/missing", "The data set someone/missing cannot be opened"),
    ):
        with pytest.raises(ValueError, match=message):
            run(script, models / "tokenizer", source, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()
    with pytest.raises(ValueError, match=r"lies inside of .*; give a folder outside of it"):
        run(script, models / "tokenizer", pictures, pictures / "tokens")
    with pytest.raises(ValueError, match="is not empty and holds no tokens; give another folder"):
        run(script, models / "tokenizer", pictures, models)


def test_the_command_ends_with_one_sentence(script, models, tmp_path, monkeypatch):
    arguments = ["pretokenize.py", str(models / "tokenizer"), "./missing", str(tmp_path / "tokens")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == f"pretokenize: There is no folder .{os.sep}missing."


def test_a_model_trains_on_the_files(script, models, pictures, tmp_path):
    run(script, models / "llamagen", pictures, tmp_path / "tokens", "--views", "flip")
    model = AutoModelForImageGeneration.from_pretrained(models / "llamagen")
    rows, plain = TokenDataset(tmp_path / "tokens"), TokenDataset(tmp_path / "tokens", view=0)
    rows.check_fits(model)
    arguments = training_arguments(
        tmp_path / "runs",
        num_train_epochs=12,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=plain, callbacks=[EpochCallback(rows)]
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert rows.epoch == 11
