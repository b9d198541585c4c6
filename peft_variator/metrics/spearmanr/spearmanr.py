"""Spearman rank correlation, as a module of the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from peft_variator.metrics.common import as_scores, correlation, pair_info


__all__ = ["Spearmanr"]

_INPUTS = """
Args:
    predictions: predicted scores.
    references: true scores.
Returns:
    spearmanr: −1 to 1; nan when either side is constant, where it is not defined.
"""


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks 1 … n of shape (examples,); equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


class Spearmanr(evaluate.Metric):
    """Correlation of the ranks of predicted and true scores."""

    def _info(self) -> evaluate.MetricInfo:
        return pair_info(type(self).__doc__, _INPUTS, datasets.Value("float64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = as_scores(predictions, "predictions"), as_scores(references, "references")
        return {"spearmanr": correlation(_ranks(predicted), _ranks(true))}
