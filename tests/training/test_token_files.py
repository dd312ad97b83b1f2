"""Token files, and training from them."""

import json
import pickle
import shutil
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_argen.training import EpochCallback, TokenDataset, TokenWriter, training_arguments
from hf_argen.training.token_files import shard_name, token_dtype, tokenizer_digest

from ..helpers.tiny import llamagen_config, tiny_llamagen, tiny_rar, tiny_var

PICTURES, SHARD, VIEWS, TOKENS = 10, 4, 3, 16
IDS = torch.arange(PICTURES * VIEWS * TOKENS).reshape(PICTURES, VIEWS, TOKENS) * 7 % 16


def plan(**changes):
    fields = {
        "tokenizer": "llamagen_vq",
        "tokenizer_sha256": "0",
        "source_sha256": "0",
        "pictures": PICTURES,
        "class_names": ["a", "b", "c"],
        "codebook_size": 16,
        "grid_sizes": [[4, 4]],
        "num_views": VIEWS,
        "shard_size": SHARD,
    }
    return {**fields, **changes}


def write(folder, numbers=range(PICTURES), skipped=(), **changes):
    """Writes all shards that are missing, without the pictures whose number is not among `numbers`."""
    writer = TokenWriter(folder, plan(**changes))
    writer.begin()
    for shard in writer.missing():
        kept = [number for number in writer.shards()[shard] if number in numbers]
        lost = [f"picture {number}" for number in writer.shards()[shard] if number not in numbers]
        writer.write(shard, IDS[kept], [number % 3 for number in kept], kept, lost)
    return writer.finish()


def views_of_an_epoch(rows, epoch):
    rows.set_epoch(epoch)
    return [rows.view_of(index) for index in range(len(rows))]


def test_what_was_written_is_read(tmp_path):
    index = write(tmp_path / "tokens")
    assert index["shards"] == [4, 4, 2] and index["skipped"] == []
    rows = TokenDataset(tmp_path / "tokens")
    assert len(rows) == PICTURES and rows.class_names == ["a", "b", "c"]
    for number in (0, 3, 4, 9):
        item = rows[number]
        assert torch.equal(item["input_ids"], IDS[number, rows.view_of(number)])
        assert torch.equal(item["labels"], item["input_ids"])
        assert item["class_labels"].item() == number % 3 and item["class_labels"].ndim == 0
        assert {tensor.dtype for tensor in item.values()} == {torch.int64}
    item["input_ids"].zero_()  # the files stay as they are
    assert torch.equal(TokenDataset(tmp_path / "tokens")[9]["labels"], item["labels"])
    assert torch.equal(rows[-1]["labels"], item["labels"])
    assert rows.view_of(-1) == rows.view_of(9)
    for index in (PICTURES, -PICTURES - 1):
        with pytest.raises(IndexError, match="there are 10"):
            rows[index]


@pytest.mark.parametrize(
    ("codebook_size", "dtype"),
    [
        (256, torch.uint8),
        (257, torch.uint16),
        (65536, torch.uint16),
        (65537, torch.int32),
        (2**32, torch.int64),
    ],
)
def test_the_largest_id_survives(codebook_size, dtype, tmp_path):
    assert token_dtype(codebook_size) == dtype
    sizes = {"codebook_size": codebook_size, "pictures": 1, "num_views": 1, "grid_sizes": [[1, 2]]}
    writer = TokenWriter(tmp_path, plan(**sizes))
    writer.begin()
    writer.write(0, torch.tensor([[[0, codebook_size - 1]]]), [-1], [0])
    writer.finish()
    assert TokenDataset(tmp_path)[0]["input_ids"].tolist() == [0, codebook_size - 1]
    with pytest.raises(ValueError, match=f"ids lie between 0 and {codebook_size}; the codebook has"):
        writer.write(0, torch.tensor([[[0, codebook_size]]]), [-1], [0])


def test_left_out_pictures_leave_no_gap(tmp_path):
    whole = {0, 2, 3, 8, 9}  # of the second shard none
    index = write(tmp_path, whole)
    assert index["shards"] == [3, 0, 2]
    assert index["skipped"] == ["picture 1", "picture 4", "picture 5", "picture 6", "picture 7"]
    rows = TokenDataset(tmp_path, view=0)
    assert [rows.number_of(i) for i in range(len(rows))] == sorted(whole)
    assert all(torch.equal(rows[i]["labels"], IDS[number, 0]) for i, number in enumerate(sorted(whole)))
    with pytest.raises(ValueError, match="None of the 10 pictures could be read"):
        write(tmp_path / "none", set())


