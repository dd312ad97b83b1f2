"""scripts/fetch_emoji_font.py, on stand-ins for apt-get and dpkg-deb."""

import runpy

import pytest

from hf_argen.data import emoji

from ..helpers.goldens import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "fetch_emoji_font.py"
APT_GET = 'for word; do last="$word"; done; [ "$last" = update ] || touch "${last}_1.0_all.deb"'
DPKG_DEB = "mkdir -p content/usr/share/fonts; printf font > content/usr/share/fonts/NotoColorEmoji.ttf"


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A machine without the font; the result puts a command on its path."""
    monkeypatch.delenv(emoji.FONT_VARIABLE, raising=False)
    target = tmp_path / "share" / "fonts" / "NotoColorEmoji.ttf"
    monkeypatch.setattr(emoji, "ENVIRONMENT_FONT", target)
    monkeypatch.setattr(emoji, "FONT_PLACES", (target,))
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")

    def add(name, script):
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)

    add("apt-get", APT_GET)
    add("dpkg-deb", DPKG_DEB)
    return target, add


def run():
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_fetches_once_and_names_the_file(environment, capfd):
    target, add = environment
    run()
    assert capfd.readouterr().out == f"{target}\n"
    assert target.read_text() == "font" and list(target.parent.iterdir()) == [target]
    add("apt-get", "exit 1")
    run()
    assert capfd.readouterr().out == f"{target}\n"


@pytest.mark.parametrize(
    "name, script, reason",
    [
        ("apt-get", "exit 100", "apt-get failed, see above"),
        ("dpkg-deb", "exit 2", "dpkg-deb failed, see above"),
        ("dpkg-deb", "exit 0", r"fonts-noto-color-emoji_1\.0_all\.deb holds no NotoColorEmoji\.ttf"),
    ],
)
def test_says_why_it_cannot(environment, name, script, reason, capfd):
    target, add = environment
    add(name, script)
    with pytest.raises(SystemExit, match=rf"{emoji.FONT_VARIABLE}.* It cannot be fetched here: {reason}\.$"):
        run()
    assert capfd.readouterr().out == "" and not target.exists()


def test_a_machine_without_apt(environment, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="there is no apt-get"):
        run()


def test_a_font_that_is_named_is_not_replaced(environment, monkeypatch, tmp_path):
    target, _ = environment
    monkeypatch.setenv(emoji.FONT_VARIABLE, str(tmp_path / "none.ttf"))
    with pytest.raises(SystemExit, match=r"was not found at .*none\.ttf"):
        run()
    assert not target.exists()
