"""Every kernel in every form, compiled for chips that are not there."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import triton

from hf_argen.kernels import OPERATIONS
from hf_argen.kernels.variants import all_variants

from ..helpers.goldens import REPOSITORY

COMPILE = """
import json, sys
from dataclasses import asdict
from hf_argen.kernels.variants import CHIPS, all_variants, compiled, usage
for operation, variants in all_variants().items():
    for variant in variants:
        for name, chip in CHIPS.items():
            try:
                result = asdict(usage(compiled(variant, chip)))
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {str(error)[-2000:]}"}
            print(json.dumps({"form": f"{operation}, {variant.label}, {name}", "limit": chip.shared_memory, **result}))
"""


def test_every_kernel_has_variants():
    """All kernels that an operation starts, `kernel[grid](...)`."""
    for operation, variants in all_variants().items():
        module = importlib.import_module(f"hf_argen.kernels.{operation}.triton")
        started = set(
            re.findall(r"(\w+)\[[^\]\n]*\]\($", Path(module.__file__).read_text("utf-8"), re.MULTILINE)
        )
        assert started, operation
        assert started == {name for name in vars(module) if name.endswith("_kernel")}
        for name in started:
            assert any(one.kernel is getattr(module, name) for one in variants), name


def documented() -> dict[str, tuple[int, int]]:
    """Of the table in docs by form: shared memory and registers."""
    text = (REPOSITORY / "docs" / "kernels.md").read_text(encoding="utf-8")
    lines = text.split("<!-- resources -->")[1].split("<!-- end resources -->")[0].strip().splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in lines)
    chips = [cell.split(":")[0] for cell in header[2:]]
    return {
        f"{operation.strip('`')}, {form}, {chip}": tuple(map(int, cell.split(",")[:2]))
        for operation, form, *cells in rows
        for chip, cell in zip(chips, cells, strict=True)
    }


def test_every_variant_compiles_within_the_limits_of_the_chips():
    """
    Compiled without a GPU; nothing is spilled from registers, and shared memory suffices. The table in docs says so, of the
    release of Triton that it names. Triton keeps what it has compiled, so that a second run is quick.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["form"].split(",")[0] for one in results} == set(OPERATIONS)
    wrong = [
        one for one in results if "error" in one or one["spilled"] or one["shared_memory"] > one["limit"]
    ]
    assert not wrong, "\n".join(map(str, wrong))
    table = documented()
    assert {one["form"] for one in results} == set(table)
    if triton.__version__.startswith("3.9."):
        assert {one["form"]: (one["shared_memory"], one["registers"]) for one in results} == table
