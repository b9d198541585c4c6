"""`peft-variator merge`: a SparseLoRA adapter on disk into its base on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bases import MergeReport, merge_checkpoint
from .conversion import describe_sizes, print_lines, run_with_progress
from .errors import reported


__all__ = ["merge_command"]


def merge_command(
    base: Annotated[Path, typer.Argument(help="Folder of the base, dense or packed.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a SparseLoRA adapter, as save_pretrained wrote it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the merged model.")],
    packed: Annotated[
        bool | None, typer.Option("--packed/--dense", help="Form of the result. Left out: that of the base.")
    ] = None,
) -> None:
    """Merge ADAPTER into BASE under its masks: every zero stays where it is.

    It takes the memory of one tensor. The output folder appears when all of it is written; run again after an
    interruption, the command goes on where it stopped. BASE and ADAPTER are not changed.
    """
    with reported():
        report = run_with_progress(
            "Merging", lambda on_progress: merge_checkpoint(base, adapter, output, packed, on_progress)
        )
        print_lines(*describe_merge(report))


def describe_merge(report: MergeReport) -> list[str]:
    """What was done, and what to do next."""
    others = f" and replaced {report.replaced} other tensors" if report.replaced else ""
    form = f"{report.packed} packed layers" if report.packed else "dense"
    load = f"AutoModel….from_pretrained({str(report.output)!r})"
    first = "import peft_variator, then " if report.packed else ""
    sizes = describe_sizes(report)
    lines = [f"Merged {report.merged} weights under their masks{others}; the result is {form}: {sizes}"]
    if report.unmasked:
        lines.append(
            f"Nothing was masked in {len(report.unmasked)} of them, the first being {report.unmasked[0]}: the base "
            "does not prune it, so the whole update went in, as with plain LoRA. Is this the pruned base?"
        )
    return [*lines, f"Next: {first}{load}."]
