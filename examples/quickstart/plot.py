"""The results as a picture."""

from __future__ import annotations

from pathlib import Path

from contenders import Kind
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from results import Results, Row

from peft_variator.files import replacing


__all__ = ["save_plot"]

# Kind -> colour and marker. The untrained plugin is far below all of them, and in the table alone.
STYLES: dict[Kind, tuple[str, str]] = {
    "plugin": ("#2f6690", "o"),
    "int8 + plugin": ("#7a5195", "D"),
    "bf16 + plugin": ("#bc5090", "D"),
    "int8": ("#555555", "s"),
    "bf16": ("#555555", "s"),
}
# Where a name stands beside its point: offset in points, alignment across and along.
PLACES = (
    ((5, 6), "left", "bottom"),
    ((5, 3), "left", "bottom"),
    ((-8, -2), "right", "center"),
    ((5, -6), "left", "top"),
)


def save_plot(results: Results, path: str | Path) -> None:
    """Speed-up against quality, one point a way to run the model, as PNG; written whole or not at all."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in results.rows if row.kind in STYLES]
    _draw(left, rows, [row.quality.cosine for row in rows], None)
    left.set_ylabel("cosine to the base's embedding\n(higher is better)")
    agreements = [row.quality.agreement for row in rows]
    _draw(right, rows, agreements, [row.quality.agreement_error for row in rows])
    right.set_ylabel("texts with the base's nearest neighbour\n(higher is better)")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    settings, environment = results.settings, results.environment
    figure.suptitle(
        "all-MiniLM-L6-v2, sentence embeddings of held-out text\n"
        f"one plugin for every ratio k after {settings['steps']} steps of training, and what needs none",
        fontsize=11,
    )
    figure.supxlabel(
        f"{environment['cpu']}, threads: {environment['threads']}; torch {environment['torch']}; "
        f"{settings['timed_batch']} × {settings['max_tokens']} tokens. Bars: quartiles of the speed-up, standard "
        "errors of shares; one seed",
        fontsize=8,
        color="#555555",
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _draw(axes: Axes, rows: list[Row], values: list[float], errors: list[float] | None) -> None:
    line = [(row.speedup.median, value) for row, value in zip(rows, values, strict=True) if row.kind == "plugin"]
    axes.plot(*zip(*line, strict=True), color=STYLES["plugin"][0], linewidth=1)
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        color, marker = STYLES[row.kind]
        spread = [[row.speedup.median - row.speedup.low], [row.speedup.high - row.speedup.median]]
        height = None if errors is None else errors[index]
        axes.errorbar(row.speedup.median, value, xerr=spread, yerr=height, fmt=marker, capsize=2, color=color)
        # Neighbours on the line are close to each other: their names stand around it.
        place = index % len(PLACES) if row.kind == "plugin" else -1 if row.kind == "int8" else 0
        offset, across, along = PLACES[place]
        axes.annotate(
            row.name,
            (row.speedup.median, value),
            offset,
            textcoords="offset points",
            ha=across,
            va=along,
            fontsize=9,
            color=color,
        )
    axes.set_xlabel("times as fast as the base (further right is better)")
    axes.margins(0.18)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