def test_views_follow_from_seed_epoch_and_picture(tmp_path):
    write(tmp_path)
    rows, again, other = (TokenDataset(tmp_path, seed=seed) for seed in (0, 0, 1))
    epochs = [views_of_an_epoch(rows, epoch) for epoch in range(40)]
    assert [views_of_an_epoch(again, epoch) for epoch in range(40)] == epochs
    assert [views_of_an_epoch(other, epoch) for epoch in range(40)] != epochs
    assert all(one != following for one, following in pairwise(epochs))
    counts = torch.bincount(torch.tensor(epochs).flatten(), minlength=VIEWS)
    assert ((counts - 400 / VIEWS).abs() < 40).all()  # four standard deviations
    assert {tuple(views_of_an_epoch(TokenDataset(tmp_path, view=2), epoch)) for epoch in range(3)} == {
        (2,) * PICTURES
    }


def test_workers_that_outlive_an_epoch_learn_of_the_next(tmp_path):
    write(tmp_path)
    rows = TokenDataset(tmp_path)
    rows[0]  # the mapped files do not stand in the way
    loader = DataLoader(rows, batch_size=5, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        views = views_of_an_epoch(rows, epoch)
        seen = torch.cat([batch["input_ids"] for batch in loader])
        assert torch.equal(seen, IDS[range(PICTURES), views])
    assert torch.equal(pickle.loads(pickle.dumps(rows))[7]["labels"], rows[7]["labels"])


def test_a_writer_goes_on(tmp_path):
    write(tmp_path / "whole")
    writer = TokenWriter(tmp_path / "part", plan())
    writer.begin()
    writer.write(1, IDS[4:8], [number % 3 for number in range(4, 8)], range(4, 8))
    with pytest.raises(ValueError, match="is not complete; run"):
        TokenDataset(tmp_path / "part")
    with pytest.raises(ValueError, match=r"tokens-00000\.safetensors is missing"):
        writer.finish()
    before = (tmp_path / "part" / shard_name(1)).stat().st_ino
    (tmp_path / "part" / ".tokens-00002.safetensors.1.part").touch()  # of a process that was killed
    write(tmp_path / "part")
    assert (tmp_path / "part" / shard_name(1)).stat().st_ino == before
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    write(tmp_path / "part")
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": "1"}, "was begun with tokenizer_sha256 0, not 1"),
        ({"source_sha256": "1"}, "was begun with source_sha256 0, not 1"),
        ({"shard_size": 5}, "was begun with shard_size 4, not 5"),
        ({"class_names": None}, r"was begun with class_names \['a', 'b', 'c'\], not none"),
    ],
)
def test_another_run_is_refused(changes, message, tmp_path):
    write(tmp_path, source="here")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        TokenWriter(tmp_path, plan(**changes)).begin()
    TokenWriter(tmp_path, plan(source="moved")).begin()
    assert contents(tmp_path) == before


def damage(name, content):
    def change(folder):
        (folder / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"holds no tokens \(it has no tokens.json\)"),
        (damage("tokens.json", b"{"), r"tokens.json cannot be read \(.*\); delete the folder"),
        (damage("tokens.json", b"[]"), "is no index of token files"),
        (
            damage("tokens.json", b'{"format": 2}'),
            "has the format 2; this version of hf_argen reads format 1",
        ),
        (lambda folder: (folder / shard_name(1)).unlink(), "tokens-00001.safetensors is missing in"),
        (damage(shard_name(1), b"1234567890"), "tokens-00001.safetensors cannot be read"),
        (
            lambda folder: shutil.copy(folder / shard_name(2), folder / shard_name(1)),
            "tokens-00001.safetensors does not fit its tokens.json",
        ),
    ],
)
def test_damaged_files(change, message, tmp_path):
    write(tmp_path / "tokens")
    change(tmp_path / "tokens")
    with pytest.raises(ValueError, match=message):
        TokenDataset(tmp_path / "tokens")[5]


