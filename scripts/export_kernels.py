"""
Writes every kernel as a repository of the Hugging Face `kernels` library: Python and Triton only, so one build serves all.

    python scripts/export_kernels.py OUT
    python scripts/export_kernels.py OUT --operation adaln tree_attention

OUT/<operation>/build/torch-universal/ holds the operation with its reference, what it shares with the others, and
metadata.json. Programs open it by `kernels.get_local_kernel(Path("OUT/adaln"))`, or by `get_kernel` once it is on the Hub:

    hf upload --repo-type kernel USER/adaln OUT/adaln

Operations get a name of their own in `torch.ops`, so that a repository and this package can be loaded together.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from hf_argen import __version__, kernels
from hf_argen.kernels import OPERATIONS

SOURCE = Path(kernels.__file__).parent
SHARED = ("bounds.json", "bounds.py", "checks.py", "dispatch.py", "library.py", "variants.py")
README = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# {name}

{documentation}

From [hf_argen](https://pypi.org/project/hf-argen/) {version}: `reference.py` is the definition in plain PyTorch,
`triton.py` does the same in one pass on a GPU.

```python
from kernels import get_kernel

{name} = get_kernel("USER/{name}", version=1)
```

It offers {functions}. `HF_ARGEN_KERNELS=auto|reference|triton` says which implementation runs; `auto` takes the kernel on a
GPU where Triton is installed.
"""


def sources_of(operation: str) -> dict[str, str]:
    """The files of a repository but for its metadata, by path."""
    files = {name: (SOURCE / name).read_text(encoding="utf-8") for name in SHARED}
    for path in sorted((SOURCE / operation).glob("*.py")):
        files[f"{operation}/{path.name}"] = path.read_text(encoding="utf-8")
    names = exported(files[f"{operation}/__init__.py"])
    files["__init__.py"] = (
        f"{docstring(files[f'{operation}/__init__.py'])}\n\n"
        f"from .dispatch import mode, use\nfrom .{operation} import {', '.join(names)}\n\n"
        f"__all__ = {[*names, 'mode', 'use']!r}\n\nOPERATIONS = ({operation!r},)\n"
    )
    return files


def exported(source: str) -> list[str]:
    """The public names of an operation."""
    return re.findall(r'"(\w+)"', re.search(r"^__all__ = \[(.*?)\]", source, re.MULTILINE | re.DOTALL)[1])


def docstring(source: str) -> str:
    return re.match(r'""".*?"""', source, re.DOTALL)[0]


def write(operation: str, out: Path) -> Path:
    """
    Writes one repository, in place of an older one.

    Raises:
        ValueError: an unknown operation.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"There is no operation {operation!r}; there are {', '.join(OPERATIONS)}.")
    files = sources_of(operation)
    name = operation.replace("_", "-")
    digest = hashlib.sha256(
        "".join(f"{path}\n{text}" for path, text in sorted(files.items())).encode()
    ).hexdigest()
    identifier = f"_{operation}_{digest[:12]}"
    files["library.py"], found = re.subn(
        r'^NAMESPACE = "hf_argen"$', f'NAMESPACE = "{identifier}"', files["library.py"], flags=re.MULTILINE
    )
    assert found == 1, "an operation registered twice would be destroyed"
    build = out / operation / "build"
    shutil.rmtree(build, ignore_errors=True)
    for path, text in files.items():
        target = build / "torch-universal" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    metadata = {
        "id": identifier,
        "name": name,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (build / "torch-universal" / "metadata.json").write_text(
        json.dumps(metadata, indent=2) + "\n", encoding="utf-8"
    )
    readme = README.format(
        name=operation,
        documentation=docstring(files["__init__.py"]).strip('"').strip(),
        version=__version__,
        functions=", ".join(f"`{one}`" for one in exported(files[f"{operation}/__init__.py"])),
    )
    (out / operation / "README.md").write_text(readme, encoding="utf-8")
    return out / operation


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--operation", nargs="+", default=list(OPERATIONS), metavar="NAME")
    options = parser.parse_args(arguments)
    for operation in options.operation:
        try:
            print(write(operation, options.out))
        except ValueError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
