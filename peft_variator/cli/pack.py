"""`peft-variator pack`: a 2:4 model on disk into the packed form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bases import pack_checkpoint
from .conversion import run_conversion
from .errors import reported


__all__ = ["pack_command"]


def pack_command(
    source: Annotated[Path, typer.Argument(help="Folder of a 2:4 model, with config.json and safetensors files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the packed model.")],
    target: Annotated[
        list[str] | None,
        typer.Option(help="Layer that has to be 2:4: a name, a class, or re:EXPRESSION. Left out: all that are."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Layer to leave dense, given likewise.")] = None,
) -> None:
    """Pack the 2:4 linear layers of SOURCE: 0.5625 of their bytes in 16 bits, for `from_pretrained` to load.

    It takes the memory of one tensor. The output folder appears when all of it is written; run again after an
    interruption, the command goes on where it stopped. SOURCE is not changed.
    """
    with reported():
        run_conversion("Packing", lambda report: pack_checkpoint(source, output, target, ignore or (), report))
