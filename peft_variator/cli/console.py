"""How commands print tables and what comes next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


__all__ = ["open_console", "show_result"]


def open_console(least_width: int) -> Console:
    """The console; a pipe has no width of its own, and rich would fold tables at 80 columns.

    Args:
        least_width: columns that a pipe gets at least.
    """
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, least_width)
    return console


def show_result(title: str, rows: Sequence[Sequence[str]], lines: Iterable[str]) -> None:
    """Print a table of figures, whose first row is its head, and plain lines below it."""
    console = open_console(160)
    head, *body = rows
    table = Table(title=title)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for row in body:
        table.add_row(*row)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
