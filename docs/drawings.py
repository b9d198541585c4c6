"""Draws what each method does: `python docs/drawings.py` writes docs/images/variator.svg and sparse_lora.svg."""

from __future__ import annotations

from pathlib import Path

import matplotlib


matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402


IMAGES = Path(__file__).parent / "images"
GREY, COLOURS, FROZEN, TRAINED = "#d9d9d9", ("#9ecae1", "#fdae6b"), "#f0f0f0", "#2b8a3e"
# Ids by content and no date: the same drawing is the same file.
matplotlib.rcParams.update({"svg.hashsalt": "peft_variator", "font.size": 11})


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "") -> None:
    """A rounded box around its centre, with words in it."""
    style = "round,pad=0,rounding_size=0.12"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor="#555555"))
    axes.text(x, y, text, ha="center", va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#555555") -> None:
    """A thin arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1})


def blank(width: float, height: float, scale: float = 1.0) -> tuple[Figure, Axes]:
    """Axes without lines or numbers, in units of boxes."""
    figure, axes = plt.subplots(figsize=(width * scale, height * scale), facecolor="white")
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def draw_variator() -> Figure:
    """Ten tokens of a text at k = 4: four rows through the feed-forward network in place of ten."""
    figure, axes = blank(12.4, 6.9, 0.72)
    tokens = ["[CLS]", *(f"x{index}" for index in range(1, 9)), "[SEP]"]
    groups = [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
    colours = [GREY, *COLOURS, GREY]
    rows = [0.8, 3.3, 7.3, 9.8]
    for group, colour, row in zip(groups, colours, rows, strict=True):
        box(axes, row, 4.35, 1.0, 0.6, colour)
        box(axes, row, 2.35, 1.0, 0.6, colour)
        arrow(axes, (row, 4.05), (row, 3.75))
        arrow(axes, (row, 2.95), (row, 2.65))
        for token in group:
            x = 0.8 + token
            box(axes, x, 5.9, 0.9, 0.6, colour, tokens[token])
            box(axes, x, 0.7, 0.9, 0.6, colour)
            arrow(axes, (x, 5.6), (row, 4.65))
            arrow(axes, (row, 2.05), (x, 1.0))
    box(axes, 5.3, 3.35, 10.2, 0.8, FROZEN, "feed-forward network of the base (frozen): 4 rows in place of 10")
    for y, text in ((5.9, "hidden vectors"), (0.7, "the same length\nas before")):
        axes.text(11.0, y, text, va="center")
    axes.text(11.0, 5.1, "merge: a weighted\nmean, weights learnt", va="center", color=TRAINED)
    axes.text(11.0, 1.6, "expand: the row, and a\ncorrection of its own", va="center", color=TRAINED)
    axes.set_title("Variator at k = 4: neighbours share one pass through each feed-forward network", loc="left")
    return figure


def draw_sparse_lora() -> Figure:
    """A weight that is pruned 2:4, and the update under its mask."""
    generator = np.random.default_rng(3)
    figure, axes = blank(16.6, 5.4, 0.58)
    mask = np.zeros((4, 4), dtype=bool)
    for row in mask:
        row[generator.choice(4, 2, replace=False)] = True

    def grid(left: float, kept: np.ndarray, colour: str, title: str, below: str) -> None:
        for (row, column), keeps in np.ndenumerate(kept):
            box(axes, left + 0.35 + 0.7 * column, 3.6 - 0.7 * row, 0.62, 0.62, colour if keeps else "white")
            if not keeps:
                axes.text(left + 0.35 + 0.7 * column, 3.6 - 0.7 * row, "0", ha="center", va="center", color="#999999")
        axes.text(left + 1.4, 4.35, title, ha="center")
        axes.text(left + 1.4, 0.65, below, ha="center", va="center")

    grid(0.2, mask, COLOURS[0], "W, pruned", "frozen")
    axes.text(3.55, 2.55, "+", ha="center", va="center", fontsize=16)
    axes.text(4.05, 2.55, "(", ha="center", va="center", fontsize=30)
    for index in range(4):
        box(axes, 4.6, 3.6 - 0.7 * index, 0.62, 0.62, COLOURS[1])
        box(axes, 5.8 + 0.7 * index, 2.55, 0.62, 0.62, COLOURS[1])
    axes.text(4.6, 4.35, "B", ha="center")
    axes.text(6.85, 4.35, "A", ha="center")
    axes.text(5.15, 2.55, "·", ha="center", va="center", fontsize=16)
    axes.text(6.2, 0.65, "trained, of rank r", ha="center", va="center", color=TRAINED)
    axes.text(8.65, 2.55, ")", ha="center", va="center", fontsize=30)
    axes.text(9.25, 2.55, "⊙", ha="center", va="center", fontsize=18)
    grid(9.7, mask, GREY, "mask M of W", "stays")
    axes.text(13.05, 2.55, "=", ha="center", va="center", fontsize=16)
    grid(13.5, mask, "#a1d99b", "merged", "as sparse as W")
    axes.set_title("SparseLoRA: an update that keeps every zero, and merges at no cost", loc="left")
    return figure


def main() -> None:
    """Write all drawings."""
    for name, draw in {"variator": draw_variator, "sparse_lora": draw_sparse_lora}.items():
        figure = draw()
        figure.savefig(IMAGES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
