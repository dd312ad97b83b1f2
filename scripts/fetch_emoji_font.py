"""Prints the file of Noto Color Emoji; where there is none, fetches the Debian package into this environment first.

Needs no root and installs nothing outside sys.prefix: apt-get works on lists of its own, dpkg-deb only unpacks.

    python scripts/fetch_emoji_font.py
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_argen.data.emoji import DEBIAN_PACKAGE, ENVIRONMENT_FONT, FONT_VARIABLE, EmojiFontError, find_font


def run(command: list[str], folder: Path) -> None:
    """Runs a command in `folder`; what it prints goes to the standard error."""
    if shutil.which(command[0]) is None:
        raise OSError(f"there is no {command[0]}")
    if subprocess.run(command, cwd=folder, stdout=sys.stderr).returncode:
        raise OSError(f"{command[0]} failed, see above")


def fetch(target: Path) -> None:
    """
    Unpacks the font of the Debian package into `target`.

    Raises:
        OSError: apt-get or dpkg-deb is missing or failed, or the package holds no such file.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("lists/partial", "cache/archives/partial", "content"):
            (folder / part).mkdir(parents=True)
        # The user to whom apt-get steps down from root could not write here.
        options = (
            f"Dir::State::lists={folder}/lists",
            f"Dir::Cache={folder}/cache",
            "APT::Sandbox::User=root",
        )
        apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
        run([*apt, "update"], folder)
        run([*apt, "download", DEBIAN_PACKAGE], folder)
        package = next(folder.glob("*.deb"))
        run(["dpkg-deb", "-x", str(package), "content"], folder)
        found = next((folder / "content").rglob(target.name), None)
        if found is None:
            raise OSError(f"{package.name} holds no {target.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")  # then renamed: a killed process leaves no half font behind
        partial.write_bytes(found.read_bytes())
        os.replace(partial, target)


def main() -> None:
    try:
        print(find_font())
        return
    except EmojiFontError as error:
        missing = str(error)
    if not os.environ.get(FONT_VARIABLE):
        print(f"Fetching Debian's {DEBIAN_PACKAGE} into {ENVIRONMENT_FONT.parent}.", file=sys.stderr)
        try:
            fetch(ENVIRONMENT_FONT)
            print(find_font())
            return
        except OSError as error:
            missing = f"{missing} It cannot be fetched here: {error}."
    sys.exit(missing)


if __name__ == "__main__":
    main()
