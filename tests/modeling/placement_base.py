"""What holds for every family wherever and however its weights are held: types, devices, disk, quantized."""

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch.nn.functional import cosine_similarity
from transformers import BitsAndBytesConfig

from hf_argen.generation.devices import cpu_has_float16

QUANTIZATIONS = {
    "8-bit": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
# Smallest cosine with float32 logits that a type may give: its rounding, through two layers of large random weights.
PRECISION = {torch.float32: 1 - 1e-6, torch.float16: 0.9999, torch.bfloat16: 0.995}
# Largest share of a weight that its quantization may change, root mean square: half a step of normal numbers.
LARGEST_CHANGE = {"8-bit": 0.015, "nf4": 0.12, "fp4": 0.2}


def logits_cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Cosine of all logits together, in float64."""
    return cosine_similarity(found.double().flatten(), expected.double().flatten(), dim=0).item()


class PlacementTests:
    """
    Part of [`FamilyTests`].

    Attributes:
        attention: names of the attention implementations that run on every device.
        wide: changes of the configuration that make rows of weights whole blocks of 64.
    """

    attention: tuple[str, ...] = ("eager", "sdpa")
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}

    def greedy(self, model) -> torch.Tensor:
        return model.generate(**self.conditions(2), guidance_scale=1.5, do_sample=False)

    # Types and attention

    @pytest.mark.parametrize("dtype", PRECISION, ids=lambda dtype: str(dtype).removeprefix("torch."))
    @torch.no_grad()
    def test_types_and_attention_implementations(self, model, folder, dtype):
        batch, expected = self.make_batch("ids"), self.greedy(model)
        logits = self.prediction(model(**batch))
        is_slow = dtype == torch.float16 and not cpu_has_float16()
        for name in self.attention:
            other = self.model_class.from_pretrained(folder, dtype=dtype, attn_implementation=name)
            assert (other.dtype, other.config._attn_implementation) == (dtype, name)
            found = other(**batch)
            assert found.loss.dtype == torch.float32
            assert logits_cosine(self.prediction(found), logits) > PRECISION[dtype], name
            with pytest.warns(match="very slow.*bfloat16") if is_slow else nullcontext():
                ids = self.greedy(other)
            assert other.decode_images(ids).dtype == torch.float32
            if dtype == torch.float32:
                assert self.same(ids, expected), name

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", PRECISION, ids=lambda dtype: str(dtype).removeprefix("torch."))
    @torch.no_grad()
    def test_types_and_attention_implementations_on_a_gpu(self, model, folder, dtype):
        batch = self.make_batch("ids")
        logits = self.prediction(model(**batch))
        for name in self.attention:
            other = self.model_class.from_pretrained(
                folder, dtype=dtype, attn_implementation=name, device_map="cuda"
            )
            found = self.prediction(other(**{key: value.to("cuda") for key, value in batch.items()}))
            assert logits_cosine(found.cpu(), logits) > PRECISION[dtype], name
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert self.greedy(other).device.type == "cuda"

    # Devices and disk

    def placed(self, folder, tmp_path, place: str):
        if place == "by accelerate":
            return cpu_offload(self.model_class.from_pretrained(folder), torch.device("cpu"))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        options = {
            "device_map auto": {"device_map": "auto"},
            "part on disk": {"device_map": "auto", "max_memory": {"cpu": size // 2}},
            "all on disk": {"device_map": {"": "disk"}},
        }[place]
        return self.model_class.from_pretrained(folder, **options, offload_folder=tmp_path / "disk")

    @pytest.mark.parametrize("place", ["device_map auto", "part on disk", "all on disk", "by accelerate"])
    @torch.no_grad()
    def test_offloaded_weights_give_the_same(self, model, folder, tmp_path, place):
        placed = self.placed(folder, tmp_path, place)
        devices = {parameter.device.type for parameter in placed.parameters()}
        assert devices == {
            "device_map auto": {"cuda" if torch.cuda.is_available() else "cpu"},
            "part on disk": {"cpu", "meta"},
        }.get(place, {"meta"})
        assert torch.equal(self.greedy(placed).cpu(), self.greedy(model))
        for feed in self.feeds:
            assert torch.equal(self.loss(placed, feed).cpu(), self.loss(model, feed))

    # Quantized

    @pytest.mark.parametrize("name", QUANTIZATIONS)
    @torch.no_grad()
    def test_quantized(self, tmp_path, name):
        """Used, saved, loaded again and used, it is the same bit by bit; then its weights are made plain and compared."""
        model = self.make_model(**self.wide)
        model.save_pretrained(tmp_path / "full")
        quantized = self.model_class.from_pretrained(
            tmp_path / "full", quantization_config=BitsAndBytesConfig(**QUANTIZATIONS[name])
        )
        self.check_kept(quantized, name)
        batch, before = self.make_batch("ids"), clones(quantized)
        logits, ids = self.prediction(quantized(**batch)), self.greedy(quantized)
        assert ids.shape[:2] == (2, self.num_tokens)

        quantized.save_pretrained(tmp_path / "small")
        loaded = self.model_class.from_pretrained(tmp_path / "small")
        self.check_kept(loaded, name)
        for other in (quantized, loaded):
            after = other.state_dict()
            assert after.keys() == before.keys()
            assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
            assert torch.equal(self.prediction(other(**batch)), logits) and torch.equal(
                self.greedy(other), ids
            )
        self.check_plain(model, loaded, name)
        assert logits_cosine(self.prediction(loaded.to(torch.bfloat16)(**batch)), logits) > 0.98

    def check_plain(self, model, quantized, name: str) -> None:
        """Quantization has changed no weight by more than it may; leaves `quantized` in plain weights."""
        names = {
            name for name, module in quantized.named_modules() if is_linear(module) and not is_plain(module)
        }
        quantized.dequantize()
        for layer in names:
            found = quantized.get_submodule(layer).weight.float()
            expected = model.get_submodule(layer).weight
            change = (found - expected).norm() / expected.norm()
            assert 0 < change < LARGEST_CHANGE[name], layer

    def check_kept(self, quantized, quantization: str) -> None:
        """What the class names and what has no whole blocks is in bfloat16; all other linear layers are quantized."""
        kept = tuple(quantized._keep_in_fp32_modules)
        linear = {
            name: module
            for name, module in quantized.named_modules()
            if is_linear(module) and not name.startswith("image_tokenizer.")
        }
        plain = [name for name, module in linear.items() if is_plain(module)]
        assert set(plain) == {
            name
            for name, module in linear.items()
            if name.startswith(kept)
            or name.endswith(kept)
            or (quantization != "8-bit" and module.in_features % 64)
        }
        strict = tuple(quantized._keep_in_fp32_modules_strict)  # also beside bfloat16
        for name in plain:
            assert linear[name].weight.dtype == (torch.float32 if name.startswith(strict) else torch.bfloat16)
        assert quantized.dtype == torch.bfloat16 and len(plain) < len(linear)


def is_linear(module: torch.nn.Module) -> bool:
    """Also the quantized ones, which derive from it."""
    return isinstance(module, torch.nn.Linear)


def is_plain(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear


def clones(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that would be saved."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
