"""A benchmark report as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..files import replacing
from .report import BenchmarkReport


__all__ = ["check_plotting", "save_plot"]


def check_plotting() -> None:
    """Raise if matplotlib is missing; call it before measuring, not after.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("A plot needs matplotlib, which is not installed. Run: pip install 'peft-variator[plots]'")


def save_plot(report: BenchmarkReport, path: str | Path) -> None:
    """Bars of the ideal and the measured speed-up of each ratio, with quartiles, as PNG; written whole or not at all.

    Args:
        report: the figures.
        path: where the picture goes; matplotlib reads the format off its ending.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    measured = [report.speedup(plugin) for plugin in report.plugins]
    medians = [spread.median for spread in measured]
    places = range(len(measured))
    figure = Figure(figsize=(1.6 + 1.4 * len(measured), 3.6), layout="constrained")
    axes = figure.subplots()
    ideal = [report.ideal_speedup(plugin) for plugin in report.plugins]
    axes.bar([place - 0.2 for place in places], ideal, 0.4, label="ideal (FLOPs)", color="#c6d4e1")
    spreads = [[s.median - s.low for s in measured], [s.high - s.median for s in measured]]
    axes.bar(
        [place + 0.2 for place in places], medians, 0.4, yerr=spreads, capsize=3, label="measured", color="#2f6690"
    )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(list(places), [plugin.name for plugin in report.plugins])
    axes.set_ylabel("times faster than the base")
    axes.set_title(f"{report.title}\n{report.machine}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
