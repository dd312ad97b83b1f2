"""Shared set-up of the tests."""

import os

import pytest

pytest.register_assert_rewrite("tests.modeling", "tests.generation", "tests.helpers")  # the shared test bases

from .helpers.local_hub import TOKEN, LocalHub  # noqa: E402

HUB = LocalHub()
os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported
os.environ["HF_ENDPOINT"] = HUB.endpoint  # read when huggingface_hub is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # but for the tests that ask for `hub`
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NO_PROXY"] = "127.0.0.1,localhost"

import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often each work is killed (tests of faults)")


@pytest.fixture(scope="session")
def kills(request) -> int:
    """How often each work is killed."""
    return request.config.getoption("--kills")


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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub of this machine, empty, with a cache and a token; the only one that the tests can reach."""
    HUB.clear()
    HUB.start()
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 2**14
    )  # a broken download is kept up to the last chunk
    for name, value in {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache), "HF_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    yield HUB
    HUB.clear()
