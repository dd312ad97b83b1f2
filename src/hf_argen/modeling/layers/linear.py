"""Linear layers where decoding spends its time: few rows, one or two for each picture."""

import torch
from torch import nn

LEAST_WEIGHTS = (
    2**19
)  # smaller layers belong to models that fit into a cache, where the plain product is faster
MOST_ROWS = 3
MOST_ROWS_OF_THREADS = 4


def linear(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """
    `layer(states)`, (..., in_features) to (..., out_features), of an `nn.Linear` or what stands in its place.

    For a few rows in float32 on a CPU PyTorch calls a BLAS routine that runs on one thread and reads the weights at a
    fraction of the memory's rate. There, the product of the weights, in two halves, and the rows as columns is taken: a
    quarter to a half of the time, and the same numbers up to the order of their sums.
    """
    if states.dtype is torch.float32 and not torch.compiler.is_compiling() and is_thin(layer, states):
        return thin_product(states, layer.weight, layer.bias)
    return layer(states)


def is_thin(layer: nn.Module, states: torch.Tensor) -> bool:
    """
    Whether the other product is faster, and no one minds: no gradients or autocast, nothing that has to hear of the
    layer's call, and the layer and its weight are just what they seem (not quantized, adapted, offloaded or sharded).
    """
    if type(layer) is not nn.Linear or layer.weight.numel() < LEAST_WEIGHTS:
        return False
    weight, rows = layer.weight, states.numel() // layer.weight.shape[1]
    if rows > MOST_ROWS and (rows > MOST_ROWS_OF_THREADS or torch.get_num_threads() == 1):
        return False
    own = layer.__dict__
    return (
        type(weight) is nn.Parameter
        and states.is_cpu
        and weight.is_cpu
        and weight.dtype is torch.float32
        and weight.is_contiguous()
        and rows > 0
        and states.shape[-1] == weight.shape[1]
        and weight.shape[0] % 2 == 0
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
        and not torch.is_grad_enabled()
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
