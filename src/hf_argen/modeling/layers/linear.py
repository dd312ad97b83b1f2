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
    return linears(states, layer)[0]


def linears(states: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """
    What [`linear`] gives of several layers with the same input.

    At one token a step calls count, and so does how a module's parts are reached: as attributes they are looked for
    everywhere else first, which takes as long as three calls. Where every token passes, they are taken out of `_modules`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_exporting():
        return [layer(states) for layer in layers]
    may_be_thin = states.dtype is torch.float32 and has_few_rows(states)
    outputs, columns = [], None
    for layer in layers:
        if not is_plain(layer):
            outputs.append(layer(states))
            continue
        parameters = layer.__dict__["_parameters"]  # so no attribute is looked for in vain
        weight, bias = parameters["weight"], parameters["bias"]
        if may_be_thin and is_read_faster(weight, states.shape[-1]):
            columns = thin_columns(states) if columns is None else columns
            outputs.append(thin_product(columns, weight, bias, states.shape[:-1]))
        else:
            outputs.append(F.linear(states, weight, bias))
    return outputs


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


def has_few_rows(states: torch.Tensor) -> bool:
    """Whether float32 states (..., inputs) are so few rows that products may be faster the other way."""
    rows = states.numel() // (states.shape[-1] or 1)
    if rows > MOST_ROWS:
        is_alone = torch.compiler.is_compiling() or torch.get_num_threads() == 1
        if is_alone or rows > MOST_ROWS_OF_THREADS:
            return False
    return rows > 0 and states.is_cpu and not torch.is_autocast_enabled("cpu")


def is_read_faster(weight: torch.Tensor, inputs: int) -> bool:
    """Whether weights (outputs, inputs) are faster the other way, with few rows."""
    return (
        weight.numel() >= LEAST_WEIGHTS
        and weight.dtype is torch.float32
        and weight.is_cpu
        and weight.shape[1] == inputs
        and weight.shape[0] % 2 == 0
        and weight.is_contiguous()
    )


def thin_columns(states: torch.Tensor) -> torch.Tensor:
    """States (..., inputs) as columns (2, inputs, rows), once for each half of the weights."""
    return states.reshape(1, -1, states.shape[-1]).expand(2, -1, -1).mT


def thin_product(
    columns: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: torch.Size
) -> torch.Tensor:
    """
    states @ weight.T + bias, (*shape, outputs).

    Args:
        columns: of the states, see [`thin_columns`].
        weight: (outputs, inputs); the number of outputs is even.
        shape: of the states, but for their last dimension.
    """
    outputs, inputs = weight.shape
    product = torch.bmm(weight.view(2, outputs // 2, inputs), columns)
    # Copied, since rows that are no rows in memory make the next product slow.
    product = product.permute(2, 0, 1).contiguous().view(*shape, outputs)
    return product if bias is None else product.add_(bias)