def test_a_damaged_shard_is_not_gone_on_with(tmp_path):
    write(tmp_path)
    (tmp_path / shard_name(1)).write_bytes((tmp_path / shard_name(1)).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"tokens-00001\.safetensors cannot be read .* delete it and run"):
        write(tmp_path)
    (tmp_path / shard_name(1)).unlink()
    shutil.copy(tmp_path / shard_name(2), tmp_path / shard_name(1))
    with pytest.raises(ValueError, match=r"tokens-00001\.safetensors is of another run; delete it"):
        write(tmp_path)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="A shard shall hold 0 pictures; give 1 or more"):
        TokenWriter(tmp_path, plan(shard_size=0))
    with pytest.raises(ValueError, match="There are no pictures to tokenize"):
        TokenWriter(tmp_path, plan(pictures=0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no tokens; give another folder"):
        TokenWriter(tmp_path / "full", plan()).begin()
    with pytest.raises(ValueError, match=r"notes.txt is a file; give a folder"):
        TokenWriter(tmp_path / "full" / "notes.txt", plan()).begin()
    with pytest.raises(ValueError, match="cannot be made"):
        TokenWriter(tmp_path / "full" / "notes.txt" / "deeper", plan()).begin()
    writer = TokenWriter(tmp_path / "tokens", plan())
    writer.begin()
    with pytest.raises(ValueError, match=r"ids of the shape \(4, 3, 15\); expected \(4, 3, 16\)"):
        writer.write(0, IDS[:4, :, 1:], [0] * 4, range(4))
    with pytest.raises(ValueError, match="4 pictures have 3 labels"):
        writer.write(0, IDS[:4], [0] * 3, range(4))
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["tokens.json"]
    write(tmp_path / "tokens")
    with pytest.raises(ValueError, match="There is no view 3; every picture has 3, counted from 0"):
        TokenDataset(tmp_path / "tokens", view=3)
    with pytest.raises(ValueError, match="list has no set_epoch"):
        EpochCallback([])


@pytest.mark.parametrize("make", [tiny_llamagen, tiny_rar, tiny_var])
def test_tokens_have_to_fit_the_model(make, tmp_path):
    model = make()
    digest = tokenizer_digest(model.image_tokenizer)
    grids = [list(grid) for grid in model.config.grid_sizes]
    own = {"tokenizer_sha256": digest, "grid_sizes": grids, "num_views": 1, "pictures": 1}
    for case, (changes, message) in enumerate(
        [
            ({}, None),
            (
                {"tokenizer_sha256": "0"},
                "has an image tokenizer with the digest .*, the tokens in .* with 0;",
            ),
            ({"codebook_size": 17}, "has a codebook of size 16, the tokens in .* were made with 17;"),
            ({"grid_sizes": [[2, 2]]}, r"has the token grids \[.*\], the tokens in .* with \[\[2, 2\]\];"),
            ({"class_names": [*"abcdef"]}, "The model has 5 classes, the tokens in .* have 6"),
        ]
    ):
        folder = tmp_path / str(case)
        writer = TokenWriter(folder, plan(**{**own, **changes}))
        writer.begin()
        writer.write(0, torch.zeros(1, *writer.shape, dtype=torch.int64), [0], [0])
        writer.finish()
        if message is None:
            TokenDataset(folder).check_fits(model)
            continue
        with pytest.raises(ValueError, match=message):
            TokenDataset(folder).check_fits(model)


def trained(rows, folder, resume=None, **arguments):
    torch.manual_seed(0)
    model = tiny_llamagen()
    arguments = training_arguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=7,  # in the middle of the second epoch
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[EpochCallback(rows)]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_training_resumes_with_the_same_views(tmp_path):
    write(tmp_path / "tokens")
    unbroken = trained(TokenDataset(tmp_path / "tokens"), tmp_path / "unbroken")
    checkpoint = str(tmp_path / "unbroken" / "checkpoint-7")
    resumed = trained(TokenDataset(tmp_path / "tokens"), tmp_path / "resumed", checkpoint)
    assert unbroken.state.global_step == resumed.state.global_step == 15
    assert resumed.train_dataset.epoch == 2
    expected = unbroken.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_the_loss_is_that_of_the_tokens(tmp_path):
    write(tmp_path / "tokens")
    rows = TokenDataset(tmp_path / "tokens", view=1)
    trainer = trained(rows, tmp_path / "runs", max_steps=1, per_device_eval_batch_size=PICTURES)
    model = trainer.model.eval()
    labels = torch.arange(PICTURES) % 3
    expected = model(input_ids=IDS[:, 1], class_labels=labels, labels=IDS[:, 1]).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_pictures_without_class_train_the_null_condition(tmp_path):
    writer = TokenWriter(tmp_path, plan(class_names=None, pictures=2))
    writer.begin()
    writer.write(0, IDS[:2], [-1, -1], range(2))
    writer.finish()
    item = TokenDataset(tmp_path, view=0)[1]
    model = tiny_llamagen(num_classes=llamagen_config().num_classes)
    batch = {name: tensor[None] for name, tensor in item.items()}
    ids = batch["input_ids"]
    assert torch.equal(
        model(**batch).loss,
        model(input_ids=ids, labels=ids, class_labels=torch.tensor([model.config.num_classes])).loss,
    )


def test_the_index_can_be_read_by_people(tmp_path):
    write(tmp_path, model="folder", source="pictures")
    index = json.loads((tmp_path / "tokens.json").read_text())
    assert index["model"] == "folder" and index["source"] == "pictures"
    assert index["class_names"] == ["a", "b", "c"] and index["pictures"] == 10
