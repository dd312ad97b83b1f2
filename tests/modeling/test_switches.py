"""Switches of transformers that place or split a model: offloading, tensor parallelism, quantization."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_argen import VarForImageGeneration

from ..generation.test_shared import tiny_code
from ..helpers.goldens import REPOSITORY
from ..helpers.tiny import tiny_var

MODELS = {
    "var": tiny_var,
    "var_shared": lambda **changes: tiny_var(shared_adaln=True, use_qk_norm=False, **changes),
    "code": tiny_code,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of each: the model, its folder, and what it generates."""
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(3)
        model = make(condition_dropout=0.0)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = model, folder, model.generate([1, 2], do_sample=False, guidance_scale=1.5)
    return found


@pytest.mark.filterwarnings(
    "ignore:The following device_map keys:UserWarning"
)  # accelerate knows modules only
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["auto", "disk", "split"])
def test_device_map(saved, name, kind, tmp_path):
    """Weights that lie on the disk until their module is called give the same numbers."""
    model, folder, ids = saved[name]
    options = {
        "auto": {"device_map": "auto"},
        "disk": {"device_map": {"": "disk"}, "offload_folder": tmp_path},
        "split": {"device_map": "auto", "max_memory": {"cpu": 90_000}, "offload_folder": tmp_path},
    }
    loaded = type(model).from_pretrained(folder, **options[kind])
    is_offloaded = any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert is_offloaded == (kind != "auto")
    assert torch.equal(loaded.generate([1, 2], do_sample=False, guidance_scale=1.5), ids)
    inputs = {"class_labels": torch.tensor([1, 2]), "input_ids": ids, "labels": ids}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
        assert torch.equal(loaded.decode_images(ids), model.decode_images(ids))


RANK = """
import sys, torch
from transformers.distributed import DistributedConfig
from hf_argen import AutoModelForImageGeneration

for folder in sys.argv[1:]:
    model = AutoModelForImageGeneration.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for weight, dim in ((attention.q_proj, 0), (attention.o_proj, 1), (mlp.fc1, 0), (mlp.fc2, 1)):
        assert weight.weight.to_local().shape[dim] == weight.weight.shape[dim] // 2
    ids = model.generate([1, 2], do_sample=False, guidance_scale=1.5)
    loss = model(input_ids=ids, class_labels=torch.tensor([1, 2]), labels=ids).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    model.save_pretrained(f"{folder}/again")
    found = {"ids": ids, "loss": loss.detach(), "gradients": whole}
    torch.save(found, f"{folder}/{torch.distributed.get_rank()}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_ranks(*arguments: str) -> None:
    """Runs `RANK` in two processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY / "src"),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


def test_tensor_parallelism(saved):
    """Two processes hold half of the heads each: same tokens, loss and gradients, and the same file when saved."""
    run_ranks(*(str(folder) for _, folder, _ in saved.values()))
    for model, folder, ids in saved.values():
        model.zero_grad()
        loss = model(input_ids=ids, class_labels=torch.tensor([1, 2]), labels=ids).loss
        loss.backward()
        for rank in range(2):
            found = torch.load(folder / f"{rank}.pt", weights_only=True)
            assert torch.equal(found["ids"], ids)
            assert torch.allclose(found["loss"], loss, rtol=1e-5)
            for name, parameter in model.named_parameters():
                assert (parameter.grad is None) == (name not in found["gradients"]), name
                if parameter.grad is not None:
                    assert torch.allclose(found["gradients"][name], parameter.grad, atol=1e-5), name
        again, weights = (load_file(path / "model.safetensors") for path in (folder / "again", folder))
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        assert "tp_plan" not in (folder / "config.json").read_text()


def test_quantized_models_compute_in_bfloat16(tmp_path, monkeypatch):
    """Unless told otherwise; what the quantizer makes of the weights is its own matter."""
    seen = []

    def from_pretrained(cls, *args, **kwargs):
        seen.append(kwargs.get("dtype"))
        return tiny_var(), {}

    tiny_var().save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    VarForImageGeneration.from_pretrained(tmp_path, quantization_config={})
    VarForImageGeneration.from_pretrained(tmp_path, quantization_config={}, dtype=torch.float32)
    VarForImageGeneration.from_pretrained(tmp_path)
    assert seen == [torch.bfloat16, torch.float32, None]
