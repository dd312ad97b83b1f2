"""What holds for every `PreTrainedModel` of ours; family and tokenizer tests inherit it."""

import json
import logging
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, Trainer

from hf_argen.auto import FAMILIES
from hf_argen.training import training_arguments

from ..helpers.hostile import FOLDERS, assert_refused, context, flipped_headers, loaded_or_refused
from ..helpers.kills import kill_at_change, run


@contextmanager
def new_memory_is_nan():
    """Fills every tensor that torch allocates without value with NaN, as freed memory may hold it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, those that are not saved included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_tensors(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Equal bit by bit, names and dtypes included."""
    expected, found = tensors_of(model), tensors_of(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def fields_of(config: PreTrainedConfig) -> dict:
    """What a configuration says, apart from where it was loaded."""
    return {
        name: {k: v for k, v in value.items() if k != "_name_or_path"} if isinstance(value, dict) else value
        for name, value in config.to_dict().items()
        if name != "_name_or_path"
    }


@contextmanager
def caplog_of_transformers(caplog):
    """Its logger does not pass records on, so that pytest sees none unless told to."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


class RunsWhenUnpickled:
    """Writes a file where a pickle is loaded without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """`gradient_checkpointing_enable`, by the name that this release of transformers wants."""
    has_new_name = hasattr(model, "activation_checkpointing_enable")
    getattr(model, f"{'activation' if has_new_name else 'gradient'}_checkpointing_enable")()


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A batch as the data set that `Trainer` collates to it."""
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def saving(tests, folder, seed):
    """The work of a process that is killed: see `tests/helpers/kills.py`."""
    torch.manual_seed(seed)
    model = tests().make_model()
    yield
    model.save_pretrained(folder)


class ModelTests:
    """
    Subclass it in a file of the model and give `model_class`, `make_config`, `make_model` and `make_batch`.

    Attributes:
        feeds: the kinds of batch that `make_batch` makes; "pixels" is a batch without targets.
        learning_rate: at which `training_steps` steps of AdamW lower the loss to `loss_falls_to` of it.
        without_gradient: prefixes of parameters that the training pass does not reach, by design.
    """

    model_class: type[PreTrainedModel]
    feeds: tuple[str, ...] = ("pixels",)
    learning_rate = 1e-2
    training_steps = 20
    loss_falls_to = 0.9
    without_gradient: tuple[str, ...] = ()

    def make_config(self, **changes) -> PreTrainedConfig:
        """A tiny configuration without dropout of any kind."""
        raise AssertionError("give a configuration")

    def make_model(self, **changes) -> PreTrainedModel:
        """A model with weights large enough for its outputs to depend on its inputs, in evaluation mode."""
        return self.model_class(self.make_config(**changes)).eval()

    def make_batch(self, feed: str, size: int = 4) -> dict[str, torch.Tensor]:
        """Inputs of the training pass, among them targets unless `feed` is "pixels"."""
        raise AssertionError("give a batch")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> PreTrainedModel:
        """Shared by the tests of a class: read only, in evaluation mode."""
        torch.manual_seed(3)
        return cls().make_model()

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, model, tmp_path_factory):
        """Where `model` is saved."""
        folder = tmp_path_factory.mktemp("saved")
        model.save_pretrained(folder)
        return folder

    # Configuration and initialisation

    def test_config_survives_saving(self, model, folder):
        loaded = AutoConfig.from_pretrained(folder)
        assert type(loaded) is type(model.config)
        assert fields_of(loaded) == fields_of(model.config)
        from_json = json.loads(loaded.to_json_string(use_diff=True))
        assert fields_of(type(loaded).from_dict(from_json)) == fields_of(loaded)

    def test_initialisation_follows_the_seed(self):
        models = []
        for _ in range(2):
            torch.manual_seed(7)
            models.append(self.model_class(self.make_config()).eval())
        assert_same_tensors(*models)
        torch.manual_seed(8)
        other = tensors_of(self.model_class(self.make_config()))
        assert any(not torch.equal(other[name], tensor) for name, tensor in tensors_of(models[0]).items())
        assert torch.isfinite(self.loss(models[0], self.feeds[0]))

    def test_initialisation_fills_every_weight(self):
        """Also by way of the meta device, where a tensor that `_init_weights` forgets keeps what memory held."""
        with new_memory_is_nan():
            constructed = self.model_class(self.make_config())
            by_auto_class = type(constructed)._from_config(self.make_config())
            with torch.device("meta"):
                on_meta = self.model_class(self.make_config())
            on_meta.to_empty(device="cpu")
            on_meta.init_weights()
        for model in (constructed, by_auto_class, on_meta):
            assert not [
                name for name, tensor in tensors_of(model).items() if not torch.isfinite(tensor).all()
            ]

    # Saving and loading

    def test_saved_model_is_the_same_bit_by_bit(self, model, folder):
        with new_memory_is_nan():
            loaded = self.model_class.from_pretrained(folder)
        assert_same_tensors(model, loaded)
        assert not loaded.training
        for feed in self.feeds:
            assert torch.equal(self.loss(loaded, feed), self.loss(model, feed))

    def test_sharded_saving(self, model, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert_same_tensors(model, self.model_class.from_pretrained(tmp_path))

    def test_variants(self, model, tmp_path):
        """Two sets of weights in one folder, in other numbers of shards and another dtype; neither changes the other."""
        half = self.model_class.from_pretrained(self.saved(model, tmp_path), dtype=torch.bfloat16)
        half.save_pretrained(tmp_path, variant="half", max_shard_size="20KB")
        assert_same_tensors(model, self.model_class.from_pretrained(tmp_path))
        again = self.model_class.from_pretrained(tmp_path, variant="half", dtype=torch.bfloat16)
        assert_same_tensors(half, again)
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        half.save_pretrained(tmp_path, variant="half")
        assert_same_tensors(model, self.model_class.from_pretrained(tmp_path))
        assert_same_tensors(
            half, self.model_class.from_pretrained(tmp_path, variant="half", dtype="bfloat16")
        )
        assert len(list(tmp_path.glob("*half*"))) == 1

    def test_pushed_model_comes_back(self, model, hub):
        """In shards, and as a variant in half precision beside them; with its card, in one commit each."""
        model.push_to_hub("tester/model", max_shard_size="50KB")
        assert_same_tensors(model, self.model_class.from_pretrained("tester/model"))
        assert type(AutoModel.from_pretrained("tester/model")) is type(AutoModel.from_config(model.config))
        half = self.model_class.from_pretrained("tester/model", dtype=torch.bfloat16)
        half.push_to_hub("tester/model", variant="half")
        assert len(hub.repositories["tester/model"].branches["main"]) == 3
        assert_same_tensors(model, self.model_class.from_pretrained("tester/model"))
        loaded = self.model_class.from_pretrained("tester/model", variant="half", dtype=torch.bfloat16)
        assert_same_tensors(half, loaded)
        card = ModelCard(hub.files("tester/model")["README.md"].decode())
        assert card.data.library_name == "hf_argen" and model.config.model_type in card.data.tags
        assert (
            self.model_class.__name__ in card.text and "from_pretrained" in card.text
        ) or "pipeline" in card.text

    def test_killed_while_saving(self, model, folder, tmp_path):
        """Over an earlier model: it is the old one, the new one, or none."""
        torch.manual_seed(4)
        old = tensors_of(self.make_model())
        _, changes = run(saving, type(self), self.saved_by_seed(4, tmp_path / "whole"), 3)
        expected = tensors_of(self.model_class.from_pretrained(tmp_path / "whole"))
        seen = []
        for change in random.Random(type(self).__name__).sample(range(changes), 2):  # others in every class
            place = self.saved_by_seed(4, tmp_path / str(change))
            assert kill_at_change(saving, (type(self), place, 3), change)
            try:
                found = tensors_of(self.model_class.from_pretrained(place))
            except (OSError, ValueError):
                continue
            seen.append(found)
        for found in seen:
            assert any(all(torch.equal(found[n], t) for n, t in model.items()) for model in (old, expected))

    def test_auto_classes(self, model, folder, caplog):
        family = FAMILIES[model.config.model_type]
        with caplog_of_transformers(caplog):
            base = AutoModel.from_pretrained(folder)
        assert not caplog.records  # although the folder may hold a larger model
        assert type(base) is family.load(family.base_model)
        prefix = "" if isinstance(model, type(base)) else f"{model.base_model_prefix}."
        expected = model.state_dict()
        for name, tensor in base.state_dict().items():
            assert torch.equal(tensor, expected[prefix + name]), name

    def saved(self, model, folder):
        model.save_pretrained(folder)
        return folder

    def saved_by_seed(self, seed, folder):
        torch.manual_seed(seed)
        return self.saved(self.make_model(), folder)

    def edited(self, model, folder, change) -> None:
        """Saves `model` with weights that `change` has edited in place."""
        model.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def some_key(self, model) -> str:
        return next(name for name, parameter in model.named_parameters() if parameter.ndim >= 2)

    def test_missing_weight(self, model, tmp_path, caplog):
        key = self.some_key(model)
        self.edited(model, tmp_path, lambda weights: weights.pop(key))
        with (
            caplog_of_transformers(caplog),
            pytest.raises(ValueError, match=rf"do not fit {self.model_class.__name__}: missing {key}"),
        ):
            self.model_class.from_pretrained(tmp_path)
        assert not caplog.records  # one sentence, without transformers' advice to train the missing weight
        loaded = self.model_class.from_pretrained(tmp_path, strict=False)
        assert torch.isfinite(loaded.state_dict()[key]).all()

    def test_superfluous_weight(self, model, tmp_path):
        self.edited(model, tmp_path, lambda weights: weights.update({"surplus.weight": torch.ones(1)}))
        with pytest.raises(ValueError, match=r"unexpected surplus\.weight"):
            self.model_class.from_pretrained(tmp_path)
        assert_same_tensors(model, self.model_class.from_pretrained(tmp_path, strict=False))

    def test_misshapen_weight(self, model, tmp_path):
        key = self.some_key(model)
        self.edited(model, tmp_path, lambda weights: weights.update({key: torch.ones(3, 2)}))
        with pytest.raises(ValueError, match=rf"misshapen {key} \(file \(3, 2\), model"):
            self.model_class.from_pretrained(tmp_path)

    def test_truncated_weights(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match="the file is damaged or incomplete: fetch it again"):
            self.model_class.from_pretrained(tmp_path)

    def test_missing_shard(self, model, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        shard = sorted(tmp_path.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(
            ValueError, match=rf"{shard.name} is missing in .*, but its index names it; fetch it"
        ):
            self.model_class.from_pretrained(tmp_path)

    def test_pickle_with_code(self, model, tmp_path):
        model.config.save_pretrained(tmp_path)
        torch.save({"weight": RunsWhenUnpickled(tmp_path / "was_run")}, tmp_path / "pytorch_model.bin")
        with pytest.raises(
            ValueError, match=r"a pickle \(pytorch_model\.bin\), which may hold code and was not opened"
        ):
            self.model_class.from_pretrained(tmp_path)
        assert not (tmp_path / "was_run").exists()

    def test_folder_without_a_model(self, model, folder, tmp_path):
        with pytest.raises(ValueError, match=r"holds no model: it has no config\.json"):
            self.model_class.from_pretrained(tmp_path)
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "generation_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"generation_config\.json of .*; fetch it again"):
            self.model_class.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text("{")
        (tmp_path / "generation_config.json").unlink()
        with pytest.raises(ValueError, match=r"config\.json of .*; fetch it again"):
            self.model_class.from_pretrained(tmp_path)

    def test_hostile_folders_are_refused(self, folder, tmp_path):
        """One sentence each; nothing that a pickle says is done."""
        for name, damage in FOLDERS.items():
            copy = tmp_path / name / "saved"
            shutil.copytree(folder, copy)
            damage(copy)
            with context(name):
                assert_refused(lambda copy=copy: self.model_class.from_pretrained(copy))
        assert not list(tmp_path.rglob("was_run"))

    def test_flipped_bits_of_a_header_never_load_as_something_else(self, model, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "saved")
        for _ in flipped_headers(tmp_path / "saved", count=20):
            loaded = loaded_or_refused(lambda: self.model_class.from_pretrained(tmp_path / "saved"))
            if loaded is not None:  # a bit that says nothing, such as one of the metadata
                assert_same_tensors(model, loaded)

    def test_other_model_type(self, tmp_path):
        AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"of type 'gpt2', but {self.model_class.__name__} loads"):
            self.model_class.from_pretrained(tmp_path)

    def test_half_precision(self, folder):
        """bfloat16 runs; float16 keeps in float32 what the class says is sensitive."""
        model = self.model_class.from_pretrained(folder, dtype=torch.float16)
        kept = [f".{name}." for name in self.model_class._keep_in_fp32_modules or ()]
        for name, parameter in model.named_parameters():
            is_kept = any(one in f".{name}" for one in kept)
            assert parameter.dtype == (torch.float32 if is_kept else torch.float16), name
        model = self.model_class.from_pretrained(folder, dtype=torch.bfloat16)
        strict = [f".{name}." for name in self.model_class._keep_in_fp32_modules_strict or ()]
        for name, parameter in model.named_parameters():
            is_kept = any(one in f".{name}" for one in strict)
            assert parameter.dtype == (torch.float32 if is_kept else torch.bfloat16), name
        for feed in self.feeds:
            loss = self.loss(model, feed)
            assert loss.dtype == torch.float32 and torch.isfinite(loss)

    # Training

    def loss(self, model, feed: str) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.make_batch(feed)).loss

    def trainer(self, model, feed: str, folder, **arguments) -> Trainer:
        rows = rows_of(self.make_batch(feed))
        defaults = {
            "from_pixels": feed == "pixels",
            "max_steps": 1,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": len(rows),
            "per_device_eval_batch_size": len(rows),
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        options = training_arguments(folder, **{**defaults, **arguments})
        return Trainer(model=model, args=options, train_dataset=rows, eval_dataset=rows)

    def test_every_trained_weight_gets_a_gradient(self):
        for feed in self.feeds:
            model = self.make_model().train()
            model(**self.make_batch(feed)).loss.backward()
            for name, parameter in model.named_parameters():
                reached = parameter.requires_grad and not name.startswith(self.without_gradient)
                assert (parameter.grad is not None) == reached, name
                assert not reached or torch.isfinite(parameter.grad).all(), name

    def test_gradient_checkpointing_changes_nothing(self):
        if not self.model_class.supports_gradient_checkpointing:
            with pytest.raises(ValueError, match="does not support"):
                enable_checkpointing(self.make_model())
            return
        gradients = []
        torch.manual_seed(3)
        model = self.make_model().train()
        for is_on in (False, True):
            if is_on:
                enable_checkpointing(model)
            model.zero_grad()
            loss = model(**self.make_batch(self.feeds[0])).loss
            loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            gradients[-1]["loss"] = loss.detach()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradients[1][name], gradient, atol=1e-6), name

    def test_accumulated_half_batches_are_one_batch(self, tmp_path):
        size = len(rows_of(self.make_batch(self.feeds[0])))
        for feed in self.feeds:
            logs = []
            for arguments in (
                {"per_device_train_batch_size": size},
                {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": 2},
            ):
                torch.manual_seed(3)
                trainer = self.trainer(self.make_model(), feed, tmp_path, **arguments)
                trainer.train()
                logs.append(trainer.state.log_history[0])
            for value in ("loss", "grad_norm"):
                assert float(logs[1][value]) == pytest.approx(float(logs[0][value]), rel=1e-3), (feed, value)

    def test_trainer_lowers_the_loss(self, tmp_path):
        for feed in self.feeds:
            torch.manual_seed(3)
            model = self.make_model()
            trainer = self.trainer(
                model, feed, tmp_path, max_steps=self.training_steps, learning_rate=self.learning_rate
            )
            before = trainer.evaluate()["eval_loss"]
            assert before == pytest.approx(self.loss(model, feed).item(), rel=1e-4)
            trainer.train()
            assert trainer.evaluate()["eval_loss"] < self.loss_falls_to * before
            self.check_trained(model)

    def check_trained(self, model: PreTrainedModel) -> None:
        """What else training must have done to `model`."""
