"""`peft-variator inspect`: how sparse a checkpoint on disk is."""

from __future__ import annotations

from pathlib import Path

from ..sparsity import SparsityReport, inspect_checkpoint
from .console import Reporter


__all__ = ["inspect"]


def inspect(path: Path, by: str, pattern: str | None, reporter: Reporter) -> None:
    """Count the zeros of a checkpoint and tell; see [`inspect_checkpoint`]."""
    reporter.check()
    report = inspect_checkpoint(path, pattern)
    _show(report, by, reporter)
    reporter.write_json(report.to_json())
    if reporter.png is not None:
        report.plot(reporter.png, by)
        reporter.say(f"Wrote {reporter.png}.")


def _show(report: SparsityReport, by: str, reporter: Reporter) -> None:
    reporter.show_table(report.table(by))
    if report.source["structure"] == "tensor names":
        reporter.warn(
            "There is no config.json of a transformers model: every matrix called weight counts, embeddings too, and "
            "blocks are guessed from names."
        )
    if report.total.negative_zeros:
        reporter.warn(
            f"{report.total.negative_zeros:,} zeros are stored as -0.0, which some 2:4 kernels read as values."
        )
