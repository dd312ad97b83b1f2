"""What the commands show while they work."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import typer


@contextmanager
def progress(total: int, is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; gives the function that advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr, highlight=False)
    with Progress(console=console, transient=True, disable=not (is_shown and console.is_terminal)) as bar:
        task = bar.add_task("drawing", total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def busy(message: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(file=sys.stderr, highlight=False)
    with console.status(message) if console.is_terminal else nullcontext():
        yield


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """What Python would show with file and line becomes one line on stderr, once."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        text = " ".join(str(message).split())
        if issubclass(category, UserWarning) and text not in shown:
            shown.add(text)
            typer.echo(f"argen: note: {text}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
