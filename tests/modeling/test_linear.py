"""Products of large layers: what `nn.Linear` gives, by other ways."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_argen.modeling.layers import linear as module
from hf_argen.modeling.layers.linear import linear, linears

from ..helpers.tiny import tiny_llamagen, tiny_rar

INPUTS, OUTPUTS = 512, 1026


@pytest.fixture(scope="module")
def layer():
    return nn.Linear(INPUTS, OUTPUTS).eval()


@pytest.fixture
def thin(monkeypatch):
    """Shapes that went by the other product."""
    seen, product = [], module.thin_product

    def noted(columns, weight, bias, shape):
        seen.append((*shape, columns.shape[1]))
        return product(columns, weight, bias, shape)

    monkeypatch.setattr(module, "thin_product", noted)
    return seen


@pytest.fixture
def onednn(monkeypatch):
    """Shapes that went by oneDNN."""
    seen, product = [], module.onednn_product

    def noted(states, weight, bias):
        seen.append(tuple(states.shape))
        return product(states, weight, bias)

    monkeypatch.setattr(module, "onednn_product", noted)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(INPUTS,), (2, INPUTS), (2, 1, INPUTS), (3, 1, INPUTS), (1, 2, INPUTS)])
def test_few_rows_give_the_same(layer, thin, shape, bias):
    one = layer if bias else nn.Linear(INPUTS, OUTPUTS, bias=False)
    states = torch.randn(shape)
    with torch.no_grad():
        found, expected = linear(one, states), one(states)
    assert thin == [shape]
    assert found.shape == expected.shape and found.is_contiguous()
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_rows_that_do_not_lie_next_to_each_other(layer, thin):
    states = torch.randn(1, INPUTS, 2).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, states), layer(states))
    assert thin == [(1, 2, INPUTS)]


def test_several_layers_of_one_input(layer, thin):
    """Each goes its own way."""
    others = (nn.Linear(INPUTS, 8), Adapted(INPUTS, OUTPUTS), nn.Linear(INPUTS, 2 * OUTPUTS, bias=False))
    states = torch.randn(2, 1, INPUTS)
    with torch.no_grad():
        found = linears(states, layer, *others)
        for one, product in zip((layer, *others), found, strict=True):
            torch.testing.assert_close(product, one(states))
    assert thin == [(2, 1, INPUTS)] * 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, INPUTS), (2, 3, INPUTS), (3, 1, 1, INPUTS, 64)])
def test_more_rows_give_the_same(layer, thin, onednn, shape, bias):
    """However they lie in memory."""
    one = layer if bias else nn.Linear(INPUTS, OUTPUTS, bias=False)
    states = torch.randn(shape)
    if len(shape) > 3:
        states = states.transpose(-1, -2)
    with torch.no_grad():
        found, expected = linear(one, states), one(states)
    assert onednn == [states.shape] and not thin
    assert found.shape == expected.shape and found.is_contiguous()
    assert (found - expected).abs().max() < 3e-6 * expected.abs().max()


def test_odd_outputs_of_few_rows_have_no_halves(thin, onednn):
    one, states = nn.Linear(INPUTS, OUTPUTS + 1), torch.randn(2, INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(linear(one, states), one(states))
    assert onednn == [(2, INPUTS)] and not thin


def test_without_onednn(layer, onednn, monkeypatch):
    monkeypatch.setattr(module, "HAS_ONEDNN", False)
    states = torch.randn(5, INPUTS)
    with torch.no_grad():
        assert torch.equal(linear(layer, states), layer(states))
    assert onednn == [(5, INPUTS)]


class Adapted(nn.Linear):
    """A layer that is more than its weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_what_the_layer_does_itself(layer, thin, onednn):
    few = torch.randn(2, INPUTS)
    transposed = nn.Linear(INPUTS, OUTPUTS)
    transposed.weight = nn.Parameter(torch.randn(INPUTS, OUTPUTS).t())
    replaced = copy.deepcopy(layer)
    replaced.forward = lambda states: F.linear(states, layer.weight)  # as accelerate does
    with torch.no_grad():
        for one, states in (
            (layer, torch.randn(0, INPUTS)),
            (nn.Linear(256, 256), torch.randn(2, 256)),
            (Adapted(INPUTS, OUTPUTS), few),
            (transposed, few),
            (replaced, few),
            (copy.deepcopy(layer).bfloat16(), few.bfloat16()),
            (copy.deepcopy(layer).double(), few.double()),
        ):
            torch.testing.assert_close(linear(one, states), one(states), rtol=0, atol=0)
        assert linear(copy.deepcopy(layer).to("meta"), few.to("meta")).shape == (2, OUTPUTS)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(layer, few).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            linear(layer, torch.randn(2, INPUTS + 1))
    assert not thin and not onednn


@pytest.mark.parametrize("method", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_hear_of_the_call(layer, thin, method):
    one, heard = copy.deepcopy(layer), []
    getattr(one, method)(lambda *given: heard.append(given))
    with torch.no_grad():
        linear(one, torch.randn(2, INPUTS))
    assert len(heard) == 1 and not thin


def test_gradients_are_those_of_torch(layer, thin):
    states = torch.randn(2, 1, INPUTS)
    gradients = []
    for product in (linear, lambda one, states: one(states)):
        given = states.clone().requires_grad_()
        layer.zero_grad()
        product(layer, given).square().sum().backward()
        gradients.append((given.grad, layer.weight.grad, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and not thin


class Caller(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return linear(self.layer, states)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_products_go_by_it(layer, backend):
    """In one graph."""
    compiled = torch.compile(lambda states: linear(layer, states), backend=backend, fullgraph=True)
    for rows, name in ((2, "aten::bmm"), (5, "mkldnn::_linear_pointwise")):
        states = torch.randn(rows, INPUTS)
        with torch.no_grad():
            torch.testing.assert_close(compiled(states), layer(states))
            with torch.profiler.profile() as profile:
                compiled(states)
        assert name in {event.key for event in profile.key_averages()}


def test_an_exported_layer_is_one_for_any_rows(layer, thin):
    with torch.no_grad():
        exported = torch.export.export(Caller(layer), (torch.randn(2, INPUTS),))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert names == {"aten.linear.default"} and not thin


@pytest.mark.parametrize("build", [tiny_llamagen, tiny_rar])
def test_models_go_by_it(build, thin, monkeypatch):
    """All products of a guided token but the embeddings of the condition; same tokens."""
    model = build().eval()
    request = {"class_labels": [1], "guidance_scale": 3.0, "do_sample": False, "max_new_tokens": 5}
    expected = model.generate(**request)
    assert not thin
    monkeypatch.setattr(module, "LEAST_WEIGHTS", 0)
    assert torch.equal(model.generate(**request), expected)
    assert len(thin) >= 5 * (6 * model.config.num_hidden_layers + 1)
