"""Works that are killed, apart from the tests, so that a process which does one imports nothing else."""

import sys
from collections.abc import Iterator
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def pretokenize(model: Path, pictures: Path, out: Path, *options: str) -> Iterator[None]:
    """One run of scripts/pretokenize.py."""
    sys.path.insert(0, str(SCRIPTS))
    import pretokenize

    parsed = pretokenize.parse([str(model), str(pictures), str(out), *options])
    yield
    pretokenize.run(parsed)
