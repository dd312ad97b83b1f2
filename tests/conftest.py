"""Shared set-up of the tests."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.register_assert_rewrite("tests.modeling", "tests.generation", "tests.helpers")  # the shared test bases
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same state of torch's global generator."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Tests with the marker `gpu` run where there is one; elsewhere they are no part of the suite."""
    if not torch.cuda.is_available():
        without = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
