"""The results as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from results import Results, Row

from peft_variator.files import replacing


__all__ = ["save_plot"]

TRAINED, UNTRAINED = "#2f6690", "#b0473a"


def save_plot(results: Results, path: str | Path) -> None:
    """Speed-up against quality, one point a ratio, as PNG; written whole or not at all."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, results.rows, [row.quality.cosine for row in results.rows], None)
    left.set_ylabel("mean cosine to the base's embedding")
    agreements = [row.quality.agreement for row in results.rows]
    _draw(right, results.rows, agreements, [row.quality.agreement_error for row in results.rows])
    right.set_ylabel("texts with the same nearest neighbour")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    environment = results.environment
    figure.suptitle("all-MiniLM-L6-v2 with one plugin for every ratio k, on held-out text")
    figure.supxlabel(
        f"{environment['cpu']}, threads: {environment['threads']}; torch {environment['torch']}; bars are quartiles "
        "of the speed-up and standard errors of shares",
        fontsize=8,
        color="#555555",
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _draw(axes: Axes, rows: list[Row], values: list[float], errors: list[float] | None) -> None:
    trained = [index for index, row in enumerate(rows) if row.trained]
    axes.plot([rows[i].speedup.median for i in trained], [values[i] for i in trained], color=TRAINED, linewidth=1)
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        speedup, color = row.speedup, TRAINED if row.trained else UNTRAINED
        spread = [[speedup.median - speedup.low], [speedup.high - speedup.median]]
        height = None if errors is None else errors[index]
        axes.errorbar(speedup.median, value, xerr=spread, yerr=height, fmt="o", capsize=2, color=color)
        axes.annotate(row.name, (speedup.median, value), (6, 6), textcoords="offset points", color=color)
    axes.set_xlabel("times faster than the base")
    axes.margins(0.18)
    axes.set_ylim(top=1.06)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
