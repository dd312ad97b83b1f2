"""What holds for every family whose tokens are latents."""

import numpy as np
import pytest
import torch

from hf_argen import compatible_decodings

from .family_base import FamilyTests

SAMPLING = {"do_sample": True, "guidance_scale": 1.5, "temperature": 1.2}


class ContinuousFamilyTests(FamilyTests):
    """
    Subclass it as [`FamilyTests`]; `num_tokens` are latents of a picture.

    Attributes:
        latent_channels: channels of a latent.
        num_hidden: tokens that the batches hide.
    """

    feeds = ("latents", "pixels")
    sampling = SAMPLING
    latent_channels = 4
    num_hidden: int

    def make_batch(self, feed, size=4):
        """Masks and seeds are given, so that two passes compare."""
        generator = torch.Generator().manual_seed(0)
        tokens = self.make_config().num_image_tokens
        orders = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(size)])
        batch = {
            **self.conditions(size),
            "mask": torch.zeros(size, tokens).scatter(1, orders[:, : self.num_hidden], 1.0).bool(),
            "noise_seeds": torch.arange(size),
        }
        if feed == "pixels":
            return {**batch, "pixel_values": torch.rand(size, *self.picture, generator=generator) * 2 - 1}
        latents = torch.randn(size, self.num_tokens, self.latent_channels, generator=generator)
        return {**batch, "latents": latents, "labels": latents}

    def make_model(self, **changes):
        """The head as it starts, so that what it draws stays of the size of latents."""
        model = super().make_model(**changes)
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.mul_(0.3)
        return model

    def prediction(self, output):
        return output.last_hidden_state

    def same(self, found, expected):
        assert found.shape == expected.shape
        scale = expected.abs().max().item()
        return (found - expected).abs().max().item() <= 1e-3 * max(scale, 1e-6)

    # The teacher-forced pass

    @torch.no_grad()
    def test_pixels_are_tokenized(self, model):
        batch = self.make_batch("pixels")
        pixels = batch.pop("pixel_values")
        latents = model.encode_images(pixels)
        by_latents = model(latents=latents, labels=latents, **batch)
        by_pixels = model(pixel_values=pixels, **batch)
        assert torch.equal(by_pixels.last_hidden_state, by_latents.last_hidden_state)
        assert torch.equal(by_pixels.loss, by_latents.loss)
        tokens = model.config.num_image_tokens
        assert by_latents.last_hidden_state.shape == (4, tokens, model.config.decoder_hidden_size)
        assert torch.equal(by_latents.mask, batch["mask"])
        assert model(pixel_values=pixels, **batch, return_loss=False).loss is None
        without_names = model(pixel_values=pixels, **batch, return_dict=False)
        assert torch.equal(without_names[0], by_pixels.loss)

    @torch.no_grad()
    def test_ids_or_pixels(self, model):
        latents, pixels = self.make_batch("latents"), self.make_batch("pixels")
        for both_or_none in ({**latents, **pixels}, self.conditions(4)):
            with pytest.raises(ValueError, match="either latents or pixel_values"):
                model(**both_or_none)

    def test_masks_and_noise_are_drawn(self):
        """In training mode every pass hides other tokens; the seeds of torch and numpy decide which."""
        model = self.make_model().train()
        batch = self.make_batch("latents")
        del batch["mask"], batch["noise_seeds"]

        def draw(seed):
            torch.manual_seed(seed)
            np.random.seed(seed)
            return model(**batch)

        first, again, *others = (draw(seed) for seed in (1, 1, 2, 3, 4, 5))
        assert torch.equal(first.loss, again.loss) and torch.equal(first.mask, again.mask)
        assert any(not torch.equal(first.mask, other.mask) for other in others)
        for mask in (first.mask, *(other.mask for other in others)):
            counts = mask.sum(dim=1)
            assert (counts == counts[0]).all() and counts[0] >= model.config.min_mask_ratio * mask.shape[1]
        assert any(not torch.equal(other.mask[0], other.mask[1]) for other in others)

    @torch.no_grad()
    def test_bad_masks(self, model):
        batch = self.make_batch("latents")
        uneven = batch["mask"].clone()
        uneven[0] = True
        for mask in (torch.zeros_like(uneven), uneven):
            with pytest.raises(ValueError, match="must hide the same number in every row, and one at least"):
                model(**{**batch, "mask": mask})
        with pytest.raises(ValueError, match=r"mask has the shape \(4, 1\)"):
            model(**{**batch, "mask": uneven[:, :1]})
        with pytest.raises(
            ValueError, match=r"latents have the shape .*; pictures of this model have \(batch"
        ):
            model(**{**batch, "latents": batch["latents"][:, 1:]})

    # Generation

    def test_greedy(self, model):
        """Needs no random numbers, and one picture does not depend on the others."""
        state = torch.get_rng_state()
        options = {"guidance_scale": 1.5, "do_sample": False}
        latents = model.generate(**self.conditions(3), **options)
        assert latents.shape == (3, self.num_tokens, self.latent_channels) and latents.dtype == torch.float32
        assert torch.equal(model.generate(**self.conditions(3), **options), latents)
        last = {name: value[2:] for name, value in self.conditions(3).items()}
        assert self.same(model.generate(**last, **options), latents[2:])
        assert torch.equal(torch.get_rng_state(), state)
        assert not self.same(latents[0], latents[1])

    def test_output(self, model):
        output = model.generate(**self.conditions(2), **self.sampling, return_dict_in_generate=True)
        assert output.sequences.shape == (2, self.num_tokens, self.latent_channels)
        assert output.images.shape == (2, *self.picture) and output.images.dtype == torch.float32
        assert output.images.min() >= 0 and output.images.max() <= 1
        assert output.steps > 0 and output.forward_calls > 0 and output.head_calls > 0
        tokens = model.config.num_image_tokens
        assert torch.equal(output.orders.sort(dim=1).values, torch.arange(tokens).expand(2, -1))
        assert torch.allclose(model.decode_images(output.sequences), output.images, atol=1e-5)

    @pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.5}, {"output_logits": True}])
    def test_what_continuous_tokens_have_not(self, model, option):
        with pytest.raises(ValueError, match="draws continuous tokens, which have no logits"):
            model.generate(**self.conditions(1), **option, return_dict_in_generate=True)

    def test_decodings_that_fit(self, model):
        assert compatible_decodings(model) == sorted(self.decodings)
        for name in self.decodings:
            latents = model.generate(**self.conditions(2), decoding=self.make_decoding(name))
            assert latents.shape == (2, self.num_tokens, self.latent_channels)
