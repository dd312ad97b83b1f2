"""The optimizer of small models: each parameter with its own method, exact resume."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_argen.training import MuonWithAdamW, training_arguments


def tiny(tie: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tie,
        )
    )


def step(model: nn.Module, *optimizers: torch.optim.Optimizer, seed: int = 0) -> None:
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tie", [True, False])
def test_matrices_go_to_muon_and_the_rest_to_adamw(tie):
    model = tiny(tie)
    muon, adamw = MuonWithAdamW(model, 1e-2).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in muon["params"]} == {name for name in names.values() if "proj" in name}
    assert len(muon["params"]) + len(adamw["params"]) == len(names)


def test_a_step_is_one_of_muon_and_one_of_adamw():
    model, other = tiny(), tiny()
    ours = MuonWithAdamW(model, 1e-2, weight_decay=0.1)
    matrices = [p for name, p in other.named_parameters() if "proj" in name]
    rest = [p for name, p in other.named_parameters() if "proj" not in name]
    theirs = (
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)),
    )
    for seed in range(3):
        step(model, ours, seed=seed)
        step(other, *theirs, seed=seed)
    for mine, reference in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, reference)


def test_state_goes_on_where_it_stopped():
    model = tiny()
    optimizer = MuonWithAdamW(model, 1e-2)
    step(model, optimizer)
    resumed = copy.deepcopy(model)
    second = MuonWithAdamW(resumed, 1.0)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        step(model, optimizer, seed=seed)
        step(resumed, second, seed=seed)
    for mine, again in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, again)


def test_a_scheduler_of_trainer_moves_both_learning_rates(tmp_path):
    model = tiny()
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    arguments = training_arguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
    )
    optimizer = MuonWithAdamW(model, 1e-2)
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_a_model_without_matrices_is_refused():
    with pytest.raises(ValueError, match="Embedding has no matrices for Muon"):
        MuonWithAdamW(nn.Embedding(4, 4), 1e-2)
