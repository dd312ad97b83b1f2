"""transformers' own kernels from the Hub, on our models."""

import os
import subprocess
import sys

from ..helpers.goldens import REPOSITORY

# A transformers release names the range of `kernels` releases that it takes, which may be newer than what package indices
# have. What it does with the library is then the same: replace the layers that have a kernel of their own.
PROGRAM = """
import transformers.utils, transformers.utils.import_utils
for module in (transformers.utils, transformers.utils.import_utils):
    module.is_kernels_available = lambda *arguments, **keywords: True
import tempfile
import torch
from tests.helpers.tiny import tiny_llamagen, tiny_rar, tiny_var

labels = torch.tensor([1, 3])
for make in (tiny_var, tiny_llamagen, tiny_rar):
    model = make()
    before = model.generate(labels, guidance_scale=2.0, do_sample=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder, use_kernels=True)
    assert model.use_kernels
    print(torch.equal(model.generate(labels, guidance_scale=2.0, do_sample=False), before))
"""


def test_use_kernels_does_no_harm():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=REPOSITORY
    )
    assert done.stdout.split() == ["True"] * 3, done.stderr[-2000:]
