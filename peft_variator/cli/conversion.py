"""What the commands that rewrite a checkpoint on disk share: a progress bar and a closing line."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..bases.shards import ConversionReport, OnProgress


__all__ = ["run_conversion"]


def run_conversion(label: str, convert: Callable[[OnProgress], ConversionReport]) -> ConversionReport:
    """Run `convert` under a progress bar and say what came of it.

    Args:
        label: what the bar says.
        convert: the conversion; it is given the callback for the bar.
    """
    console = Console()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task(label, total=None)
        report = convert(lambda done, total: progress.update(task, completed=done, total=total))
    ratio = report.bytes_after / max(report.bytes_before, 1)
    console.print(
        f"Converted {report.converted} weights: {report.bytes_before / 1e6:,.1f} → {report.bytes_after / 1e6:,.1f} MB "
        f"({ratio:.1%}). Saved to {report.output}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return report
