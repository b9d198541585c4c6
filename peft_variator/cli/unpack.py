"""`peft-variator unpack`: a packed model on disk into a dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bases import unpack_checkpoint
from .conversion import run_conversion
from .errors import reported


__all__ = ["unpack_command"]


def unpack_command(
    source: Annotated[Path, typer.Argument(help="Folder of a model packed by this package or published packed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the dense model.")],
) -> None:
    """Make SOURCE dense, its zeros stored as such, for engines that know nothing of 2:4.

    It takes the memory of one tensor. The output folder appears when all of it is written; run again after an
    interruption, the command goes on where it stopped. SOURCE is not changed.
    """
    with reported():
        run_conversion("Unpacking", lambda report: unpack_checkpoint(source, output, report))
