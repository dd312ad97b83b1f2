"""
`make demo`: pictures drawn from words by the model that comes with the package, offline.

Runs the `argen` commands that it prints: a contact sheet with an animation of how its pictures form, scale by scale,
and a sheet of prompts that the model never saw in training.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

START = time.perf_counter()

PROMPTS = (
    "red apple", "grinning face", "dog face", "rocket",
    "hot beverage", "snowman", "octopus", "evergreen tree",
    "slice of pizza", "guitar", "hibiscus", "soccer ball",
)  # fmt: skip
UNSEEN = ("purple banana", "two cats", "green heart face", "blue car on fire")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    from hf_argen.cli import main as argen  # what takes the time until the first picture is torch

    print(f"torch and transformers are there after {time.perf_counter() - START:.1f} s")
    seed = ["--seed", str(options.seed)]
    for words in (
        [*PROMPTS, *seed, "--animate", "-o", str(options.out / "sheet.png")],
        [*UNSEEN, "-n", "4", *seed, "-o", str(options.out / "unseen.png")],
    ):
        print(f"\n$ {shlex.join(['argen', 'generate', *words])}", flush=True)
        if status := argen(["generate", *words]):
            return status
    print(f"\nAll in {time.perf_counter() - START:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
