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

# Kind -> colour, marker, and where its name stands beside the point.
STYLES: dict[Kind, tuple[str, str, tuple[int, int]]] = {
    "plugin": ("#2f6690", "o", (6, 6)),
    "untrained": ("#b0473a", "o", (6, -12)),
    "int8 + plugin": ("#7a5195", "D", (6, -12)),
    "int8": ("#555555", "s", (6, 6)),
    "bf16": ("#555555", "s", (6, 6)),
}


def save_plot(results: Results, path: str | Path) -> None:
    """Speed-up against quality, one point a way to run the model, as PNG; written whole or not at all."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, results.rows, [row.quality.cosine for row in results.rows], None)
    left.set_ylabel("mean cosine to the base's embedding (higher is better)")
    agreements = [row.quality.agreement for row in results.rows]
    _draw(right, results.rows, agreements, [row.quality.agreement_error for row in results.rows])
    right.set_ylabel("texts with the base's nearest neighbour (higher is better)")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    settings, environment = results.settings, results.environment
    figure.suptitle(
        f"all-MiniLM-L6-v2, sentence embeddings of held-out text: one plugin for every ratio k, "
        f"{settings['steps']} steps of training"
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
        color, marker, offset = STYLES[row.kind]
        spread = [[row.speedup.median - row.speedup.low], [row.speedup.high - row.speedup.median]]
        height = None if errors is None else errors[index]
        axes.errorbar(row.speedup.median, value, xerr=spread, yerr=height, fmt=marker, capsize=2, color=color)
        axes.annotate(row.name, (row.speedup.median, value), offset, textcoords="offset points", color=color)
    axes.set_xlabel("times as fast as the base (further right is better)")
    axes.margins(0.18)
    axes.set_ylim(top=1.06)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
