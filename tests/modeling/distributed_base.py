"""What holds for every family whose work two processes share."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers.distributed import DistributedConfig

from ..helpers.processes import SIZE, in_two_processes


class DistributedTests:
    """Part of [`FamilyTests`]; what the processes find out is shared by the tests of a class."""

    @pytest.fixture(scope="class")
    @classmethod
    def together(cls, folder, tmp_path_factory) -> list[dict[str, Any]]:
        """What each of two processes saw."""
        return in_two_processes(work_together, cls, folder, tmp_path_factory.mktemp("together"))

    @pytest.fixture(scope="class")
    @classmethod
    def alone(cls, folder) -> dict[str, Any]:
        """What one process sees."""
        return work_alone(cls(), cls.model_class.from_pretrained(folder))

    def test_tensor_parallelism_divides_the_weights(self, together, model):
        """Every rule of the plan that divides finds weights, and leaves each process half of them."""
        whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
        for seen in together:
            rules, own = seen["tensor parallel"]["plan"], seen["tensor parallel"]["sizes"]
            divided = {name for name in whole if own[name] * SIZE == whole[name]}
            assert all(own[name] in (size, size / SIZE) for name, size in whole.items())
            for rule in rules:
                assert any(matches(name, rule) for name in divided), rule
            assert sum(whole[name] for name in divided) > 0.3 * sum(whole.values())

    def test_tensor_parallelism_gives_the_tokens_of_one_process(self, together, alone):
        for seen in together:
            assert self.same(seen["tensor parallel"]["greedy"], alone["greedy"])

    def test_tensor_parallelism_draws_the_same_noise(self, together, alone):
        """That of the first process, although the generators of the processes had other seeds."""
        for seen in together:
            for kind in ("global generator", "one generator", "generators"):
                assert self.same(seen["tensor parallel"][kind], alone[kind]), kind

    def test_tensor_parallelism_saves_the_whole_model(self, together):
        assert all(seen["tensor parallel"]["saved is whole"] for seen in together)

    @pytest.mark.parametrize("kind", ["tensor parallel", "DDP", "FSDP"])
    def test_loss_and_gradient_norm_of_one_process(self, together, alone, kind):
        for seen in together:
            for feed in self.feeds:
                found, expected = seen[kind][feed], alone[feed]
                assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
                assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4)

    def test_fsdp_divides_the_weights(self, together, alone):
        """They can be put together again, and the divided model generates."""
        for seen in together:
            assert seen["FSDP"]["is divided"] and seen["FSDP"]["gathers the whole"]
            assert self.same(seen["FSDP"]["greedy"], alone["greedy"])


def matches(name: str, rule: str) -> bool:
    """Whether a rule of a plan is about a weight."""
    parts = [part if part != "*" else None for part in rule.split(".")]
    own = name.split(".")[: len(parts)]
    return len(own) == len(parts) and all(
        part in (None, found) for part, found in zip(parts, own, strict=True)
    )


def drawn(tests: Any, model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Tokens of greedy decoding, and of noise from every kind of generator."""
    conditions = tests.conditions(2)
    torch.manual_seed(seed)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(3)]
    return {
        "greedy": model.generate(**conditions, do_sample=False, guidance_scale=1.5),
        "global generator": model.generate(**conditions, **tests.sampling),
        "one generator": model.generate(**conditions, **tests.sampling, generator=generators[2]),
        "generators": model.generate(**conditions, **tests.sampling, generator=generators[:2]),
    }


def trained(tests: Any, model: torch.nn.Module, feed: str) -> dict[str, float]:
    """Loss and gradient norm of a whole batch; gradients of divided weights are put together."""
    model.train().zero_grad()
    loss = model(**tests.make_batch(feed)).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return {"loss": loss.item(), "norm": torch.stack([whole(one).norm() for one in gradients]).norm().item()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which every process may hold a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work_alone(tests: Any, model: torch.nn.Module) -> dict[str, Any]:
    return drawn(tests, model, seed=0) | {feed: trained(tests, model, feed) for feed in tests.feeds}


def work_together(test_class: type, folder: Path, scratch: Path) -> dict[str, Any]:
    """Runs in each of the processes."""
    tests = test_class()
    return {
        "tensor parallel": tensor_parallel(tests, folder, scratch),
        "DDP": data_parallel(tests, folder, is_sharded=False),
        "FSDP": data_parallel(tests, folder, is_sharded=True),
    }


def tensor_parallel(tests: Any, folder: Path, scratch: Path) -> dict[str, Any]:
    load = tests.model_class.from_pretrained
    model = load(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    seen = drawn(tests, model, seed=100 * int(os.environ["RANK"]))
    seen |= {feed: trained(tests, model, feed) for feed in tests.feeds}
    seen["plan"] = [rule for rule, style in model.tp_plan.items() if not style.startswith("replicated")]
    seen["sizes"] = {
        name: (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()
        for name, parameter in model.named_parameters()
    }
    model.save_pretrained(scratch)
    torch.distributed.barrier()
    original, saved = load(folder).state_dict(), load(scratch).state_dict()
    seen["saved is whole"] = all(torch.equal(saved[key], tensor) for key, tensor in original.items())
    return seen


def data_parallel(tests: Any, folder: Path, is_sharded: bool) -> dict[str, Any]:
    """Each process trains on its rows of the batch, as accelerate prepares the model."""
    seen: dict[str, Any] = {}
    for feed in tests.feeds:
        AcceleratorState._reset_state(reset_partial_state=True)
        unused = DistributedDataParallelKwargs(find_unused_parameters=bool(tests.without_gradient))
        accelerator = Accelerator(cpu=True, kwargs_handlers=[unused])
        if is_sharded:
            # accelerate wraps models for FSDP on GPUs only; what it wraps then runs on a CPU too.
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
            )
        model = tests.model_class.from_pretrained(folder).train()
        original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        prepared, _ = accelerator.prepare(model, torch.optim.SGD(weights))
        rank, size = accelerator.process_index, accelerator.num_processes
        batch = {name: tensor.chunk(size)[rank] for name, tensor in tests.make_batch(feed).items()}
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(prepared.parameters(), 1e9)
        seen[feed] = {
            "loss": accelerator.reduce(loss.detach(), "mean").item(),
            "norm": whole(norm).item(),
        }
    if is_sharded:
        seen["is divided"] = all(hasattr(parameter, "to_local") for parameter in prepared.parameters())
        saved = {name: whole(tensor) for name, tensor in prepared.state_dict().items()}
        seen["gathers the whole"] = all(torch.equal(saved[name], one) for name, one in original.items())
        register_fsdp_forward_method(prepared, "generate")
        conditions = tests.conditions(2)
        seen["greedy"] = prepared.eval().generate(**conditions, do_sample=False, guidance_scale=1.5)
    return seen
