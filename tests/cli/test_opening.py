"""Opening the model that `--model` names."""

import importlib.util
from pathlib import Path

import torch

from hf_argen import VarForImageGeneration

from ..helpers.tiny import text_var_config
from ..test_cli import fails


def test_quantization(argen, capsys, text_model, monkeypatch):
    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
        )
        fails(
            capsys,
            ["generate", "a cat", "--model", text_model, "--quantize", "4bit"],
            "pip install bitsandbytes",
        )
    for bits in ("8bit", "4bit"):
        argen("red apple", "--quantize", bits, "--seed", "0", "-o", f"{bits}.png")
    assert len({Path(name).read_bytes() for name in ("8bit.png", "4bit.png")}) == 2


def test_quantized_layers_get_inputs_in_the_dtype_of_computation():
    """The weight of a quantized layer is int8, which is no dtype for its input."""

    class Quantized(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.weight = torch.zeros(1, dtype=torch.int8)

        def forward(self, values):
            assert values.dtype == torch.float32
            return self.layer(values)

    text = VarForImageGeneration(text_var_config(80)).eval()
    expected = text.generate(prompt_ids=torch.tensor([[1, 2]]))
    text.model.text_projection = Quantized(text.model.text_projection)
    text.model.input_projection = Quantized(text.model.input_projection)
    assert torch.equal(text.generate(prompt_ids=torch.tensor([[1, 2]])), expected)
