"""What holds for every family that generates pictures."""

import inspect

import pytest
import torch

from hf_argen import AutoModelForImageGeneration, Decoding, compatible_decodings

from ..helpers.tiny import spread
from .distributed_base import DistributedTests
from .model_base import ModelTests
from .placement_base import PlacementTests

SAMPLING = {"do_sample": True, "guidance_scale": 1.5, "temperature": 1.2, "top_k": 8, "top_p": 0.95}


class FamilyTests(PlacementTests, DistributedTests, ModelTests):
    """
    Subclass it as [`ModelTests`], and say what the tiny model takes and gives.

    Attributes:
        num_tokens: tokens of a picture.
        picture: (channels, height, width) of a picture.
        decodings: names of the decodings that fit.
        sampling: options of `generate` that draw.
        tolerance_of_traces: how far numbers of a traced pass may be from those of eager code.
    """

    feeds = ("ids", "pixels")
    num_tokens: int
    picture: tuple[int, int, int]
    decodings: list[str]
    sampling: dict = SAMPLING
    tolerance_of_traces: float = 0.0

    def make_model(self, **changes):
        return spread(self.model_class(self.make_config(**changes)))

    def conditions(self, size: int) -> dict[str, torch.Tensor]:
        """What `size` pictures shall show, as keywords of `forward` and `generate`."""
        return {"class_labels": torch.arange(size) % 3}

    def make_batch(self, feed, size=4):
        generator = torch.Generator().manual_seed(0)
        batch = self.conditions(size)
        if feed == "pixels":
            batch["pixel_values"] = torch.rand(size, *self.picture, generator=generator) * 2 - 1
        else:
            vocab_size = self.make_config().vocab_size
            ids = torch.randint(vocab_size, (size, self.num_tokens), generator=generator)
            batch |= {"input_ids": ids, "labels": ids}
        return batch

    def prediction(self, output) -> torch.Tensor:
        """What a teacher-forced pass predicts the tokens from."""
        return output.logits

    def same(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether two ways of computing have drawn the same."""
        return torch.equal(found, expected)

    def make_decoding(self, name: str) -> Decoding | str:
        """A decoding by its name, with what it needs beyond the model."""
        return name

    # The teacher-forced pass

    @torch.no_grad()
    def test_pixels_are_tokenized(self, model):
        batch = self.make_batch("pixels")
        ids = model.encode_images(batch["pixel_values"])
        by_ids = model(input_ids=ids, labels=ids, **self.conditions(4))
        by_pixels = model(**batch)
        assert torch.equal(by_pixels.logits, by_ids.logits) and torch.equal(by_pixels.loss, by_ids.loss)
        assert by_ids.logits.shape == (4, self.num_tokens, model.config.vocab_size)
        assert by_ids.logits.dtype == torch.float32
        assert model(**batch, return_loss=False).loss is None
        without_names = model(**batch, return_dict=False)
        assert torch.equal(without_names[0], by_pixels.loss)

    @torch.no_grad()
    def test_ids_or_pixels(self, model):
        ids, pixels = self.make_batch("ids"), self.make_batch("pixels")
        for both_or_none in ({**ids, **pixels}, self.conditions(4)):
            with pytest.raises(ValueError, match="either input_ids or pixel_values"):
                model(**both_or_none)

    @torch.no_grad()
    def test_compiled_pass(self, model):
        """Traced whole; what a back end makes of the trace is its own matter."""
        batch = self.make_batch("ids")
        compiled = torch.compile(model, backend="eager")
        found, expected = self.prediction(compiled(**batch)), self.prediction(model(**batch))
        torch.testing.assert_close(
            found, expected, rtol=self.tolerance_of_traces, atol=self.tolerance_of_traces
        )

    def test_the_image_tokenizer_is_frozen(self, model):
        frozen = self.make_model().train()
        assert not frozen.image_tokenizer.training
        assert not any(parameter.requires_grad for parameter in frozen.image_tokenizer.parameters())

    # Generation

    def test_greedy(self, model):
        """Needs no random numbers, and one picture does not depend on the others."""
        state = torch.get_rng_state()
        options = {"guidance_scale": 1.5, "do_sample": False}
        ids = model.generate(**self.conditions(3), **options)
        assert ids.shape == (3, self.num_tokens) and ids.dtype == torch.int64
        assert torch.equal(model.generate(**self.conditions(3), **options), ids)
        last = {name: value[2:] for name, value in self.conditions(3).items()}
        assert torch.equal(model.generate(**last, **options), ids[2:])
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(ids[0], ids[1])

    def test_seeds(self, model):
        def draw(seed):
            return model.generate(
                **self.conditions(2), **self.sampling, generator=torch.Generator().manual_seed(seed)
            )

        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
        torch.manual_seed(5)
        first = model.generate(**self.conditions(2), **self.sampling)
        torch.manual_seed(5)
        assert torch.equal(model.generate(**self.conditions(2), **self.sampling), first)

    def test_one_generator_per_picture(self, model):
        def generators(*seeds):
            return [torch.Generator().manual_seed(seed) for seed in seeds]

        together = model.generate(**self.conditions(3), **self.sampling, generator=generators(5, 6, 7))
        for row, seed in enumerate((5, 6, 7)):
            condition = {name: value[row : row + 1] for name, value in self.conditions(3).items()}
            alone = model.generate(**condition, **self.sampling, generator=generators(seed))
            assert self.same(alone[0], together[row])

    def test_several_pictures_of_each_condition(self, model):
        options = {"do_sample": False, "return_dict_in_generate": True}
        single = model.generate(**self.conditions(2), **options).sequences
        several = model.generate(**self.conditions(2), **options, num_return_sequences=3).sequences
        assert self.same(several, single.repeat_interleave(3, dim=0))

    def test_output(self, model):
        output = model.generate(
            **self.conditions(2), **self.sampling, return_dict_in_generate=True, output_logits=True
        )
        assert output.sequences.shape == (2, self.num_tokens)
        assert output.images.shape == (2, *self.picture) and output.images.dtype == torch.float32
        assert output.images.min() >= 0 and output.images.max() <= 1
        assert output.logits.shape == (2, self.num_tokens, model.config.vocab_size)
        assert output.logits.dtype == torch.float32
        assert output.steps > 0 and output.forward_calls > 0
        assert torch.allclose(model.decode_images(output.sequences), output.images, atol=1e-5)
        assert "logits" not in model.generate(**self.conditions(2), return_dict_in_generate=True)

    def test_unknown_keyword(self, model):
        known = next(name for name in inspect.signature(model.generate).parameters if name == "decoding")
        with pytest.raises(ValueError, match=rf"has no keyword 'decodin'\. Did you mean '{known}'\?"):
            model.generate(**self.conditions(1), decodin="x")

    def test_decodings_that_fit(self, model):
        assert compatible_decodings(model) == sorted(self.decodings)
        for name in self.decodings:
            decoding = self.make_decoding(name)
            ids = model.generate(**self.conditions(2), decoding=decoding, do_sample=False)
            assert ids.shape == (2, self.num_tokens)

    def test_auto_model_for_image_generation(self, model, folder):
        loaded = AutoModelForImageGeneration.from_pretrained(folder)
        assert type(loaded) is self.model_class
        options = {**self.conditions(2), "do_sample": False}
        assert torch.equal(loaded.generate(**options), model.generate(**options))
