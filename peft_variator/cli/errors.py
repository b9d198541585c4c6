"""How every command tells the user what went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape


__all__ = ["reported"]


@contextmanager
def reported() -> Iterator[None]:
    """Turn the errors that bad input raises into their message on the error stream and exit status 1.

    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
