"""What the metrics of this package share: how they describe themselves, and checks of what they are given.

Functions only: `evaluate` takes the first `EvaluationModule` class that it sees in a script for the metric, so a
common base class imported there would be mistaken for it.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np


__all__ = ["as_rows", "pair_info"]


def pair_info(description: str | None, inputs: str, feature: Any) -> evaluate.MetricInfo:
    """The `MetricInfo` of a metric whose predictions and references are of one type.

    Args:
        description: the docstring of the metric's class.
        inputs: arguments and results, shown by `help(metric.compute)`.
        feature: a `datasets` feature: the type of one prediction and of one reference.
    """
    features = datasets.Features({"predictions": feature, "references": feature})
    return evaluate.MetricInfo(
        description=description or "", citation="", inputs_description=inputs, features=features
    )


def as_rows(values: Any, name: str) -> np.ndarray:
    """`values` as float64 of shape (rows, features).

    Raises:
        ValueError: no row, rows of different lengths, or a value that is not finite.
    """
    widths = sorted({len(row) for row in values})
    if len(widths) != 1 or widths[0] == 0:
        raise ValueError(
            f"{name} must hold at least one row and all rows must have one and the same length, but the lengths found "
            f"are {widths}. Flatten batch and sequence to rows and leave padding out."
        )
    rows = np.stack([np.asarray(row, dtype=np.float64) for row in values])
    _check_finite(rows, name)
    return rows


def _check_finite(values: np.ndarray, name: str) -> None:
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        index = tuple(wrong[0].tolist())
        raise ValueError(f"{name}{list(index)} is {values[index]}; every value must be finite.")
