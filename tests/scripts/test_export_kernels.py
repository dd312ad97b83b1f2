"""Kernels as repositories of the `kernels` library."""

import importlib
import sys

import pytest
import torch
from kernels import get_local_kernel

from hf_argen.kernels import OPERATIONS, use

from ..kernels.kernel_base import KernelTests, Recorder, assert_agree


def made_for(operation: str) -> KernelTests:
    """The tests of the operation, which know how to call it."""
    module = importlib.import_module(f"tests.kernels.test_{operation}")
    return next(
        one() for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__
    )


@pytest.fixture(scope="module")
def repositories(load_script, tmp_path_factory):
    """All of them, written once."""
    out = tmp_path_factory.mktemp("kernels")
    load_script("export_kernels").main([str(out)])
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_round_trip(repositories, operation):
    """Loaded by the library, both implementations give what ours give, as operations of another name."""
    loaded = get_local_kernel(repositories / operation)
    tests = made_for(operation)
    function = getattr(loaded, tests.function.__name__)
    assert function is not tests.function
    inputs = tests.inputs(next(iter(tests.cases)))
    inputs.pop("slot", None)  # a cache that tests allocate themselves
    with torch.no_grad():
        for mode in ("reference", "triton"):
            with use(mode):
                expected = tests.function(**tests.tensors(inputs))
            with loaded.use(mode), Recorder(loaded.__name__) as recorder:
                found = function(**tests.tensors(inputs))
            expected, found = (one if isinstance(one, tuple) else (one,) for one in (expected, found))
            for one, other in zip(found, expected, strict=True):
                assert_agree(one, other)
            assert bool(recorder.calls) == (mode == "triton")  # kernels are operations of their own


def test_nothing_of_this_package_is_needed(repositories):
    for path in repositories.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "import hf_argen" not in source and "from hf_argen" not in source, path


def test_unknown_operation(load_script, tmp_path):
    with pytest.raises(SystemExit, match="There is no operation 'attention'; there are adaln"):
        load_script("export_kernels").main([str(tmp_path), "--operation", "attention"])
