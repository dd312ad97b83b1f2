"""What holds for every masked family whose tokens are ids."""

import pytest
import torch

from .family_base import FamilyTests


class MaskedIdFamilyTests(FamilyTests):
    """
    Subclass it as [`FamilyTests`].

    Attributes:
        num_hidden: tokens that the batches hide in every row.
    """

    decodings = ["masked"]
    num_hidden: int

    def make_batch(self, feed, size=4):
        """Masks are given, so that two passes compare."""
        generator = torch.Generator().manual_seed(0)
        orders = torch.stack([torch.randperm(self.num_tokens, generator=generator) for _ in range(size)])
        mask = torch.zeros(size, self.num_tokens).scatter(1, orders[:, : self.num_hidden], 1.0).bool()
        return {**super().make_batch(feed, size), "mask": mask}

    # The teacher-forced pass

    @torch.no_grad()
    def test_pixels_are_tokenized(self, model):
        batch = self.make_batch("pixels")
        ids, mask = model.encode_images(batch["pixel_values"]), batch["mask"]
        by_ids = model(input_ids=ids, labels=ids, mask=mask, **self.conditions(4))
        by_pixels = model(**batch)
        assert torch.equal(by_pixels.logits, by_ids.logits) and torch.equal(by_pixels.loss, by_ids.loss)
        assert by_ids.logits.shape == (4, self.num_tokens, model.config.vocab_size)
        assert by_ids.logits.dtype == torch.float32 and torch.equal(by_ids.mask, mask)
        assert model(**batch, return_loss=False).loss is None
        assert torch.equal(model(**batch, return_dict=False)[0], by_pixels.loss)

    @torch.no_grad()
    def test_hidden_ids_are_not_seen(self, model):
        batch = self.make_batch("ids")
        ids, mask = batch["input_ids"], batch["mask"]
        expected = model(**batch).logits
        changed = (ids + 1) % model.config.vocab_size
        hidden = model(**{**batch, "input_ids": torch.where(mask, changed, ids)}).logits
        known = model(**{**batch, "input_ids": torch.where(mask, ids, changed)}).logits
        assert torch.equal(hidden, expected) and not torch.allclose(known, expected, atol=1e-3)

    def test_masks_are_drawn(self):
        """In training mode every pass hides other tokens, at least one a row; torch's seed decides which."""
        model = self.make_model().train()
        batch = self.make_batch("ids")
        del batch["mask"]

        def draw(seed):
            torch.manual_seed(seed)
            return model(**batch)

        first, again, *others = (draw(seed) for seed in (1, 1, 2, 3, 4))
        assert torch.equal(first.loss, again.loss) and torch.equal(first.mask, again.mask)
        assert any(not torch.equal(first.mask, other.mask) for other in others)
        assert all(other.mask.any(dim=1).all() for other in others)

    @torch.no_grad()
    def test_bad_masks(self, model):
        batch = self.make_batch("ids")
        empty = batch["mask"].clone()
        empty[1] = False
        with pytest.raises(ValueError, match="it must hide one at least in every row"):
            model(**{**batch, "mask": empty})
        with pytest.raises(ValueError, match=r"mask has the shape \(4, 1\)"):
            model(**{**batch, "mask": empty[:, :1]})
        for name in ("input_ids", "labels"):
            with pytest.raises(ValueError, match=rf"{name} have the shape .*; pictures of this model have"):
                model(**{**batch, name: batch[name][:, 1:]})
