"""`peft-variator inspect`: how sparse a checkpoint on disk is."""

from __future__ import annotations

from pathlib import Path

from ..sparsity import SparsityReport, inspect_checkpoint
from .console import Reporter


__all__ = ["inspect"]


def inspect(path: Path, by: str, pattern: str | None, fail: bool, reporter: Reporter) -> bool:
    """Count the zeros of a checkpoint and tell; see [`inspect_checkpoint`].

    Args:
        path: the checkpoint.
        by: one row of the table for each of these.
        pattern: n:m pattern to check for.
        fail: whether a module that misses the pattern is a failure.
        reporter: where to tell.

    Returns:
        Whether the checkpoint is what was asked for.

    Raises:
        ValueError: `fail` without a pattern, or no checkpoint that can be read.
    """
    reporter.check()
    if fail and pattern is None:
        raise ValueError(
            "--fail says whether every module meets a pattern: name the pattern with --pattern, e.g. 2:4."
        )
    report = inspect_checkpoint(path, pattern)
    _show(report, by, reporter)
    reporter.write_json(report.to_json())
    if reporter.png is not None:
        report.plot(reporter.png, by)
        reporter.say(f"Wrote {reporter.png}.")
    missed = [module.name for module in report.modules if module.pattern_met is False]
    if fail and missed:
        shown = ", ".join(missed[:3]) + (f" and {len(missed) - 3} more" if len(missed) > 3 else "")
        reporter.warn(f"{len(missed)} of {len(report.modules)} modules miss the pattern {pattern}: {shown}.")
    return not (fail and missed)


def _show(report: SparsityReport, by: str, reporter: Reporter) -> None:
    reporter.show_table(report.table(by))
    if report.source["structure"] == "tensor names":
        reporter.warn(
            f"{report.source['reason']}, so every matrix called weight counts, embeddings too, and blocks are guessed "
            "from names."
        )
    if report.total.negative_zeros:
        reporter.warn(
            f"{report.total.negative_zeros:,} zeros are stored as -0.0, which some 2:4 kernels read as values."
        )
