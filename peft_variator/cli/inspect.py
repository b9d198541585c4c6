"""`peft-variator inspect`: how sparse a checkpoint on disk is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..sparsity import SparsityReport, inspect_checkpoint
from .console import open_console
from .errors import reported
from .outputs import check_outputs


__all__ = ["inspect_command"]


def inspect_command(
    path: Annotated[Path, typer.Argument(help="Folder with safetensors files, sharded or not, or one such file.")],
    by: Annotated[
        Literal["module", "block", "modality"], typer.Option(help="One row of the table for each.")
    ] = "block",
    pattern: Annotated[str | None, typer.Option(help="n:m pattern to check for, e.g. 2:4.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything to this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture to this file; needs the extra 'plots'.")] = None,
) -> None:
    """Count the zeros of a checkpoint's linear layers. The model is read slice by slice and never loaded."""
    with reported():
        check_outputs(json, png)
        report = inspect_checkpoint(path, pattern)
        _show(report, by)
        if json is not None:
            report.save_json(json)
            typer.echo(f"Wrote {json}.")
        if png is not None:
            report.plot(png, by)
            typer.echo(f"Wrote {png}.")


def _show(report: SparsityReport, by: str) -> None:
    console = open_console(120)
    console.print(report.table(by))
    if report.source["structure"] == "tensor names":
        console.print(
            "[yellow]There is no config.json of a transformers model: every matrix called weight counts, embeddings "
            "too, and blocks are guessed from names.[/]"
        )
    if report.total.negative_zeros:
        console.print(
            f"[yellow]{report.total.negative_zeros:,} zeros are stored as -0.0, which some 2:4 kernels read as "
            "values.[/]"
        )
