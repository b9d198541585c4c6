"""Pearson correlation, as a module of the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from peft_variator.metrics.common import as_scores, correlation, pair_info


__all__ = ["Pearsonr"]

_INPUTS = """
Args:
    predictions: predicted scores.
    references: true scores.
Returns:
    pearsonr: −1 to 1; nan when either side is constant, where it is not defined.
"""


class Pearsonr(evaluate.Metric):
    """Linear correlation of predicted and true scores."""

    def _info(self) -> evaluate.MetricInfo:
        return pair_info(type(self).__doc__, _INPUTS, datasets.Value("float64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"pearsonr": correlation(as_scores(predictions, "predictions"), as_scores(references, "references"))}
