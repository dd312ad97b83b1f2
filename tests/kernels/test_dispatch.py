"""Which implementation runs where."""

from types import SimpleNamespace

import pytest
import torch

from hf_argen.kernels import OPERATIONS, bounds, dispatch, mode, use
from hf_argen.kernels.bounds import CODE, SIZES, prefers_reference
from hf_argen.kernels.dispatch import runs_kernel
from hf_argen.kernels.variants import CHIPS

MEASURED = {
    "sm_90": {
        "plain": {"adaln": [{"rows": [1, 16], "hidden": [640, 2560]}, {"rows": [64, 64], "hidden": [8, 8]}]},
        "compiled": {"verify_draft": [{"rows": [1, 4], "nodes": [0, 8], "vocab": [1, 1000]}]},
    }
}
INSIDE = {"rows": 16, "hidden": 640}
OUTSIDE = [{"rows": 17, "hidden": 640}, {"rows": 16, "hidden": 639}, {"rows": 64, "hidden": 9}]


@pytest.fixture
def measured(monkeypatch):
    """A table with one chip, on a machine that has it."""
    monkeypatch.setattr(bounds, "BOUNDS", MEASURED)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    """What is asked of a tensor on a GPU."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


@pytest.mark.usefixtures("measured")
def test_the_reference_where_it_is_faster():
    with use("auto"):
        assert not runs_kernel(on_gpu(), "adaln", **INSIDE)
        assert not runs_kernel(on_gpu(), "adaln", rows=64, hidden=8)
        assert all(runs_kernel(on_gpu(), "adaln", **sizes) for sizes in OUTSIDE)
        assert runs_kernel(on_gpu(), "sample_logits", rows=16, vocab=640)  # another operation
        assert not runs_kernel(on_gpu(torch.float64), "adaln", **OUTSIDE[0])
    with use("triton"):
        assert runs_kernel(on_gpu(), "adaln", **INSIDE)
    with use("reference"):
        assert not runs_kernel(on_gpu(), "adaln", **OUTSIDE[0])


@pytest.mark.usefixtures("measured")
def test_chips_that_were_not_measured_take_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    with use("auto"):
        assert runs_kernel(on_gpu(), "adaln", **INSIDE)


def test_nothing_is_asked_of_a_gpu_without_bounds(monkeypatch):
    monkeypatch.setattr(bounds, "BOUNDS", {})
    assert not prefers_reference("adaln", torch.device("cuda", 0), INSIDE)


@pytest.mark.usefixtures("measured")
def test_compiled_code_has_its_own_bounds():
    """The question is answered while the graph is made, and leaves nothing in it."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    def answers(x: torch.Tensor) -> torch.Tensor:
        sizes = {"rows": x.shape[0], "nodes": 8, "vocab": x.shape[1]}
        small = prefers_reference("verify_draft", torch.device("cuda", 0), sizes)
        other = prefers_reference("adaln", torch.device("cuda", 0), {"rows": x.shape[0], "hidden": 640})
        return x + small + 2 * other

    rows = torch.zeros(4, 1000)
    assert (answers(rows) == 2).all()
    torch._dynamo.reset()
    assert (torch.compile(answers, backend=backend, fullgraph=True)(rows) == 1).all()
    assert [node.op for node in graphs[0].graph.nodes].count("call_function") <= 2


def test_chips_have_the_names_that_compilers_give_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert bounds.chip_of(0) == "sm_90"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    name = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: name)
    assert bounds.chip_of(0) == "gfx942"
    assert {"sm_90", "gfx942"} <= set(CHIPS)


def test_the_table_that_comes_with_the_package():
    """Chips, kinds of code, operations and sizes that there are, and bounds that hold something."""
    assert set(SIZES) == set(OPERATIONS)
    for chip, kinds in bounds.BOUNDS.items():
        assert chip.startswith(("sm_", "gfx")) and set(kinds) <= {*CODE, "measured"}
        for kind in CODE:
            for operation, boxes in kinds.get(kind, {}).items():
                for box in boxes:
                    assert tuple(box) == SIZES[operation]
                    assert all(0 <= least <= most for least, most in box.values())


def test_modes():
    before = mode()
    with use("reference"):
        assert mode() == "reference"
    assert mode() == before
    message = "HF_ARGEN_KERNELS is 'cuda'; it must be one of auto, reference, triton"
    with pytest.raises(ValueError, match=message), use("cuda"):
        raise AssertionError("not reached")
