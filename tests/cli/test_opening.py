"""Opening the model that `--model` names."""

import importlib.util

import torch

from hf_argen import VarForImageGeneration
from hf_argen.cli import opening

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
    config = text_var_config(80)
    config.hidden_size, config.intermediate_size = 64, 128
    skipped = opening._not_quantized(config)
    assert "model.input_projection" in skipped and "head" in skipped
    assert "model.layers.0.self_attn.q_proj" not in skipped


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
