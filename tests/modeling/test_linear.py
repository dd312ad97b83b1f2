"""The product of few rows: what `nn.Linear` gives, by another way."""

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
def threads():
    """Sets the number of threads; the test's own comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


def test_four_rows_need_two_threads(layer, thin, threads):
    states = torch.randn(4, 1, INPUTS)
    with torch.no_grad():
        threads(1)
        linear(layer, states)
        assert not thin
        threads(2)
        torch.testing.assert_close(linear(layer, states), layer(states))
    assert thin == [(4, 1, INPUTS)]


class Adapted(nn.Linear):
    """A layer that is more than its weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_what_the_layer_does_itself(layer, thin):
    few = torch.randn(2, INPUTS)
    transposed = nn.Linear(INPUTS, OUTPUTS)
    transposed.weight = nn.Parameter(torch.randn(INPUTS, OUTPUTS).t())
    replaced = copy.deepcopy(layer)
    replaced.forward = lambda states: F.linear(states, layer.weight)  # as accelerate does
    with torch.no_grad():
        for one, states in (
            (layer, torch.randn(9, INPUTS)),
            (layer, torch.randn(0, INPUTS)),
            (nn.Linear(256, 256), torch.randn(2, 256)),
            (nn.Linear(INPUTS, OUTPUTS + 1), few),
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
    assert not thin


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


def test_compiled_products_go_by_it(layer):
    """In one graph; rows that do not are products of the layer there, too."""
    compiled = torch.compile(lambda states: linear(layer, states), backend="eager", fullgraph=True)
    for rows, name in ((2, "bmm"), (5, "addmm")):
        states = torch.randn(rows, INPUTS)
        with torch.no_grad():
            torch.testing.assert_close(compiled(states), layer(states))
            with torch.profiler.profile() as profile:
                compiled(states)
        assert f"aten::{name}" in {event.key for event in profile.key_averages()}


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
