"""What holds for every decoding."""

import dataclasses
import json

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from hf_argen import Decoding, compatible_decodings
from hf_argen.generation.decoding import Guarantee, available

from ..helpers.enumerator import Enumerator, assert_same_distribution


class DecodingTests:
    """
    Subclass it as `class TestX(DecodingTests)`.

    Attributes:
        decoding_class: the decoding.
        options: options that differ from their defaults, in their stored form.
        plain: name of the plain decoding, against which the guarantee is proved.
    """

    decoding_class: type[Decoding]
    options: dict[str, object]
    plain: str

    def make_model(self):
        """A tiny model that it fits, with outputs that depend on its inputs."""
        raise AssertionError("give a model")

    def make_decoding(self) -> Decoding:
        """One that runs on `make_model()`."""
        return self.decoding_class()

    def make_smallest_model(self):
        """A model of so few tokens and codes that all its outputs can be listed; relaxed decodings need none."""
        raise AssertionError("give a model")

    def conditions(self, size: int) -> dict[str, torch.Tensor]:
        return {"class_labels": torch.arange(size) % 3}

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        torch.manual_seed(3)
        return cls().make_model()

    # Storage

    def test_name(self, model):
        name = self.decoding_class.type_name()
        assert available()[name] is self.decoding_class
        assert name == name.lower() and name in compatible_decodings(model)
        ids = model.generate(**self.conditions(1), decoding=self.make_decoding(), do_sample=False)
        assert torch.isfinite(ids.float()).all()

    def test_stored_form(self):
        assert self.decoding_class().to_dict() == {"type": self.decoding_class.type_name()}
        stored = {"type": self.decoding_class.type_name(), **self.options}
        decoding = Decoding.from_dict(stored)
        assert type(decoding) is self.decoding_class
        assert decoding.to_dict() == json.loads(json.dumps(decoding.to_dict())) == stored
        assert Decoding.from_dict(decoding.to_dict()) == decoding
        for name, value in self.options.items():
            found, default = (
                one._stored(name, getattr(one, name)) for one in (decoding, self.decoding_class())
            )
            assert found == value != default

    def test_survives_in_the_generation_config(self, model, tmp_path):
        decoding = self.decoding_class(**self.options)
        config = GenerationConfig.from_dict(model.generation_config.to_dict())
        decoding.store(config)
        config.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "generation_config.json").read_text())
        assert stored["decoding"] == decoding.to_dict()
        assert Decoding.from_config(GenerationConfig.from_pretrained(tmp_path)) == decoding
        assert Decoding.from_config(GenerationConfig()) is None

    def test_stored_decoding_is_used(self, tmp_path):
        """By a model that was saved with it, as an object or in its stored form."""
        torch.manual_seed(3)
        model = self.make_model()
        model.generation_config.decoding = self.decoding_class(**self.options)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded._choose_decoding(None, loaded.generation_config) == self.decoding_class(**self.options)

    def test_unknown_option(self):
        with pytest.raises(ValueError, match=rf"{self.decoding_class.__name__} has no option windo; it has "):
            Decoding.from_dict({"type": self.decoding_class.type_name(), "windo": 3})

    # What it promises

    def test_guarantee_is_declared(self):
        cls = self.decoding_class
        assert isinstance(cls.guarantee, Guarantee)
        names = {field.name for field in dataclasses.fields(cls)}
        assert cls.knob in names if cls.guarantee is Guarantee.RELAXED else cls.knob is None
        assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")

    def test_fits_only_its_kind_of_model(self, model):
        assert self.decoding_class.fits(model)
        assert not self.decoding_class.fits(torch.nn.Linear(1, 1))
        if self.plain != "next_token":
            language_model = GPT2LMHeadModel(
                GPT2Config(n_embd=4, n_head=1, n_layer=1, vocab_size=5, n_positions=4)
            )
            assert not self.decoding_class.fits(language_model)

    def test_greedy_output_is_the_plain_one(self, model):
        if self.decoding_class.guarantee is Guarantee.RELAXED:
            return
        for guidance_scale in (0.0, 2.0):
            options = {**self.conditions(3), "guidance_scale": guidance_scale, "do_sample": False}
            expected = model.generate(**options, decoding=self.plain)
            assert torch.equal(model.generate(**options, decoding=self.make_decoding()), expected)

    def test_distribution_is_the_plain_one(self):
        """Sampling with guidance, temperature, top-k and top-p, all branches followed."""
        if self.decoding_class.guarantee is Guarantee.RELAXED:
            return
        torch.manual_seed(10)
        model = self.make_smallest_model()
        options = {"do_sample": True, "guidance_scale": 1.5, "temperature": 1.3, "top_k": 2, "top_p": 0.9}
        found, expected = (
            Enumerator().distribution(lambda decoding=decoding: self.outcome(model, decoding, options))
            for decoding in (self.make_decoding(), self.plain)
        )
        assert len(expected) > 2
        assert_same_distribution(found, expected)

    def outcome(self, model, decoding, options) -> tuple[int, ...]:
        """The generated ids of all rows, one after another."""
        ids = model.generate(**self.conditions(1), decoding=decoding, **options)
        return tuple(ids.flatten().tolist())

    def test_seeds(self, model):
        options = {**self.conditions(2), "do_sample": True, "decoding": self.make_decoding()}
        first, again, other = (
            model.generate(**options, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)
