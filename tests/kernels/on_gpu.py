"""Every kernel in every case and dtype on a GPU, compiled: `TRITON_INTERPRET=0 python -m tests.kernels.on_gpu`."""

import importlib
import sys
from collections.abc import Iterator

from hf_argen.kernels import OPERATIONS

from .kernel_base import KernelTests


def all_tests() -> Iterator[KernelTests]:
    """The test classes of all operations."""
    for operation in OPERATIONS:
        module = importlib.import_module(f"tests.kernels.test_{operation}")
        for one in vars(module).values():
            if isinstance(one, type) and one.__module__ == module.__name__:
                yield one()


def main(device: str) -> None:
    failures = 0
    for tests in all_tests():
        for case in tests.cases:
            for dtype in tests.dtypes:
                try:
                    tests.check_agreement(case, dtype, device)
                except Exception as error:
                    failures += 1
                    print(f"{type(tests).__name__}, {case}, {dtype}: {type(error).__name__}: {error}")
    sys.exit(min(failures, 1))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cuda"]))
