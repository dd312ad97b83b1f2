"""Tables of the command line."""

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

WIDE = 1000


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table, fitted to the terminal; elsewhere one whole line per row, for other programs."""
    console = Console(highlight=False, markup=False)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if console.is_terminal:
        console.print(table)
        console.print()
        return
    wide = Console(highlight=False, markup=False, width=WIDE, color_system=None, file=io.StringIO())
    wide.print(table)
    for line in wide.file.getvalue().splitlines():
        print(line.rstrip())
    print()


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Prints names and values, one pair a line."""
    pairs = list(facts)
    width = max(len(name) for name, _ in pairs)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for name, value in pairs:
        console.print(f"{name.ljust(width)}  {value}")
