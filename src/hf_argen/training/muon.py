"""Muon for the matrices of a model, AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """
    Muon (`torch.optim.Muon`, Jordan et al. 2024; scaled as in arXiv 2502.16982, so that one learning rate serves both)
    for the matrices between hidden layers, AdamW for embeddings, output layers, norms and biases.

    Small models that have to know their data by heart need fewer steps with it than with AdamW alone.

    Args:
        model: its parameters that require gradients are trained. Matrices of `nn.Linear` go to Muon, save those that
            share their weight with an embedding.
        lr: learning rate of both.
        weight_decay: of both, decoupled.
        betas: of AdamW.
        momentum: of Muon.
        output_layers: names of modules whose matrices go to AdamW too.

    Raises:
        ValueError: no matrix is left for Muon.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        output_layers: Sequence[str] = ("lm_head", "head.out_proj", "head.net.output.linear"),
    ):
        matrices, rest = split(model, output_layers)
        if not matrices:
            raise ValueError(f"{type(model).__name__} has no matrices for Muon: train it with AdamW.")
        self._muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Lets both optimizers work on the groups and the state of this one."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss


def split(model: nn.Module, output_layers: Sequence[str]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices that Muon trains, and all other parameters that are trained."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in output_layers
    } - tables
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trained if id(p) in hidden], [p for p in trained if id(p) not in hidden]
