"""Linear layers where generation spends its time: the same products by the fastest way that PyTorch has on a CPU."""

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.library import NAMESPACE

LEAST_WEIGHTS = 2**19  # a cache holds models with smaller layers, and there the plain product is faster
MOST_THIN_ROWS = 3
# For float32 PyTorch calls MKL, though it brings oneDNN, which is faster on large layers.
HAS_ONEDNN = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """
    `layer(states)`, (..., in_features) to (..., out_features), of an `nn.Linear` or what stands in its place.

    For float32 on a CPU PyTorch calls a BLAS routine that reads large weights at a fraction of the memory's rate where rows are
    few, and is slower than oneDNN's up to several hundred of them. Up to three rows go by the product of the weights, in two
    halves, and the rows as columns, a quarter to a half of the time; more by oneDNN, 0.4 to 0.95 of it. The numbers are the
    same up to the order of their sums.
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
    may_differ = states.dtype is torch.float32 and states.is_cpu and not torch.is_autocast_enabled("cpu")
    inputs = states.shape[-1]
    rows = states.numel() // (inputs or 1) if may_differ else 0
    outputs, columns = [], None
    for layer in layers:
        if not is_plain(layer):
            outputs.append(layer(states))
            continue
        parameters = layer.__dict__["_parameters"]  # so no attribute is looked for in vain
        weight, bias = parameters["weight"], parameters["bias"]
        if rows == 0 or not is_large(weight, inputs):
            outputs.append(F.linear(states, weight, bias))
        elif rows <= MOST_THIN_ROWS and weight.shape[0] % 2 == 0:
            columns = thin_columns(states) if columns is None else columns
            outputs.append(thin_product(columns, weight, bias, states.shape[:-1]))
        else:
            outputs.append(onednn_product(states, weight, bias))
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


def is_large(weight: torch.Tensor, inputs: int) -> bool:
    """Whether weights (outputs, inputs) are so many that the other ways of a product are faster."""
    return (
        weight.numel() >= LEAST_WEIGHTS
        and weight.dtype is torch.float32
        and weight.is_cpu
        and weight.shape[1] == inputs
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


def onednn_product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """states (..., inputs) @ weight.T + bias by oneDNN, where this PyTorch has it."""
    if not HAS_ONEDNN:
        return F.linear(states, weight, bias)
    product = _compiled_onednn if torch.compiler.is_compiling() else _onednn
    return product(states, weight, bias)


def _onednn(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


# The compiler knows oneDNN's own operation for constant weights alone.
_compiled_onednn = torch.library.custom_op(f"{NAMESPACE}::onednn_linear", _onednn, mutates_args=())


@_compiled_onednn.register_fake
def _onednn_output(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return states.new_empty((*states.shape[:-1], weight.shape[0]))
