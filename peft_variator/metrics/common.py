"""What the metrics of this package share: how they describe themselves, and checks of what they are given.

Functions only: `evaluate` takes the first `EvaluationModule` class that it sees in a script for the metric, so a
common base class imported there would be mistaken for it.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np


__all__ = ["as_labels", "as_rows", "as_scores", "correlation", "pair_info"]


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


def as_scores(values: Any, name: str) -> np.ndarray:
    """`values` as float64 of shape (examples,).

    Args:
        values: one number an example.
        name: `"predictions"` or `"references"`, for the message.

    Raises:
        ValueError: no example, or a value that is not finite.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.size == 0:
        raise ValueError(f"{name} is empty: a metric needs at least one example.")
    _check_finite(scores, name)
    return scores


def as_labels(values: Any, name: str) -> np.ndarray:
    """`values` as int64 class ids of shape (examples,).

    Raises:
        ValueError: no example, or a value that is not a whole number, e.g. a probability instead of a class id.
    """
    scores = as_scores(values, name)
    labels = scores.astype(np.int64)
    if wrong := np.flatnonzero(labels != scores).tolist():
        raise ValueError(
            f"{name}[{wrong[0]}] is {scores[wrong[0]]}, which is not a class id. Pass whole numbers, e.g. the "
            "argmax of the logits."
        )
    return labels


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


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson correlation of two arrays of shape (examples,); nan when one of them is constant."""
    left, right = left - left.mean(), right - right.mean()
    norm = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / norm) if norm else float("nan")


def _check_finite(values: np.ndarray, name: str) -> None:
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        index = tuple(wrong[0].tolist())
        raise ValueError(f"{name}{list(index)} is {values[index]}; every value must be finite.")
