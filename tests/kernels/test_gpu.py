"""The kernels as a GPU runs them, native bfloat16 included."""

import os
import subprocess
import sys

import pytest

from ..helpers.goldens import REPOSITORY


@pytest.mark.gpu
def test_every_kernel_agrees_with_its_reference():
    """In a process of its own, since this one interprets kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.on_gpu"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
