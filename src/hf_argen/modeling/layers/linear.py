"""Linear layers where decoding spends its time: few rows, one or two for each picture."""

import torch
import torch.nn.functional as F
from torch import nn

LEAST_WEIGHTS = 2**19  # a cache holds models with smaller layers, and there the plain product is faster
MOST_ROWS = 3
MOST_ROWS_OF_THREADS = 4


def linear(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """
    `layer(states)`, (..., in_features) to (..., out_features), of an `nn.Linear` or what stands in its place.

    For a few rows in float32 on a CPU PyTorch calls a BLAS routine that runs on one thread and reads the weights at a
    fraction of the memory's rate. There, the product of the weights, in two halves, and the rows as columns is taken: a
    quarter to a half of the time, and the same numbers up to the order of their sums.
    """
    if torch.is_grad_enabled() or torch.compiler.is_exporting() or not is_plain(layer):
        return layer(states)
    # At one token a step calls count, those that look for attributes, too.
    weight, bias = layer.__dict__["_parameters"]["weight"], layer.__dict__["_parameters"]["bias"]
    if states.dtype is torch.float32 and is_thin(states, weight):
        return thin_product(states, weight, bias)
    return F.linear(states, weight, bias)


def is_plain(layer: nn.Module) -> bool:
    """
    Whether the layer's call is nothing but the product: it is not quantized, adapted, offloaded or sharded, and nothing has
    to hear of the call.
    """
    if type(layer) is not nn.Linear:
        return False
    own = layer.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return False
    return type(own["_parameters"].get("weight")) is nn.Parameter


def is_thin(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product of float32 states and weights (outputs, inputs) is faster the other way, without autograd."""
    if weight.numel() < LEAST_WEIGHTS or states.shape[-1] != weight.shape[1]:
        return False
    rows = states.numel() // weight.shape[1]
    is_alone = torch.compiler.is_compiling() or torch.get_num_threads() == 1
    most = MOST_ROWS if is_alone else MOST_ROWS_OF_THREADS
    return (
        0 < rows <= most
        and states.is_cpu
        and weight.is_cpu
        and weight.dtype is torch.float32
        and weight.is_contiguous()
        and weight.shape[0] % 2 == 0
        and not torch.is_autocast_enabled("cpu")
    )


def thin_product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """states @ weight.T + bias; `weight` (outputs, inputs) has an even number of outputs."""
    outputs, inputs = weight.shape
    columns = states.reshape(-1, inputs).t()
    product = torch.bmm(weight.view(2, outputs // 2, inputs), columns.expand(2, -1, -1))
    product = product.view(outputs, -1).t().contiguous()
    if bias is not None:
        product += bias
    return product.view(*states.shape[:-1], outputs)
