"""What the commands that rewrite a checkpoint on disk share: a progress bar and a closing line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..bases.shards import ConversionReport, OnProgress


__all__ = ["describe_sizes", "print_lines", "run_conversion", "run_with_progress"]

Report = TypeVar("Report", bound=ConversionReport)


def run_with_progress(label: str, convert: Callable[[OnProgress], Report]) -> Report:
    """Run `convert` under a progress bar.

    Args:
        label: what the bar says.
        convert: the conversion; it is given the callback for the bar.
    """
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(label, total=None)
        return convert(lambda done, total: progress.update(task, completed=done, total=total))


def run_conversion(label: str, convert: Callable[[OnProgress], ConversionReport]) -> None:
    """Run `convert` under a progress bar and say what came of it."""
    report = run_with_progress(label, convert)
    print_lines(f"Converted {report.converted} weights: {describe_sizes(report)}")


def describe_sizes(report: ConversionReport) -> str:
    """How large the tensors were and are, and where they are."""
    ratio = report.bytes_after / max(report.bytes_before, 1)
    return (
        f"{report.bytes_before / 1e6:,.1f} → {report.bytes_after / 1e6:,.1f} MB ({ratio:.1%}). Saved to "
        f"{report.output}."
    )


def print_lines(*lines: str) -> None:
    """Print lines as they are, paths and brackets included."""
    for line in lines:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
