"""Every kernel in every form, compiled for chips that are not there."""

import json
import os
import subprocess
import sys

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


def test_every_variant_compiles_within_the_limits_of_the_chips():
    """
    Compiled without a GPU; nothing is spilled from registers, and shared memory suffices. Triton keeps what it has
    compiled, so that a second run is quick.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    from hf_argen.kernels import OPERATIONS

    assert {one["form"].split(",")[0] for one in results} == set(OPERATIONS)
    wrong = [
        one for one in results if "error" in one or one["spilled"] or one["shared_memory"] > one["limit"]
    ]
    assert not wrong, "\n".join(map(str, wrong))
