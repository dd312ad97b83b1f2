"""What `from_pretrained` adds where a model is quantized or divided, beyond what holds for every family."""

import logging

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.distributed import DistributedConfig

from hf_argen import VarForImageGeneration
from hf_argen.generation import devices
from hf_argen.modeling import placement

from ..helpers.processes import in_two_processes
from ..helpers.tiny import tiny_var

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("wide")
    tiny_var(**WIDE).save_pretrained(folder)
    return folder


def four_bits(**options) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def test_types_of_a_quantized_model(folder):
    """bfloat16 unless told otherwise, in what is kept and in what the layers compute in; the user's object is left alone."""
    given = four_bits()
    cases = [
        ({}, torch.bfloat16, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32, torch.float32),
        ({"torch_dtype": torch.float16}, torch.float16, torch.float16),
        ({"dtype": "auto"}, torch.float32, torch.float32),
    ]
    for options, dtype, compute in cases:
        model = VarForImageGeneration.from_pretrained(folder, quantization_config=given, **options)
        assert model.dtype == dtype
        assert model.model.layers[0].mlp.fc1.compute_dtype == compute
    asked = four_bits(bnb_4bit_compute_dtype=torch.float16)
    model = VarForImageGeneration.from_pretrained(folder, quantization_config=asked)
    assert model.dtype == torch.bfloat16 and model.model.layers[0].mlp.fc1.compute_dtype == torch.float16
    as_dict = VarForImageGeneration.from_pretrained(folder, quantization_config=given.to_dict())
    assert as_dict.model.layers[0].mlp.fc1.compute_dtype == torch.bfloat16
    assert given.bnb_4bit_compute_dtype == torch.float32 and given.llm_int8_skip_modules is None
    assert VarForImageGeneration.from_pretrained(folder).dtype == torch.float32


def test_rows_that_are_no_whole_blocks_stay(folder, tmp_path):
    """bitsandbytes would unpack them to other weights on a CPU; 8 bits know no blocks."""
    model = VarForImageGeneration.from_pretrained(folder, quantization_config=four_bits())
    assert type(model.model.input_projection) is torch.nn.Linear  # 4 channels
    assert "model.input_projection" in model.config.quantization_config.llm_int8_skip_modules
    own = four_bits(llm_int8_skip_modules=["fc1"])
    model = VarForImageGeneration.from_pretrained(folder, quantization_config=own)
    assert type(model.model.layers[0].mlp.fc1) is type(model.model.input_projection) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.fc2) is not torch.nn.Linear
    eight = BitsAndBytesConfig(load_in_8bit=True)
    model = VarForImageGeneration.from_pretrained(folder, quantization_config=eight)
    assert type(model.model.input_projection) is not torch.nn.Linear
    with pytest.raises(ValueError, match="holds no"):
        VarForImageGeneration.from_pretrained(tmp_path, quantization_config=four_bits())


def test_multiplications_are_reported_once(folder, caplog):
    model = VarForImageGeneration.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    for one in logging.getLogger(placement.MULTIPLICATIONS).filters:
        one.seen.clear()
    with caplog.at_level(logging.WARNING, logger="bitsandbytes"):
        model.generate([1], do_sample=False)
    assert len([record for record in caplog.records if "MatMul8bitLt" in record.getMessage()]) == 1


def refusal(folder) -> str:
    try:
        VarForImageGeneration.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    except ValueError as error:
        return str(error)
    return "none"


def test_heads_that_processes_cannot_divide(tmp_path):
    tiny_var(hidden_size=48, num_attention_heads=3).save_pretrained(tmp_path)
    for sentence in in_two_processes(refusal, tmp_path):
        assert "has 3 attention heads, which 2 processes of tensor parallelism cannot divide" in sentence


def test_slow_types_are_told(monkeypatch, recwarn):
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "cpu_has_float16", lambda: True)
    devices.warn_of_slow_dtype(torch.float16, cpu, stacklevel=1)
    monkeypatch.setattr(devices, "cpu_has_float16", lambda: False)
    devices.warn_of_slow_dtype(torch.bfloat16, cpu, stacklevel=1)
    devices.warn_of_slow_dtype(torch.float16, torch.device("cuda"), stacklevel=1)
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match="no instructions for it; load the model with dtype=torch.bfloat16"
    ) as told:
        devices.warn_of_slow_dtype(torch.float16, cpu, stacklevel=1)
    assert told[0].filename == __file__
