"""What holds for every visual tokenizer."""

import pytest
import torch

from .model_base import ModelTests


class TokenizerTests(ModelTests):
    """
    Subclass it as [`ModelTests`], and say what the tiny tokenizer takes and gives.

    Attributes:
        picture: (channels, height, width) of its pictures.
        num_tokens: tokens of a picture.
        codebook_size: number of codes; `None` for a tokenizer of latents (batch, tokens, dim).
        quantizer: name of the module whose weights training must move.
    """

    picture: tuple[int, int, int]
    num_tokens: int
    codebook_size: int | None = None
    quantizer: str

    def make_batch(self, feed, size=4):
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.rand(size, *self.picture, generator=generator) * 2 - 1}

    @pytest.fixture
    def pixels(self):
        return self.make_batch("pixels")["pixel_values"]

    @torch.no_grad()
    def test_tokens(self, model, pixels):
        tokens = model.encode(pixels)
        assert tokens.shape[:2] == (len(pixels), self.num_tokens)
        if self.codebook_size is None:
            assert tokens.is_floating_point() and tokens.ndim == 3 and torch.isfinite(tokens).all()
        else:
            assert tokens.dtype == torch.int64 and tokens.ndim == 2
            assert tokens.min() >= 0 and tokens.max() < self.codebook_size
        assert (tokens[0] != tokens[1]).any()
        one_by_one = torch.cat([model.encode(picture[None]) for picture in pixels])
        assert torch.allclose(one_by_one, tokens, atol=1e-5)

    @torch.no_grad()
    def test_pictures(self, model, pixels):
        tokens = model.encode(pixels)
        pictures = model.decode(tokens)
        assert pictures.shape == pixels.shape and pictures.dtype == torch.float32
        assert pictures.min() >= -1 and pictures.max() <= 1
        assert torch.equal(model.reconstruct(pixels), pictures)
        assert not torch.allclose(pictures[0], pictures[1], atol=1e-3)

    def test_picture_of_the_wrong_size(self, model):
        channels, height, width = self.picture
        for shape in ((1, channels, height + 1, width), (1, channels, 2 * height, 2 * width)):
            with pytest.raises(ValueError, match=f"are {shape[2]}x{shape[3]} pixels"):
                model.encode(torch.zeros(shape))

    def test_picture_of_the_wrong_channels(self, model):
        channels, height, width = self.picture
        for shape in ((1, channels + 1, height, width), (channels, height, width)):
            with pytest.raises(ValueError, match=r"shape \(.*\); expected \(batch, "):
                model.encode(torch.zeros(shape))
            with pytest.raises(ValueError, match=r"shape \(.*\); expected \(batch, "):
                model(torch.zeros(shape))

    def test_picture_of_bytes(self, model):
        for function in (model.encode, model):
            with pytest.raises(ValueError, match=r"pixel_values are torch\.uint8; give floating point"):
                function(torch.zeros(1, *self.picture, dtype=torch.uint8))

    def test_training_picture_of_an_odd_size(self, model):
        channels, height, width = self.picture
        with pytest.raises(
            ValueError, match=f"are {height}x{width - 1} pixels; both sides must be multiples"
        ):
            model(torch.zeros(1, channels, height, width - 1))

    def test_ids_that_are_none(self, model):
        if self.codebook_size is None:
            return
        for bad in (-1, self.codebook_size):
            with pytest.raises(ValueError, match=f"the codebook has {self.codebook_size} codes"):
                model.decode(torch.full((1, self.num_tokens), bad))
        with pytest.raises(ValueError, match=rf"need \(batch, {self.num_tokens}\)"):
            model.decode(torch.zeros(1, self.num_tokens + 1, dtype=torch.long))
        with pytest.raises(ValueError, match=r"shape \(1, \d+\); expected .* Ids are whole numbers"):
            model.decode(torch.zeros(1, self.num_tokens))

    def check_trained(self, model):
        torch.manual_seed(3)
        fresh = dict(self.make_model().get_submodule(self.quantizer).named_parameters())
        for name, parameter in model.get_submodule(self.quantizer).named_parameters():
            assert not torch.equal(parameter, fresh[name]), name
