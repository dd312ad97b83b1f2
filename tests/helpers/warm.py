"""What a process that is forked to be killed should not spend its time on: imports, and first calls that import more."""

from tempfile import TemporaryDirectory

import torch

import hf_argen.cli.converting
import hf_argen.convert
import hf_argen.hub
import hf_argen.modeling.code.modeling_code
import hf_argen.modeling.var.convert_var
import hf_argen.pipelines.class_to_image  # noqa: F401
from hf_argen import VarForImageGeneration
from hf_argen.auto import new_processor

from ..modeling import test_shared  # noqa: F401
from .tiny import sized_var, tiny_var

torch.set_num_threads(1)  # no pool of threads, which would not survive a fork
for seed in (1, 2):
    sized_var(seed)
with TemporaryDirectory() as folder:
    model = tiny_var()
    model.save_pretrained(folder)
    new_processor(model.config).save_pretrained(folder)
    VarForImageGeneration.from_pretrained(folder)
