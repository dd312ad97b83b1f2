"""Importing the package, its public names, and the Auto classes."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_argen
from hf_argen import AutoModelForImageGeneration
from hf_argen.auto import FAMILIES

from .helpers.goldens import golden

IMPORT = """
import json, sys, time
from transformers import AutoModel, AutoProcessor, pipeline
start = time.perf_counter()
import hf_argen
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": [name for name in sys.modules if "hf_argen" in name]}))
"""


def test_import_is_light():
    """A fresh interpreter; the best of three, since another process may hold the processor."""
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(run["seconds"] for run in runs) < 0.5
    heavy = ("modeling_", "processing_", "convert_", "cli", "pipelines")
    names = [module.rsplit(".", 1)[-1] for module in runs[0]["modules"]]
    assert not [name for name in names if name.startswith(heavy)]


def test_public_names():
    assert set(hf_argen.__all__) == {*hf_argen._SOURCES, "__version__"}
    assert set(hf_argen.__all__) <= set(dir(hf_argen))
    for name in hf_argen.__all__:
        assert getattr(hf_argen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'VarForImageGenration'"):
        _ = hf_argen.VarForImageGenration


def test_every_class_of_the_table_exists():
    for name, family in FAMILIES.items():
        config_class = family.load(family.config)
        assert config_class.model_type == name
        for class_name in filter(None, (family.base_model, family.generator)):
            assert family.load(class_name).config_class is config_class or name == "code"
        assert AutoConfig.for_model(name).__class__ is config_class


@pytest.fixture(scope="module", params=["var", "code", "multiscale_vq"])
def saved(request, tmp_path_factory):
    case = golden("code", "d3_to_d2_s3") if request.param == "code" else golden("var", "d2_adaln_l2_q4")
    model = case.convert("tokenizer") if request.param == "multiscale_vq" else case.convert()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def test_auto_model_gives_the_base_model(saved):
    name, model, folder = saved
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is FAMILIES[name].load(FAMILIES[name].base_model)
    expected = model.model.state_dict() if name == "var" else model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_auto_model_for_image_generation(saved):
    name, model, folder = saved
    if name == "multiscale_vq":
        with pytest.raises(
            ValueError, match="'multiscale_vq' is no image generator of hf_argen; they are var, code"
        ):
            AutoModelForImageGeneration.from_pretrained(folder)
        return
    loaded = AutoModelForImageGeneration.from_pretrained(folder)
    assert type(loaded) is type(model)
    expected, found = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    fresh = AutoModelForImageGeneration.from_config(model.config, dtype=torch.bfloat16)
    assert type(fresh) is type(model) and fresh.head.out_proj.weight.dtype == torch.bfloat16


def test_auto_model_for_image_generation_is_strict(tmp_path):
    model = golden("var", "d2_adaln_l2_q4").convert()
    model.save_pretrained(
        tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "head" not in k}
    )
    with pytest.raises(ValueError, match=r"missing head\.out_proj\.bias"):
        AutoModelForImageGeneration.from_pretrained(tmp_path)


def test_auto_model_for_image_generation_is_no_model():
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoModelForImageGeneration()


def test_other_models_of_transformers_still_load():
    config = AutoConfig.for_model(
        "gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == "GPT2LMHeadModel"
    assert type(AutoModel.from_config(config)).__name__ == "GPT2Model"
