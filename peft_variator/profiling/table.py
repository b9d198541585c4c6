"""A benchmark report as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from .report import BenchmarkReport, Measurement
from .timing import Spread


__all__ = ["make_table"]


def make_table(report: BenchmarkReport) -> Table:
    """One row for the base and one a ratio; a batch with padding has two more columns.

    Args:
        report: the figures.
    """
    padded = report.base.flops_unpacked is not None
    table = Table(
        title=escape(report.title), caption=_caption(report, padded), caption_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("")
    headers = ["FLOPs\nsaved", "ideal\nspeed-up", "measured\nspeed-up", "measured\n/ ideal"]
    headers += ["ideal,\npads\ncomputed", "measured\n/ that"] if padded else []
    headers += ["ms", "peak\nmemory", "added\nparams"]
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    table.add_row("base", *[""] * (len(headers) - 3), *_cost(report.base), "")
    for plugin in report.plugins:
        table.add_row(plugin.name, *_gains(report, plugin), *_cost(plugin), f"{report.added_parameters:,}")
    return table


def _caption(report: BenchmarkReport, padded: bool) -> str:
    lines = [
        f"{report.machine}; torch {report.environment['torch']}.",
        f"Medians of {report.settings['rounds']} rounds, quartiles below them.",
        f"Base: {report.base.flops / 1e9:,.2f} GFLOPs, {report.base_parameters:,} parameters.",
        "Ideal: the base's FLOPs over the plugin's. Peak: memory held beyond weights and inputs.",
    ]
    if padded:
        lines.append("Pads computed: the ideal of a plugin that, like the base, spends FLOPs on padding.")
    return "\n".join(lines)


def _gains(report: BenchmarkReport, plugin: Measurement) -> list[str]:
    measured, ideal, unpacked = report.speedup(plugin), report.ideal_speedup(plugin), report.unpacked_speedup(plugin)
    cells = [
        f"{report.flops_saved(plugin):.1%}",
        f"{ideal:.2f}×",
        _spread(measured, "×"),
        f"{measured.median / ideal:.2f}",
    ]
    return cells if unpacked is None else [*cells, f"{unpacked:.2f}×", f"{measured.median / unpacked:.2f}"]


def _cost(measurement: Measurement) -> list[str]:
    milliseconds = Spread.of([1000 * seconds for seconds in measurement.seconds])
    return [_spread(milliseconds), decimal(measurement.peak_memory)]


def _spread(spread: Spread, unit: str = "") -> str:
    digits = 2 if spread.median < 100 else 0
    return f"{spread.median:.{digits}f}{unit}\n{spread.low:.{digits}f}–{spread.high:.{digits}f}"
