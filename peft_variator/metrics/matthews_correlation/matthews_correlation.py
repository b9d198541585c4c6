"""Matthews correlation coefficient, as a module of the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from peft_variator.metrics.common import as_labels, pair_info


__all__ = ["MatthewsCorrelation"]

_INPUTS = """
Args:
    predictions: predicted class ids.
    references: true class ids.
Returns:
    matthews_correlation: −1 to 1; 0 when predictions or references hold one class only.
"""


class MatthewsCorrelation(evaluate.Metric):
    """Matthews correlation coefficient for two or more classes.

    The form for any number of classes is R_K of Gorodkin, "Comparing two K-category assignments by a K-category
    correlation coefficient", 2004, eq. 8.
    """

    def _info(self) -> evaluate.MetricInfo:
        return pair_info(type(self).__doc__, _INPUTS, datasets.Value("float64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, true = as_labels(predictions, "predictions"), as_labels(references, "references")
        labels = np.union1d(predicted, true)
        # Python integers: products of counts overflow int64 from about 55,000 examples on.
        predicted_counts = [int(np.sum(predicted == label)) for label in labels]
        true_counts = [int(np.sum(true == label)) for label in labels]
        total = len(true)
        covariance = total * int(np.sum(predicted == true)) - _dot(predicted_counts, true_counts)
        variances = (total**2 - _dot(predicted_counts, predicted_counts)) * (total**2 - _dot(true_counts, true_counts))
        return {"matthews_correlation": covariance / variances**0.5 if variances else 0.0}


def _dot(left: list[int], right: list[int]) -> int:
    return sum(a * b for a, b in zip(left, right, strict=True))
